"""The tokenizer against the `rwkv` package's pure Python one, and against Python's own decoder."""
import random
from pathlib import Path
import pytest
import rwkv
from rwkv_peft.model.tokenizer import Bytes, Stream, World, tokenizer_for, world_vocabulary

SAMPLES = ["", " ", "\n\n", "。\n\n", "User: hi\n\nAssistant: <think", "Ünïcödé ß", "读作 RwaKuv（不是 RWaKuV）。", "🦖👩‍👩‍👧‍👦🇫🇮", "\x00\x17\r\n\t", "a" * 300, "मैं рад ๛ 한국어", "\ufffd\ufeff"]


@pytest.fixture(scope="module")
def theirs():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
    return TRIE_TOKENIZER(str(Path(rwkv.__path__[0]) / "rwkv_vocab_v20230424.txt"))


def scrambled(rng):
    ranges = ((32, 127), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0x400, 0x4FF), (0, 32), (0x3000, 0x3030))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 80)))


def test_world_equals_the_rwkv_package(theirs):
    world, rng = World(), random.Random(0)
    for text in SAMPLES + [scrambled(rng) for _ in range(200)]:
        ids = world.encode(text)
        assert ids == theirs.encode(text) and world.decode(ids) == text and 0 not in ids
    assert world_vocabulary()[1:] == [theirs.idx2token[i] for i in range(1, 65530)]


@pytest.mark.parametrize("tokenizer", [World(), Bytes()], ids=lambda t: t.name)
def test_streams_never_show_half_a_character(tokenizer):
    rng = random.Random(1)
    for text in SAMPLES + [scrambled(rng) for _ in range(50)]:
        ids, shown, stream = [byte + 1 for byte in text.encode()], "", Stream(tokenizer)      # the hardest way to spell it
        for i, id in enumerate(ids):
            shown += stream.push(id)
            assert text.startswith(shown) and shown == tokenizer.decode(ids[:i + 1])
        assert shown == text and stream.flush() == ""
    for _ in range(200):        # any bytes at all
        ids = [rng.randint(1, min(tokenizer.vocab_size - 1, 400)) for _ in range(30)]
        stream, data = Stream(tokenizer), b"".join(tokenizer.token_bytes(id) for id in ids)
        assert "".join(map(stream.push, ids)) + stream.flush() == data.decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [World(), Bytes()], ids=lambda t: t.name)
def test_ids_without_bytes_never_decode_and_never_crash(tokenizer):
    ids = tokenizer.encode("Grüße")
    strange = [0, -1, -300, 65530, 65535, 65536, 2**40] + ([257, 300] if tokenizer.name == "bytes" else [])
    for id in strange: assert tokenizer.token_bytes(id) == b"" and tokenizer.decode([id]) == "" and Stream(tokenizer).push(id) == ""
    assert tokenizer.decode([x for id in ids for x in (id, *strange)]) == "Grüße"


def test_half_a_surrogate_pair_is_one_sentence():
    for tokenizer in (World(), Bytes()):
        with pytest.raises(ValueError, match="character 2") as e: tokenizer.encode("ab\ud83d")
        assert "\n" not in str(e.value)


def test_the_vocabulary_names_the_tokenizer():
    assert [tokenizer_for(n).name for n in (257, 512, 65530, 65536)] == ["bytes", "bytes", "world", "world"]
    for size in (256, 513, 50277, 65537):
        with pytest.raises(ValueError, match=str(size)): tokenizer_for(size)
