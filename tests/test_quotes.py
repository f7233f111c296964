"The pages quote C++ by line range: each stored quote must still be what stands in those lines."
import re
from pathlib import Path

import nbformat
import pytest

from rwkv_peft.kernels.native import source

ROOT = Path(__file__).parents[1]


def quotes():
    "(page, file, first line, last line, quoted text) of every stored quote."
    for page in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(page, as_version=4).cells:
            for output in cell.get("outputs", []):
                found = re.match(r"kernels/(\S+), lines (\d+)-(\d+):\n", output.get("text", ""))
                if found: yield page.stem, found[1], int(found[2]), int(found[3]), output.text[found.end():].rstrip("\n")


def test_quotes_are_fresh():
    found = list(quotes())
    assert {file for _, file, *_ in found} >= {"wkv7.cpp", "fused.cpp"} and len(found) >= 6
    for page, file, first, last, text in found:
        lines = (ROOT / "kernels" / file).read_text(encoding="utf-8").splitlines()
        assert text == "\n".join(lines[first - 1:last]).rstrip(), f"{page} quotes {file} as it was: run the page again"
        assert lines[first - 1].startswith("// [") and lines[last].startswith("// [end]")


def test_unknown_mark():
    with pytest.raises(ValueError, match=r"no part marked // \[nothing\]"): source("wkv7.cpp", "nothing")
