"The cell with which guides begin in Colab: what it would install, and that it leaves torch and every other place alone."
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import types
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
guides = sorted((root / "nbs/guides").glob("*.ipynb"))
sources = {g.name: [c.source for c in nbformat.read(g, as_version=4).cells] for g in guides}
openers = {name: next((s for s in cells if '"google.colab" in' in s), None) for name, cells in sources.items()}
inviting = [name for name, cells in sources.items() if "colab.research.google.com" in cells[0]]
name_of = lambda requirement: re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def commands(monkeypatch, missing, colab=True):
    "What the cell would run where the modules `missing` can't be found."
    ran, found = [], importlib.util.find_spec
    monkeypatch.setattr(subprocess, "check_call", lambda command, *a, **k: ran.append(command))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if missing is all or name in missing else found("math"))
    if colab: monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    else: monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    exec(openers[inviting[0]], {"__name__": "__main__"})
    return ran


def test_one_cell_for_all_and_before_all_others():
    "A guide with a link has the cell, a guide with the cell has the link; it is the same text, and the first code of the page; the link opens that page."
    assert len(inviting) >= 3 and {name for name, cell in openers.items() if cell} == set(inviting)
    assert len({openers[name] for name in inviting}) == 1
    for name in inviting:
        assert f"/nbs/guides/{name})" in sources[name][0]
        assert next(c for c in nbformat.read(root / "nbs/guides" / name, as_version=4).cells if c.cell_type == "code").source == openers[name]


def test_elsewhere_it_does_nothing(monkeypatch):
    assert commands(monkeypatch, all, colab=False) == []


def test_nothing_missing_nothing_installed(monkeypatch):
    assert commands(monkeypatch, ()) == []


def test_only_what_is_missing(monkeypatch):
    ran = commands(monkeypatch, ("tomli_w", "fla"))
    assert [command[command.index("-q") + 1:] for command in ran] == [["--no-deps", "fla-core"], ["tomli-w"]]
    assert all(command[:4] == [sys.executable, "-m", "pip", "install"] for command in ran)


def test_torch_stays(monkeypatch):
    "No command names torch, a file of versions, or an upgrade; whatever depends on torch, by the installed packages' own word, is installed without what it depends on."
    ran = commands(monkeypatch, all)
    words = [word for command in ran for word in command]
    assert not [w for w in words if w in ("-c", "-r", "-U", "--upgrade", "--force-reinstall", "--constraint", "--requirement") or re.match(r"torch\b", w) or "constraints" in w]

    def needs(package, seen):
        if package in seen: return
        seen.add(package)
        try: asked = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError: return
        for r in asked:
            if "extra ==" not in r: needs(name_of(r), seen)

    for command in ran:
        for package in command[command.index("-q") + 1:]:
            if "--no-deps" in command or package.startswith("-"): continue
            seen = set()
            needs(name_of(package), seen)
            assert "torch" not in seen, f"{package} asks for torch"


def test_nothing_forgotten(monkeypatch):
    "Everything that settings.ini requires, and what the packages installed alone need; not torch, DeepSpeed and what Colab cannot be without."
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    required = {name_of(r) for r in ini["DEFAULT"]["requirements"].split()} - {"torch", "deepspeed", "ipython", "tomli"}
    given = {name_of(w.rsplit("/", 1)[-1]) for command in commands(monkeypatch, all) for w in command[command.index("-q") + 1:] if not w.startswith("-")}
    assert required <= given and "rwkv-peft" in given
    below = {name_of(r) for p in ("accelerate", "bitsandbytes", "fla-core") for r in importlib.metadata.requires(p) or [] if "extra ==" not in r}
    assert below - given <= {"torch", "packaging", "pyyaml", "huggingface-hub", "requests", "tqdm"}      # Colab comes with these


@pytest.mark.parametrize("page", ["25_your_own_data.ipynb", "45_long_contexts.ipynb", "62_7b_on_a_small_gpu.ipynb", "90_front_ends.ipynb"])
def test_guides_are_left_readable(page):
    "Every display has words beside it, pictures their alt text, and what was computed or not tried is called so."
    cells = nbformat.read(root / "nbs/guides" / page, as_version=4).cells
    for cell in cells:
        for o in cell.get("outputs", []):
            assert o.output_type != "error" and (o.output_type == "stream" or o.data.get("text/plain"))
            assert all(len(words) > 20 for words in re.findall(r'<img [^>]*alt="([^"]*)"', o.get("data", {}).get("text/html", "")))
    text = "\n".join(c.source for c in cells)
    assert "What to notice" in text or page.startswith("90")
    if page.startswith("62"): assert "computed, not measured" in text
    if page.startswith("90"): assert text.count("not tried") >= 5
