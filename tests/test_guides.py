"Guides: the cell with which they begin in Colab, what is left to read without a kernel, and how large a notebook with all views is."
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from rwkv_peft import look

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


def pictures_of(html: str) -> list[str]:
    "The words of each picture in a cell's HTML, outside the folds of a card."
    return re.findall(r'<img [^>]*alt="([^"]*)"', html) + re.findall(r'<svg [^>]*aria-label="([^"]*)"', html)


@pytest.mark.parametrize("page", [g.name for g in guides])
def test_guides_are_left_readable(page):
    "Every display has words beside it and a text for those who see no HTML, pictures their alt text; each picture is followed by what to see in it; no reprs of Python stand for a table; what was computed or not tried is called so."
    cells = [c for c in nbformat.read(root / "nbs/guides" / page, as_version=4).cells if "#| hide" not in c.source]
    for i, cell in enumerate(cells):
        shown = [o for o in cell.get("outputs", []) if o.output_type != "stream"]
        for o in cell.get("outputs", []):
            assert o.output_type != "error" and (o.output_type == "stream" or o.data.get("text/plain")), cell.source
            assert all(len(words) > 20 for words in pictures_of(o.get("data", {}).get("text/html", ""))), cell.source
        texts = [c.source for c in cells[i + 1:i + 5] if c.cell_type == "markdown"][:1]                 # what stands after it, code that belongs to it between
        if shown: assert texts or cells[i - 1].cell_type == "markdown", cell.source
        if any(pictures_of(o.data.get("text/html", "")) for o in shown): assert texts and re.search("(?i)notice|how to read it", texts[0]), cell.source
        for o in shown: assert "text/html" in o.data or len(o.data["text/plain"]) < 300 or o.data["text/plain"][0] not in "{[(", f"a table would say it better: {cell.source}"
    text = "\n".join(c.source for c in cells)
    if page.startswith("62"): assert "computed, not measured" in text
    if page.startswith("90"): assert text.count("not tried") >= 5


FAST = "model = 'rwkv7-tiny'; data = rows; max_steps = 4; micro_bsz = 2; accumulate = 1; eval_split = 0.2; eval_steps = 2; save_steps = 2; forget_data = 'none'"
VIEWS = f"""
%load_ext rwkv_peft
base, rows, asked = RWKV.load("rwkv7-tiny"), demo_rows("en")[:12], "User: What is a seed?\\n\\nAssistant:"
data = read_data(rows, base.tokenizer); data
data.show(0)
data.check()
%%rwkv_finetune planned --dry-run\n{FAST}
%%rwkv_finetune made\n{FAST}; peft = 'lora'; lr_init = 4e-3; sample_prompts = [asked]
%%rwkv_finetune tuned\n{FAST}; peft = 'state'; lr_init = 2.0; keep = 9
report("runs/made")
look.write_report("runs/made").name
look.curves(made)
look.remark_list(look.remarks(made))
look.rows_behind(made, Remark("loss spike", 1, "for the test", (0, 1)))
look.runs_table("runs")
look.difference("runs/made", "runs/tuned")
look.read_losses(base, data[0])
look.loss_ribbon(look.read_losses(base, data[0]))
look.compare(base, made.model, data[0])
look.worst_rows(made.model, data, 3)
look.mosaic(tuned.model)
look.spectra(tuned.model)
look.growth("runs/tuned")
look.strip(tuned.model, asked, stops=(0, 1), max_tokens=12)
look.state_over(tuned.model, asked)
look.who_wrote(tuned.model, asked, layer=3, head=0)
states.beside(tuned.model, asked)
found = deltas("runs/made"); found
assert isinstance(found, look.Deltas); change_map(found)
look.delta_history("runs/made")
recording = look.record(base, asked, max_tokens=12, sampler=Sampler(temperature=.8)); recording
look.load_recording(look.save_recording(recording, "kept.safetensors"), base)
look.inspect(recording, 3)
look.stages_of(recording, 3)[0]
look.what_if(recording, Sampler(temperature=2.0))
look.rerun(recording, 3, max_tokens=5)
look.tree(recording, 3, n=2, depth=2, tail=4)
look.beside(base, made.model, asked, max_tokens=8)
look.error_card(look.explain(ValueError("lr_int: there is no such setting; did you mean 'lr_init'?")))
look.checkpoint_card("rwkv7-tiny")
SamplerLab(recording)
StateLab(tuned.model, asked, stops=(0, 1), max_tokens=12)
"""


def test_all_views_in_one_notebook_stay_small(tmp_path):
    "Every view of `look` and both labs, saved: under 1.5 MB in all, no address, nothing that runs, and a text for each display."
    imports = """from rwkv_peft import RWKV, look, read_data
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.look import states
from rwkv_peft.look.deltas import change_map, deltas
from rwkv_peft.look.report import report
from rwkv_peft.look.runs import Remark
from rwkv_peft.model.sample import Sampler
from rwkv_peft.notebook.sampler_lab import SamplerLab
from rwkv_peft.notebook.state_lab import StateLab"""
    assert not [name for name in dir(look) if not re.search(rf"\b{name}\b", VIEWS)], "a view that this notebook doesn't hold"
    cells = re.split(r"\n(?!model = )", VIEWS.strip())
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (imports, *cells)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root), prepend=os.pathsep)
        NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}, store_widget_state=False).execute()
    for cell in book.cells[4:]:
        assert cell.outputs, cell.source
        for o in cell.outputs:
            assert o.output_type != "display_data" and o.output_type != "execute_result" or o.data["text/plain"].strip(), cell.source
            said = json.dumps(o).lower()
            assert not re.search(r"https?:", said) and "<script" not in said and "javascript" not in said and "<iframe" not in said, cell.source
    assert len(nbformat.writes(book)) < 1_500_000
