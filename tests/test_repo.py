"The rules of the house: what a reviewer would otherwise have to look for by hand."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import nbformat
import pytest
import readme

root = Path(__file__).parent.parent
pages = sorted(p for p in root.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
modules = sorted(p for p in root.glob("rwkv_peft/**/*.py") if p.name != "_modidx.py")
rooms = ["show", "kernels", "model", "peft", "data", "train", "export", "look", "notebook", "bench", "cli"]
knows = {  # beyond itself: the rooms whose modules a room may import
    "show": [], "kernels": [], "model": ["kernels"], "peft": ["kernels", "model"], "data": ["model", "show"],
    "train": ["kernels", "model", "peft", "data", "show"], "export": ["kernels", "model", "peft", "data"],
    "look": rooms[:7], "notebook": rooms[:8], "bench": rooms[:9], "cli": rooms[:10]}
exported = lambda cell: cell.cell_type == "code" and re.search(r"^#\|\s*exporti?\b", cell.source, re.M)
read = lambda page: nbformat.read(page, as_version=4)
name = lambda path: str(path.relative_to(root))


def module_of(page: Path) -> str | None:
    "The dotted module a page exports, or None for a guide."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in read(page).cells if c.cell_type == "code"), re.M)
    return found and found.group(1)


def our_imports(tree: ast.Module, nested: bool):
    "Modules of ours that the source imports (absolute names without the package's), at the top level or anywhere."
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rwkv_peft."): yield node.module.removeprefix("rwkv_peft.")
        if isinstance(node, ast.Import): yield from (a.name.removeprefix("rwkv_peft.") for a in node.names if a.name.startswith("rwkv_peft."))


@pytest.mark.parametrize("page", [p for p in pages if module_of(p)], ids=name)
def test_imports_run_downward(page):
    "A room imports from the rooms that it may know; inside a room a page imports from smaller numbers."
    me, source = module_of(page), "\n".join(c.source for c in read(page).cells if exported(c))
    room, tree = me.split(".")[0], ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
    number = lambda m: next((int(p.name.split("_")[0]) for p in pages if module_of(p) == m), None)
    for other in our_imports(tree, nested=True):
        assert other.split(".")[0] in [room, *knows[room]], f"{me} imports {other}, but {room} may know only {knows[room]}"
    for other in our_imports(tree, nested=False):
        if other.split(".")[0] == room: assert number(other) < number(me), f"{me} imports {other}, which stands on a later page"


def test_every_module_comes_from_a_page():
    from_pages = {m.replace(".", "/") + ".py" for m in map(module_of, pages) if m}
    ours = {str(m.relative_to(root / "rwkv_peft")) for m in modules if m.name != "__init__.py"}
    assert ours == from_pages


def test_no_drift_between_pages_and_modules(tmp_path):
    "Exporting and cleaning a copy changes nothing."
    for part in ("nbs", "rwkv_peft", "settings.ini"):
        copy = shutil.copytree if (root / part).is_dir() else shutil.copy
        copy(root / part, tmp_path / part)
    for command in ("nbdev_export", "nbdev_clean"):
        ran = subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    files = [f for part in ("nbs", "rwkv_peft") for f in (tmp_path / part).rglob("*") if f.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in f.parts]
    differ = [str(f.relative_to(tmp_path)) for f in files if not (root / f.relative_to(tmp_path)).exists() or f.read_bytes() != (root / f.relative_to(tmp_path)).read_bytes()]
    assert not differ, f"run nbdev_export && nbdev_clean: {differ}"


@pytest.mark.parametrize("page", pages, ids=name)
def test_page_sizes(page):
    nb = read(page)
    code = [c for c in nb.cells if c.cell_type == "code"]
    bare = nbformat.from_dict({**nb, "cells": [{**c, "outputs": []} if c.cell_type == "code" else c for c in nb.cells]})
    assert len(code) <= 60
    assert len(nbformat.writes(bare)) <= 250_000 and page.stat().st_size <= 1_500_000
    for cell in filter(exported, code):
        lines = [l for l in cell.source.splitlines() if l.strip() and not l.startswith("#|")]
        assert len(lines) <= 40, f"{lines[0]} ... has {len(lines)} lines"


@pytest.mark.parametrize("page", pages, ids=name)
def test_page_form(page):
    "Title and question first; imports in cells of their own; one public name an exported cell; each page ran."
    nb = read(page)
    assert re.match(r"# .+\n+> .+", nb.cells[0].source), "a page begins with `# Title` and `> one line`"
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        source = re.sub(r"^\s*[%!].*$", "", re.sub(r"^%%.*", "", cell.source, flags=re.S), flags=re.M)
        try: tree = ast.parse(source)
        except SyntaxError: continue  # IPython syntax inside a line
        imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not imports or len(imports) == len(tree.body), f"imports mixed with code: {cell.source[:60]!r}"
        if exported(cell):
            public = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
            assert len(public) <= 1, f"{public} share a cell"
            for n in tree.body:
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_"): assert ast.get_docstring(n), f"{n.name} has no docstring"
    ran = [c for c in nb.cells if c.cell_type == "code" and c.outputs]
    assert ran, "the page's outputs are not stored"


@pytest.mark.parametrize("file", readme.SOURCES)
def test_readme_is_the_index_page(file):
    assert (root / file).read_text(encoding="utf-8") == readme.render(file), "run python tests/readme.py"


def test_library_never_imports_its_tools():
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] in ("fastcore", "nbdev", "execnb", "pytest")], f"{name(path)} imports {names}"


@pytest.mark.parametrize("page", pages, ids=name)
def test_outputs_stay_at_home(page):
    "No output loads or links anything from outside, or names a path of the machine that ran it."
    for cell in read(page).cells:
        outputs = json.dumps(cell.get("outputs", []))
        outputs = outputs.replace("http://www.w3.org/", "")  # the name of SVG's namespace, which nobody fetches
        assert not re.search(r"https?://|src=\\?[\"']//", outputs), f"an output of {cell.source[:60]!r} holds an external address"
        kinds = {kind for o in cell.get("outputs", []) for kind in o.get("data", {})}
        assert not [k for k in kinds if "javascript" in k] and not re.search(r"<(?:script|iframe|object|embed|link|base|form)\b|\bon\w+=|@import", "".join(str(o.get("data", {}).get(k, "")) for o in cell.get("outputs", []) for k in ("text/html", "image/svg+xml"))), f"an output of {cell.source[:60]!r} is active"


def test_no_path_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for file in tracked:
        if Path(file).suffix in (".safetensors", ".png"): continue
        text = (root / file).read_text(encoding="utf-8")
        found = re.search(r"/(?:home|Users|root|work|tmp)/[\w.-]+", text.replace("/tmp/wheel", ""))
        assert not found, f"{file} names {found and found.group()}"


deferred = ["accelerate", "deepspeed", "bitsandbytes", "fla", "peft", "transformers", "datasets", "matplotlib", "IPython", "ipywidgets", "pandas", "nbdev", "fastcore", "typer"]


@pytest.mark.parametrize("line", ["import rwkv_peft", "from rwkv_peft import RWKV, RWKVConfig", "from rwkv_peft import Config", "from rwkv_peft import LoRA, attach, read_data"])
def test_importing_is_light(line):
    code = f"{line}\nimport sys\nprint([m for m in {deferred} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": ""})
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_public_names_resolve():
    import rwkv_peft
    import importlib
    for package in (rwkv_peft, *(importlib.import_module(f"rwkv_peft.{r}") for r in rooms if (root / "rwkv_peft" / r / "__init__.py").exists())):
        for public in package.__dir__(): assert getattr(package, public) is not None


SAME = [(p.parent.name, p.stem) for p in modules if p.parent.parent.name == "rwkv_peft" and f'"{p.stem}": "{p.stem}"' in (p.parent / "__init__.py").read_text(encoding="utf-8")]


def test_a_function_is_not_hidden_by_the_module_that_is_called_like_it():
    "Whichever import comes first, in a Python of its own; what else is in the module stays within reach."
    assert {"report", "deltas", "attach", "batches", "evaluate", "curve"} <= {stem for _, stem in SAME}
    orders = ("from rwkv_peft.{0} import {1} as found", "import rwkv_peft.{0}.{1}", "import rwkv_peft.{0}.{1} as found")
    lines = [order.format(room, stem) for (room, stem), order in zip(SAME, cycle(orders))]
    ask = f"""
import importlib, sys, types
import rwkv_peft
for room, stem in {SAME}:
    function, package = getattr(importlib.import_module(f"rwkv_peft.{{room}}"), stem), importlib.import_module(f"rwkv_peft.{{room}}")
    module = sys.modules[f"rwkv_peft.{{room}}.{{stem}}"]
    assert isinstance(function, types.FunctionType) and isinstance(module, types.ModuleType) and function is getattr(module, stem) is getattr(package, stem), stem
    assert [n for n in module.__all__ if getattr(module, n) is not (function if n == stem else getattr(function, n))] == [], stem
from rwkv_peft.look import report, deltas, states
import rwkv_peft.look.report as m
assert callable(report) and callable(deltas) and m.card is sys.modules["rwkv_peft.look.report"].card and states is sys.modules["rwkv_peft.look.states"]
"""
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines) + ask], capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr


def test_nothing_dangerous():
    "No unpickling, no evaluation of text but the magic's own cell, no address written to at import."
    for path in modules:
        source = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in source and not re.search(r"pickle\.(loads?|Unpickler)\b", source), name(path)
        calls = {n.func.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert "exec" not in calls and ("eval" not in calls or path.name == "magic.py"), name(path)
        for n in ast.walk(ast.parse(source)):
            if isinstance(n, ast.keyword) and n.arg == "strict": assert not (isinstance(n.value, ast.Constant) and n.value.value is False), name(path)
            if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "load" and getattr(getattr(n.func, "value", None), "id", "") == "torch":
                assert any(k.arg == "weights_only" for k in n.keywords), name(path)
