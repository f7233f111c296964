"""Bad input as a user meets it: in a cell one line without a traceback, in a shell one line and exit code 2, nothing heavy before it, nothing lost by it.

What each room refuses is tested with the room; here is the whole way in, through `%%rwkv_finetune` and `rwkv-peft`."""
import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from safetensors.torch import load_file, save_file
from traitlets.config import Config as Traits

import rwkv_peft
from markup import Markup
from rwkv_peft import RWKV, RWKVConfig, cli
from rwkv_peft.data.records import read_data
from rwkv_peft.look.report import plan_card, report
from rwkv_peft.model.checkpoint import save
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.notebook import magic
from rwkv_peft.train import folder as folder_module, loop
from rwkv_peft.train.events import read_events
from rwkv_peft.train.folder import checkpoints, load_checkpoint

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}."} for i in range(12)]
FAST = {"max_steps": 2, "accumulate": 1, "eval_steps": 1, "r": 2}
lines = lambda rows: "".join(json.dumps(r) + "\n" for r in rows)


class Trap:
    "Unpickling it runs code: it makes a file of this name."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def checkpoint_files(desk, good: dict, file: bytes):
    "Name -> content of files that are no RWKV-7; a dict goes through torch.save."
    zeros = torch.zeros
    return {
        "hf.pth": {"rwkv.embeddings.weight": zeros(4, 4), "rwkv.blocks.0.attention.key.weight": zeros(4, 4)},
        "fla.pth": {"model.embeddings.weight": zeros(4, 4), "model.layers.0.attn.r_proj.weight": zeros(4, 4), "lm_head.weight": zeros(4, 4)},
        "v4.pth": {"emb.weight": zeros(4, 4), "blocks.0.att.time_decay": zeros(4), "blocks.0.att.time_first": zeros(4), "blocks.0.att.time_mix_k": zeros(1, 1, 4)},
        "v6.pth": {"emb.weight": zeros(4, 4), "blocks.0.att.time_maa_x": zeros(4), "blocks.0.att.time_decay": zeros(4), "blocks.0.att.ln_x.weight": zeros(4)},
        "short.pth": file[:len(file) // 2], "head.pth": file[:3], "void.pth": b"", "page.pth": b"<html>404</html>",
        "code.pth": {"emb.weight": Trap(desk / "MARK")}, "old_code.pth": pickle.dumps({"emb.weight": Trap(desk / "MARK")}, protocol=4),
        "short.safetensors": b"\x90\x01\0\0\0\0\0\0{\"emb", "lora.pth": {"blocks.0.att.key.lora_A": zeros(2, 4)}, "state.pth": {"blocks.0.att.time_state": zeros(2, 16, 16)},
        "list.pth": [zeros(2)], "nested.pth": {"model": good}, "lacks.pth": {k: v for k, v in good.items() if "ln_x" not in k}, "more.pth": {**good, "blocks.0.att.qq": zeros(2)},
        "int.pth": {**good, "head.weight": zeros(257, 32, dtype=torch.int8)}, "words.pth": {**good, "emb.weight": zeros(1000, 32), "head.weight": zeros(1000, 32)},
    }


def index(code, sizes, documents=(0, 1)):
    "A Megatron index, version 1: sizes int32, pointers int64 (bytes), documents int64."
    starts = [2 * sum(sizes[:i]) for i in range(len(sizes))]
    return b"MMIDIDX\0\0" + struct.pack(f"<QBQQ{len(sizes)}i{len(sizes)}q{len(documents)}q", 1, code, len(sizes), len(documents), *sizes, *starts, *documents)


DATA = {
    "empty.jsonl": b"", "blank.jsonl": b"\n  \r\n\n", "object.json": json.dumps({"rows": ROWS}).encode(), "notes.log": b"Once upon a time\n", "pairs.csv": b"q,a\n1,2\n",
    "latin.jsonl": '{"text": "café"}\n'.encode("latin-1"), "utf16.jsonl": lines(ROWS).encode("utf-16"), "nul.jsonl": b'{"text": "a\0b"}\n', "zeros.jsonl": b"\0" * 99,
    "half.jsonl": b'{"text": "\\ud83d"}\n', "deep.jsonl": b'{"text": ' + b"[" * 99999, "digits.jsonl": b'{"text": ' + b"1" * 5000 + b"}",
    "no_text.jsonl": lines([{"text": "a"}, {"txt": "b"}]).encode(), "null.jsonl": lines([{"text": None}]).encode(), "number.jsonl": lines([{"text": 7}]).encode(),
    "shapes.jsonl": lines([{"text": "a"}, ROWS[0]]).encode(), "long.jsonl": lines([{"text": "ab"}, {"text": "x" * 5000}]).encode(),
    "idle.jsonl": lines([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, {"messages": [{"role": "user", "content": "hi"}]}]).encode(),
    "row.jsonl": b'{"text": "a"}\n{"text": "b', "answer.jsonl": lines([ROWS[0], {"prompt": "a", "completion": " "}]).encode(), "names.jsonl": lines([{"qestion": "a", "anwser": "b", "prmpt": "c", "completon": "d"}]).encode(),
    "wide.jsonl": lines([{"text": "x" * 10_000_000 + "\ud83d"}]).encode(), "lone.bin": b"\0\0", "lone2.idx": b"MMIDIDX\0\0",
    "cut.bin": b"\1\0", "cut.idx": index(8, [2]), "code.bin": b"\1\0\2\0", "code.idx": index(99, [2]), "stump.bin": b"\1\0\2\0", "stump.idx": index(8, [2])[:-3],
    "all_idle.jsonl": lines([{"messages": [{"role": "user", "content": "hi"}]}] * 2).encode(),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a small model, rows, and one file of each bad kind."
    desk = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    save(RWKV(RWKVConfig(n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8)), desk / "small.pth")
    (desk / "rows.jsonl").write_text(lines(ROWS))
    for name, content in checkpoint_files(desk, torch.load(desk / "small.pth", weights_only=True), (desk / "small.pth").read_bytes()).items():
        if isinstance(content, bytes): (desk / name).write_bytes(content)
        else: torch.save(content, desk / name)
    for name, content in DATA.items(): (desk / name).write_bytes(content)
    (desk / "folder").mkdir()
    return desk


@pytest.fixture(scope="module")
def ipython():
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=Traits(HistoryManager={"enabled": False}))
    with capture_output(): shell.run_cell("%load_ext rwkv_peft")
    yield shell
    InteractiveShell.clear_instance()


def cell(ipython, text, **names):
    "What a cell printed and displayed, and its error, if any."
    ipython.user_ns.update(names)
    with capture_output() as captured: result = ipython.run_cell(text)
    return captured, result.error_in_exec or result.error_before_exec


def body(settings): return "".join(f"{name} = {value!r}\n" for name, value in settings.items())


def refused_in_cell(ipython, settings, line="tried", **names):
    captured, error = cell(ipython, f"%%rwkv_finetune {line}\n" + (settings if isinstance(settings, str) else body(settings)), **names)
    assert type(error) is UsageError, error or captured.stdout
    assert "\n" not in str(error) and "Traceback" not in captured.stdout + captured.stderr
    return str(error)


def command(capsys, *words):
    with pytest.raises(SystemExit) as end: cli.main([str(w) for w in words])
    return (end.value.code, *capsys.readouterr())


def pairs(settings):
    "Settings as words of a shell, values as TOML."
    def toml(value): return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}" if isinstance(value, dict) else json.dumps(value)
    return [f"{name}={value if isinstance(value, str) else toml(value)}" for name, value in settings.items()]


def refused_in_shell(capsys, verb, *words):
    code, out, err = command(capsys, verb, *words)
    assert code == 2 and out == "" and err.startswith("rwkv-peft: ") and err.count("\n") == 1, (code, out, err)
    return err


def contents(folder): return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


# ---------------------------------------------------------------- refused before anything heavy

SETTINGS = [  # nothing of the model is touched, not even its file
    ({"data": "nowhere.jsonl"}, ["data", "nowhere.jsonl", "no file"]),
    ({"data": "folder"}, ["data", "folder"]),
    ({"data": ""}, ["data"]),
    ({"lr_innit": 1e-4}, ["lr_innit", "'lr_init'"]),
    ({"epoch": 3}, ["epoch", "'epochs'"]),
    ({"pefft": "lora"}, ["pefft", "'peft'"]),
    ({"peft": "loar"}, ["'loar'", "'lora'"]),
    ({"template": "thinkk"}, ["'thinkk'", "'think'"]),
    ({"dataload": "packed"}, ["'packed'", "'pack'"]),
    ({"peft": "pisa"}, ["'pisa'", "'pissa'"]),
    ({"peft": "bone", "alpha": 2.0}, ["alpha", "'bone'"]),
    ({"peft": "loftq"}, ["quant", "'nf4'"]),
    ({"peft": "lisa", "quant": "nf4", "r": None}, ["quant", "LISA", "turns"]),
    ({"quant": "nf5"}, ["'nf5'", "'nf4'"]),
    ({"peft": "miss", "optim": "lorafa"}, ["optim", "'miss'"]),
    ({"peft": []}, ["peft", "expected"]),
    ({"peft": ["lora", "none"]}, ["peft", "'none'", "by itself"]),
    ({"lr_schedule": "cosine"}, ["'cosine'", "'cos'"]),
    ({"r": "16"}, ["r: expected a whole number", "'16'"]),
    ({"r": 1.5}, ["r: expected a whole number", "1.5"]),
    ({"r": 0}, ["r:", "greater than 0"]),
    ({"lr_init": [1]}, ["lr_init: expected a number"]),
    ({"lr_init": -1.0}, ["lr_init", "greater than or equal to 0"]),
    ({"resume": "yes"}, ["resume: expected true or false"]),
    ({"targets": 3}, ["targets", "list of texts"]),
    ({"sample_prompts": [1]}, ["sample_prompts", "list of texts"]),
    ({"model": 5}, ["model: expected", "5"]),
    ({"device": "gpu"}, ["device", "'gpu'", "cuda"]),
    ({"device": "meta"}, ["device", "'meta'"]),
    pytest.param({"device": "cuda"}, ["device", "'cuda'"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ({"seed": 2 ** 70}, ["seed"]),
    ({"output": "small.pth"}, ["output", "small.pth"]),
    ({"output": "small.pth/deeper"}, ["output", "small.pth"]),
    ({"max_steps": None, "epochs": 1e9, "model": None}, ["model", "missing"]),
    ({"epochs": 1.0}, ["epochs", "max_steps"]),
    ({"adapter": "folder", "peft": "none", "r": None}, ["adapter"]),
    ({"adapter": "folder", "peft": "state", "r": None}, ["adapter"]),
    ({"adapter": "folder", "r": 4}, ["r:", "adapter"]),
    ({"adapter": "nowhere"}, ["adapter", "nowhere"]),
]

NAMES = ["a/b", "../b", "a\\b", "..", "what?", " ", "ends ", "x" * 300]

ROWS_REFUSED = [  # the model's sizes are read, for the tokenizer, and no weight is
    ({"data": "empty.jsonl"}, ["empty.jsonl", "no rows"]),
    ({"data": "blank.jsonl"}, ["blank.jsonl", "no rows"]),
    ({"data": "object.json"}, ["object.json", "one JSON object", "array of rows"]),
    ({"data": "notes.log"}, ["notes.log", "format='jsonl'"]),
    ({"data": "pairs.csv"}, ["pairs.csv line 2", "'q', 'a'", "fields"]),
    ({"data": "latin.jsonl"}, ["latin.jsonl line 1", "UTF-8"]),
    ({"data": "utf16.jsonl"}, ["utf16.jsonl line 1", "UTF-8"]),
    ({"data": "nul.jsonl"}, ["nul.jsonl line 1", "JSON"]),
    ({"data": "zeros.jsonl"}, ["zeros.jsonl line 1", "JSON"]),
    ({"data": "half.jsonl"}, ["half.jsonl line 1", "half a character"]),
    ({"data": "deep.jsonl"}, ["deep.jsonl line 1", "nested"]),
    ({"data": "digits.jsonl"}, ["digits.jsonl line 1", "number too long"]),
    ({"data": "no_text.jsonl"}, ["no_text.jsonl line 2", "'txt'", "'text'"]),
    ({"data": "null.jsonl"}, ["null.jsonl line 1", "'text'", "null"]),
    ({"data": "number.jsonl"}, ["number.jsonl line 1", "'text'", "int"]),
    ({"data": "shapes.jsonl"}, ["shapes.jsonl line 2", "one shape"]),
    ({"data": "long.jsonl", "ctx_len": 64}, ["long.jsonl line 2", "5,001 tokens", "ctx_len=64", "long='cut'"]),
    ({"data": "idle.jsonl"}, ["idle.jsonl line 2", "no token to train", "untrained='drop'"]),
    ({"data": "row.jsonl"}, ["row.jsonl line 2", "isn't JSON"]),
    ({"data": "answer.jsonl"}, ["answer.jsonl line 2", "'completion'", "empty"]),
    ({"data": "names.jsonl"}, ["names.jsonl line 1", "'prmpt'", "'completon'", "sft_field"]),
    ({"data": "wide.jsonl"}, ["wide.jsonl line 1", "half a character"]),
    ({"data": "lone"}, ["lone.idx", "missing"]), ({"data": "lone.bin"}, ["lone.idx", "missing"]), ({"data": "lone2.idx"}, ["lone2.bin", "missing"]),
    ({"data": "cut"}, ["cut.bin", "2 bytes"]), ({"data": "code"}, ["code.idx", "99"]), ({"data": "stump.bin"}, ["stump.idx"]),
    ({"data": "all_idle.jsonl"}, ["no row of the 2", "token to train"]),
    ({"data": "all_idle.jsonl", "untrained": "drop"}, ["no row of the 2", "token to train"]),
    ({"data": "rows.jsonl", "eval_data": "empty.jsonl"}, ["empty.jsonl", "no rows"]),
]

MODELS = [
    ("nowhere.pth", ["nowhere.pth"]), ("rwkv7-tinny", ["rwkv7-tinny", "rwkv7-tiny"]), ("folder", ["folder", ".pth"]), ("~/nowhere.pth", ["nowhere.pth"]), ("hf://BlinkDL", ["hf://owner/repo/file"]),
    ("hf.pth", ["hf.pth", "Hugging Face", "official names"]), ("fla.pth", ["fla.pth", "Hugging Face", "official names"]), ("v4.pth", ["v4.pth", "RWKV-4"]), ("v6.pth", ["v6.pth", "RWKV-6"]),
    ("short.pth", ["short.pth", "cut short"]), ("head.pth", ["head.pth"]), ("void.pth", ["void.pth"]), ("page.pth", ["page.pth", "no checkpoint"]), ("short.safetensors", ["short.safetensors", "cut short"]),
    ("code.pth", ["code.pth", "could run code"]), ("old_code.pth", ["old_code.pth", "could run code"]), ("lora.pth", ["lora.pth", "adapter"]), ("state.pth", ["state.pth", "tuned state"]),
    ("list.pth", ["list.pth", "list"]), ("nested.pth", ["nested.pth", "'model'"]), ("lacks.pth", ["lacks.pth", "ln_x", "missing"]), ("more.pth", ["more.pth", "blocks.0.att.qq"]), ("int.pth", ["int.pth", "int8"]),
    ("words.pth", ["vocabulary", "1000"]),
]

METHODS = [  # known once the model is there
    ({"targets": ["att.recptance"]}, ["targets", "'att.receptance'"]),
    ({"targets": []}, ["targets", "empty"]),
    ({"train_parts": ["lm"]}, ["train_parts", "'lm'", "'ln'"]),
    ({"r": 10 ** 9}, ["rank", "smaller side"]),
    ({"peft": "pissa", "r": 10 ** 9}, ["PiSSA", "smaller side"]),
    ({"peft": "dora", "r": 10 ** 9}, ["DoRA", "smaller side"]),
    ({"peft": "miss", "r": 10 ** 9}, ["MiSS", "input width"]),
    ({"peft": "bone", "r": 7}, ["Bone r=7", "divide"]),
    ({"ranks": {"kex": 2}}, ["ranks", "'key'"]),
    ({"ranks": {"key": "2"}}, ["ranks", "'2'"]),
    ({"peft": {"method": "lisa", "layers": 10 ** 9}, "r": None}, ["LISA", "layers"]),
    ({"peft": {"method": "lora", "rnk": 4}, "r": None}, ["peft", "'rnk'"]),
    ({"peft": {"method": "lora", "r": "4"}, "r": None}, ["r='4'"]),
    ({"adapter": "folder", "r": None}, ["folder", "no adapter"]),
    ({"peft": "state", "state": "small.pth", "r": None}, ["small.pth", "no state file"]),
    ({"peft": "state", "state": "state.pth", "r": None}, ["state.pth", "1 layers"]),
]

KINDS = {"settings": SETTINGS, "rows": ROWS_REFUSED, "model": [({"model": name}, said) for name, said in MODELS], "method": METHODS}
CASES = [pytest.param(kind, *(case.values if hasattr(case, "values") else case), marks=getattr(case, "marks", ()),
                      id=" ".join(f"{k}={str(v)[:20]}" for k, v in (case.values if hasattr(case, "values") else case)[0].items())) for kind, cases in KINDS.items() for case in cases]


@pytest.fixture
def at_desk(desk, monkeypatch):
    "In the folder of bad files; it must be found as it was left."
    monkeypatch.chdir(desk)
    before = contents(desk)
    yield desk
    assert contents(desk) == before and not (desk / "runs").exists() and not (desk / "MARK").exists()


def forbid(monkeypatch, kind):
    "What must not happen before a refusal of this kind does."
    def never(what): return lambda *a, **k: pytest.fail(f"{what} before the refusal")
    if kind == "settings": monkeypatch.setattr(loop, "read", never("the checkpoint was opened"))
    if kind != "method": monkeypatch.setattr(loop, "load", never("the model was loaded"))


def whole(settings): return {k: v for k, v in {"model": "small.pth", "data": "rows.jsonl", **FAST, **settings}.items() if v is not None}


@pytest.mark.parametrize("kind, settings, said", CASES)
def test_a_cell_refuses_in_one_line(ipython, at_desk, monkeypatch, kind, settings, said):
    forbid(monkeypatch, kind)
    told = refused_in_cell(ipython, whole(settings))
    assert all(piece in told for piece in said), told
    wrong = [name for name in settings if told.startswith(f"body line {list(whole(settings)).index(name) + 1}:")] if kind == "settings" and set(settings) <= set(whole(settings)) else settings
    assert wrong, f"it does not say the line: {told}"


@pytest.mark.parametrize("kind, settings, said", CASES)
def test_a_shell_refuses_in_one_line(capsys, at_desk, monkeypatch, kind, settings, said):
    forbid(monkeypatch, kind)
    words = pairs(whole(settings))
    if settings.get("r") == "16": words = [w.replace("r=16", 'r="16"') for w in words]
    for verb in ("tune", "plan"):
        told = refused_in_shell(capsys, verb, *words, "name=tried")
        assert all(piece in told for piece in said), told


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_folders_name(ipython, capsys, at_desk, monkeypatch, name):
    forbid(monkeypatch, "settings")
    for told in (refused_in_cell(ipython, whole({}), line=f"'{name}'"), refused_in_shell(capsys, "tune", *pairs(whole({})), f"name={name}")):
        assert "name: " in told and len(told) < 300


def test_a_folder_that_takes_no_files(ipython, capsys, at_desk, monkeypatch):
    "As the system tells it; a test that runs as root could write everywhere."
    forbid(monkeypatch, "settings")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **k: Path(path).resolve() != at_desk.resolve() and access(path, mode, **k))
    for told in (refused_in_cell(ipython, whole({})), refused_in_shell(capsys, "tune", *pairs(whole({})))): assert "output: nothing may be written" in told


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nobody can make one")
def test_a_folder_that_can_not_be_made(ipython, capsys, at_desk):
    for told in (refused_in_cell(ipython, whole({"output": "/proc/nowhere"})), refused_in_shell(capsys, "tune", *pairs(whole({"output": "/proc/nowhere"})))):
        assert "output: '/proc/nowhere" in told and "choose another" in told


def test_the_trap_would_have_caught_something(desk):
    "The files with code do make the mark where code is run, so that its absence above says something."
    for name in ("code.pth", "old_code.pth"):
        try: torch.load(desk / name, weights_only=False)
        except Exception: pass
        assert (desk / "MARK").exists()
        (desk / "MARK").unlink()


# ---------------------------------------------------------------- what only a cell can be given

@pytest.mark.parametrize("given, said", [
    ("[]", ["the list has no rows"]),
    ("[{'text': 'a'}, {'txt': 'b'}]", ["row 1", "'txt'"]),
    ("[{'text': 'a'}, {'text': '  '}]", ["row 1", "empty"]),
    ("['a', 7]", ["row 1", "int"]),
    ("(r for r in [])", ["generator", "no rows", "once"]),
    ("map(len, rows)", ["row 0", "int"]),
    ("iter(['a', 7])", ["row 1", "int"]),
    ("open('rows.jsonl')", ["open file", "path"]),
    ("{'text': 'a'}", ["body line 5: data"]),
    ("set(['a'])", ["set", "no order", "list"]),
    ("b'text'", ["body line 5: data"]),
    ("7", ["body line 5: data"]),
    ("None", ["data: is missing"]),
    ("rows.__len__", ["body line 5: data"]),
    ("my_rowz", ["body line 5", "NameError", "my_rowz"]),
])
def test_rows_in_a_cell(ipython, at_desk, monkeypatch, given, said):
    forbid(monkeypatch, "rows")
    told = refused_in_cell(ipython, body({"model": "small.pth", **{k: FAST[k] for k in ("max_steps", "accumulate", "eval_steps")}}) + f"data = {given}", rows=ROWS)
    assert all(piece in told for piece in said), told


@pytest.mark.parametrize("line, said", [
    ("model = RWKV", ["body line 1: model: expected", "RWKV"]),
    ("model = torch.nn.Linear(2, 2)", ["body line 1: model: expected", "Linear"]),
    ("peft = LoRA", ["peft", "LoRA(r=8)"]),
    ("peft = LoRA(r=0)", ["LoRA: r=0"]),
    ("peft = LoRA(r='8')", ["LoRA: r='8'"]),
    ("peft = LoRA(alpha=float('nan'))", ["LoRA: alpha=nan"]),
    ("peft = LoRA(dropout='x')", ["LoRA: dropout='x'"]),
    ("peft = [LoRA(r=2), LoRA(r=4)]", ["peft: ", "'lora'", "choose one of them"]),
    ("peft = StateTuning(init=7)", ["StateTuning: init=7"]),
    ("peft = StateTuning('nowhere.pth'); lr_init = 1.0", ["nowhere.pth"]),
    ("peft = LoRA(r=2), 3", ["peft", "3"]),
    ("lr_init = float('nan')", ["body line 1: lr_init", "finite"]),
    ("r = True", ["body line 1: r", "True"]),
    ("template = lambda turns: turns[2]['content']", ["rows.jsonl line 1", "template", "IndexError"]),
    ("template = lambda turns: 'text'", ["rows.jsonl line 1", "template must return"]),
    ("template = lambda: []", ["rows.jsonl line 1", "template", "TypeError"]),
    ("template = 'chatml'", ["'chatml'", "rwkv"]),
])
def test_objects_in_a_cell(ipython, at_desk, line, said):
    names = dict(RWKV=RWKV, torch=torch, LoRA=rwkv_peft.LoRA, StateTuning=rwkv_peft.StateTuning)
    told = refused_in_cell(ipython, f"{line}\n" + body({k: v for k, v in {"model": "small.pth", "data": "rows.jsonl", "max_steps": 1}.items() if not line.startswith(k)}), **names)
    assert all(piece in told for piece in said), told


@pytest.mark.parametrize("text, said", [
    ("%%rwkv_finetune r=8\nmodel = 'small.pth'", ["'r=8' is a setting", "lines below"]),
    ("%%rwkv_finetune a b\nmodel = 'small.pth'", ["one name"]),
    ("%%rwkv_finetune x --dryrun\nmodel = 'small.pth'", ["'--dryrun'", "did you mean '--dry-run'? (the flags are"]),
    ("%%rwkv_finetune x\nmodel = await small", ["body line 1", "SyntaxError"]),
    ("%%rwkv_finetune x\nmodel = (yield)", ["body line 1", "SyntaxError"]),
    ("%%rwkv_finetune x\nmodel = *'ab'", ["body line 1", "SyntaxError"]),
    ("%%rwkv_finetune x\nmodel = 'small.pth'\n!ls", ["body line 2", "name = value"]),
    ("%%rwkv_finetune x\nlr-init = 3", ["body line 1", "name = value"]),
    ("%%rwkv_finetune x\nmodel = '\x00'", ["body line 1", "null"]),
    ("%%rwkv_finetune x\n    model = 'small.pth'\n    data = []", ["the list has no rows"]),      # indented as a whole is no error, as in any cell
    ("%%rwkv_finetune x\nmodel = 'small.pth'\n  data = []", ["body line 2", "indent"]),
    ("%rwkv_finetune x", ["model: is missing"]),
    ("%rwkv_finetune --resume", ["resume: which run"]),
])
def test_cells_that_are_no_settings(ipython, at_desk, monkeypatch, text, said):
    forbid(monkeypatch, "rows")
    captured, error = cell(ipython, text)
    assert type(error) is UsageError and "\n" not in str(error) and all(piece in str(error) for piece in said), error


@pytest.mark.parametrize("name, content, said", [
    ("adapter_config.json", b"", "json"), ("adapter_config.json", b"{}", "None"), ("adapter_config.json", b"[]", "list"), ("adapter_config.json", b"\xff", "json"),
    ("adapter_config.json", b'{"peft_type": "LORA", "r": "x"}', "r='x'"), ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": null}', "lora_alpha=None"),
    ("adapter_config.json", b'{"peft_type": "LORA", "lora_dropout": "x"}', "lora_dropout='x'"), ("adapter_config.json", None, "only one of"),
    ("rwkv_peft.json", b'{"base": 5}', "base"), ("rwkv_peft.json", b"[1", "json"), ("adapter_model.safetensors", b"x" * 99, "safetensors"), ("state.pth", b"x", "state.pth"),
])
def test_adapter_folders_that_are_not_whole(ipython, capsys, desk, done, tmp_path, name, content, said):
    shutil.copytree(done / "mine/adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink(missing_ok=True)
    if content is not None: (tmp_path / "adapter" / name).write_bytes(content)
    settings = whole({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "r": None, "adapter": str(tmp_path / "adapter"), "output": str(tmp_path / "runs")})
    assert said in refused_in_cell(ipython, settings) and said in refused_in_shell(capsys, "generate", "nowhere.pth", "--prompt", "x", "--adapter", tmp_path / "adapter")
    assert not (tmp_path / "runs").exists()


def test_methods_on_what_is_no_model():
    for model in ("rwkv7-tiny", None, torch.nn.Linear(2, 2), RWKV):
        with pytest.raises(rwkv_peft.peft.lora.MethodError, match="a loaded RWKV is needed"): rwkv_peft.attach(model, rwkv_peft.LoRA())


# ---------------------------------------------------------------- odd, and good

ODD = {"bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS).encode(), "windows.jsonl": lines(ROWS).replace("\n", "\r\n").encode(), "no_last_line_end.jsonl": lines(ROWS).encode().rstrip(), "naïve 名前.jsonl": lines(ROWS).encode()}


@pytest.mark.parametrize("name", ODD)
def test_files_of_other_editors_are_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(ODD[name])
    assert read_data(tmp_path / name, Bytes()).fingerprint() == read_data(ROWS, Bytes()).fingerprint()


def test_rows_that_are_left_out_are_told(desk, tmp_path):
    run = rwkv_peft.finetune(model=str(desk / "small.pth"), data=str(desk / "row.jsonl"), bad="drop", output=str(tmp_path), name="rest", **FAST)
    said = [e["message"] for e in run.steps() if e["event"] == "warning"]
    assert any("1 rows that can't be used were left out: 2" in word for word in said) and len(run.data) == 1


def test_odd_but_plausible_cells_train(ipython, desk, tmp_path, monkeypatch):
    "numpy's numbers and arrays, Windows line ends, a name in another script, rows read in the cell, a row with a NUL in it."
    monkeypatch.chdir(tmp_path)
    rows = np.array([r["prompt"] + r["completion"] for r in ROWS] + ["a\0b"])
    text = "%%rwkv_finetune 名前\r\nmodel = small\r\nr = np.int64(2); lr_init = np.float32(1e-3)\r\nmax_steps = np.int32(1); accumulate = 1\r\ndata = list(rows)\r\n"
    captured, error = cell(ipython, text, np=np, rows=rows, small=str(desk / "small.pth"))
    assert error is None, error
    assert read_events(tmp_path / "runs/名前/events.jsonl")[-1]["event"] == "done" and ipython.user_ns["名前"] is ipython.user_ns["run"]
    assert rwkv_peft.LoRA(r=np.int64(4), alpha=np.float32(8)) == rwkv_peft.LoRA(r=4, alpha=8.0)


@pytest.mark.parametrize("write", [lambda t: b"\xef\xbb\xbf" + t.encode(), lambda t: t.replace("\n", "\r\n").encode()], ids=["BOM", "CRLF"])
def test_settings_files_of_other_editors(capsys, desk, tmp_path, monkeypatch, write):
    monkeypatch.chdir(desk)
    (tmp_path / "my.toml").write_bytes(write('model = "small.pth"\ndata = "rows.jsonl"\nname = "other"\nmax_steps = 7\n'))
    code, out, err = command(capsys, "plan", tmp_path / "my.toml")
    assert code == 0 and "steps: 7\n" in out, err


@pytest.mark.parametrize("content, said", [
    ('output = "é"\n'.encode("latin-1"), ["UTF-8"]), (b"\0\1", ["TOML"]), (b'model = "small.pth"\npeft = lora\n', ["TOML", "line 2"]), (b'name = "a"\nname = "b"\n', ["TOML", "line 2"]),
    (b'model = "small.pth"\ndata = "rows.jsonl"\n[train]\nlr = 3\n', ["line 3", "train"]), (b'model = "small.pth"\ndata = "rows.jsonl"\nlr_init = inf\n', ["line 3", "lr_init", "finite"]),
    (b'model = "small.pth"\ndata = "rows.jsonl"\noutput = 2026-01-01\n', ["line 3", "output"]), (b"", ["model", "missing"]),
])
def test_settings_files_that_can_not_be_used(capsys, at_desk, tmp_path, monkeypatch, content, said):
    forbid(monkeypatch, "settings")
    (tmp_path / "my.toml").write_bytes(content)
    told = refused_in_shell(capsys, "tune", tmp_path / "my.toml")
    assert "my.toml" in told and all(piece in told for piece in said), told


# ---------------------------------------------------------------- nothing is lost

@pytest.fixture(scope="module")
def done(ipython, desk, tmp_path_factory):
    "A finished run, made by a cell."
    place = tmp_path_factory.mktemp("done")
    captured, error = cell(ipython, "%%rwkv_finetune mine\n" + body(whole({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "output": str(place)})))
    assert error is None
    return place


def test_a_finished_run_stays_as_it_is(ipython, capsys, desk, done):
    "Its name taken again, a resume with something else, and a resume of a run that never was."
    before = contents(done)
    again = whole({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "output": str(done)})
    assert "holds a run already" in refused_in_cell(ipython, again, line="mine")
    assert "holds a run already" in refused_in_shell(capsys, "tune", *pairs(again), "name=mine")
    for change, said in [({"r": 8}, "r: "), ({"lr_schedule": "linear"}, "lr_schedule: "), ({"model": "rwkv7-tiny"}, "not the base"), ({"data": str(desk / "long.jsonl")}, "not the rows")]:
        told = refused_in_cell(ipython, {"output": str(done), **change}, line="mine --resume")
        assert said in told, told
        code, out, err = command(capsys, "tune", "name=mine", "resume=true", f"output={done}", *pairs(change))
        assert code == 2 and said in err and err.count("\n") == 1
    assert "no run to resume" in refused_in_cell(ipython, {"output": str(done)}, line="never --resume")
    assert "no run to resume" in refused_in_shell(capsys, "tune", "name=never", "resume=true", f"output={done}")
    assert contents(done) == before and not (done / "never").exists()


def test_resuming_a_finished_run_changes_no_result(ipython, done):
    results = {name: print for name, print in contents(done / "mine").items() if name.startswith(("adapter/", "checkpoints/", "data/", "config"))}
    captured, error = cell(ipython, f"%%rwkv_finetune mine --resume\noutput = {str(done)!r}")
    assert error is None and "done, step 2 of 2" in captured.stdout
    assert results.items() <= contents(done / "mine").items()


def test_a_resume_that_lengthens_a_run_is_remembered(ipython, capsys, done, tmp_path):
    shutil.copytree(done / "mine", tmp_path / "mine")
    code, out, err = command(capsys, "tune", "name=mine", "resume=true", "max_steps=3", f"output={tmp_path}")
    assert code == 0 and "done, step 3 of 3" in out, err
    code, out, err = command(capsys, "tune", "name=mine", "resume=true", f"output={tmp_path}")
    assert code == 0 and "done, step 3 of 3" in out, out + err


def test_an_adapter_to_start_from_says_what_is_trained(ipython, desk, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captured, error = cell(ipython, "%%rwkv_finetune on\n" + body(whole({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "adapter": str(done / "mine/adapter"), "r": None, "max_steps": 1})))
    assert error is None
    run = ipython.user_ns["on"]
    assert run.plan()["methods"] == ["LoRA"] and run.methods[0].r == 2 and run.report()["before"]["loss"] == ipython.user_ns["mine"].report()["after"]["loss"]


def test_dry_run_and_plan_leave_nothing(ipython, capsys, at_desk):
    captured, error = cell(ipython, "%%rwkv_finetune tried --dry-run\n" + body(whole({})))
    assert error is None and "<table" in captured.outputs[0].data["text/html"]
    code, out, err = command(capsys, "plan", *pairs(whole({})), "name=tried")
    assert code == 0 and "steps: 2\n" in out


def broken(good: Path, path: Path) -> Path:
    "The model with a hole in it: a row with the character DEL makes the loss infinite, and no other row does."
    tensors = torch.load(good, weights_only=True)
    tensors["emb.weight"][1 + 0x7f] = float("nan")
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("way", ["cell", "shell"])
def test_a_loss_that_is_not_finite_stops_at_that_step(ipython, capsys, desk, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    model = broken(desk / "small.pth", tmp_path / "hole.pth")
    (tmp_path / "rows.jsonl").write_text(lines(ROWS[:4] + [{"prompt": "<b>here</b>\x7f", "completion": " x"}] + ROWS[4:]))
    settings = {**FAST, "model": str(model), "data": "rows.jsonl", "eval_split": 0.0, "save_steps": 1, "max_steps": 13, "eval_steps": 99, "seed": 1}
    if way == "cell": told = refused_in_cell(ipython, settings, line="hole")
    else:
        code, out, told = command(capsys, "tune", *pairs(settings), "name=hole")
        assert code == 2 and told.count("\n") == 1
    run = tmp_path / "runs/hole"
    events = read_events(run / "events.jsonl")
    last = [e for e in events if e["event"] == "step"][-1]["step"]
    assert 1 <= last < 13 and f"step {last + 1}: the loss is nan because of rows.jsonl line 5, which begins" in told and "<b>here</b>" in told
    assert events[-1]["event"] == "error" and events[-1]["rows"] == [4] and events[-1]["where"] == ["rows.jsonl line 5"] and "<b>here</b>" in events[-1]["text"][0]
    assert f"step-{last} is kept" in told and checkpoints(run)[-1] == last
    tensors, training = load_checkpoint(run)
    assert training["step"] == last and all(torch.isfinite(t).all() for t in tensors.values())
    if way == "cell": assert all(torch.isfinite(p).all() and torch.equal(p, tensors[n]) for n, p in ipython.user_ns["run"].trained.items())


def test_a_base_that_is_not_finite_is_named_before_any_step(capsys, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = torch.load(desk / "small.pth", weights_only=True)
    torch.save({**tensors, "head.weight": torch.full((257, 32), float("nan"))}, "nan.pth")
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    code, out, err = command(capsys, "tune", *pairs(whole({"model": "nan.pth"})), "name=x")
    assert code == 2 and err.count("\n") == 1 and "before any step" in err and "nan.pth" in err and "lr_init" not in err, err
    code, out, err = command(capsys, "generate", "nan.pth", "--prompt", "x")
    assert code == 2 and "not finite" in err and "Traceback" not in err, err


@pytest.mark.parametrize("way", ["cell", "shell"])
def test_a_full_disk_leaves_the_older_checkpoint(ipython, capsys, desk, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    write, written = folder_module.write_safetensors, []

    def full(tensors, path, *rest):
        written.append(path)
        if len(written) < 3: return write(tensors, path, *rest)
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module, "write_safetensors", full)
    settings = whole({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "max_steps": 4})
    if way == "cell": told = refused_in_cell(ipython, settings, line="full")
    else:
        code, out, told = command(capsys, "tune", *pairs(settings), "name=full")
        assert code == 2 and told.count("\n") == 1
    run = tmp_path / "runs/full"
    assert "step-2 could not be written" in told and "No space left" in told and "make room" in told
    assert checkpoints(run) == [0, 1] and not [p for p in run.rglob("*") if ".part" in p.name]
    assert load_checkpoint(run)[1]["step"] == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, "tune", "name=full", "resume=true")
    assert code == 0 and "done, step 4 of 4" in out, err


def test_a_system_that_takes_no_more_is_told_in_one_line(desk, tmp_path):
    "A real limit, in a process of its own: what was there stays, to the byte."
    words = pairs(whole({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "max_steps": 1, "peft": "none", "r": None, "lr_init": 1e-3}))
    start = "import resource, sys; from rwkv_peft.cli import main; n = int(sys.argv[1]); n and resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); main(sys.argv[2:])"
    def run(limit, *words): return subprocess.run([sys.executable, "-c", start, str(limit), "tune", *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run(0, *words, "name=big").returncode == 0
    folder, before = tmp_path / "runs/big", contents(tmp_path / "runs/big/checkpoints")
    limit = (folder / "checkpoints/step-1/training.pth").stat().st_size - 3000
    ran = run(limit, "name=big", "resume=true", "max_steps=3")
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "step-2 could not be written" in ran.stderr and "make room" in ran.stderr, ran.stdout + ran.stderr
    assert contents(folder / "checkpoints") == before and load_file(folder / "checkpoints/step-1/trained.safetensors")


# ---------------------------------------------------------------- markup is text

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)></pre></table><!-- \"'&amp; `"


def is_text(html, shown=EVIL):
    "Nothing of the evil text became markup, and it's there to be read."
    seen = Markup(html)
    ours = all(source.startswith("data:image/png;base64,") for source in seen.values("src"))      # a curve at the end of its run
    return ours and not {"script", "<!--"} & set(seen.tags) and not any(name.startswith("on") for name, _ in seen.attributes) and (not shown or shown in seen.text)


def test_markup_in_rows_prompts_and_names_stays_text(ipython, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(magic, "view_for", lambda shell: magic.LiveCard())
    monkeypatch.setattr(loop, "generate", lambda model, prompt, **k: iter([f"said {EVIL}"]))
    name = "<script>alert(3)<" + "\u2215script>.pth"            # a file may be called like this; a run may not
    (tmp_path / name).write_bytes((desk / "small.pth").read_bytes())
    rows = [{**r, "completion": r["completion"] + EVIL, "<script>key</script>": 1} for r in ROWS]
    captured, error = cell(ipython, "%%rwkv_finetune evil\n" + body({**FAST, "model": name, "sample_prompts": [f"asked {EVIL}"]}) + "data = evil_rows", evil_rows=rows)
    assert error is None, error
    cards = [o.data["text/html"] for o in captured.outputs if "text/html" in o.data]
    assert all(is_text(html, "") for html in cards) and any(f"said {EVIL}" in Markup(html).text and f"asked {EVIL}" in Markup(html).text for html in cards)
    run = ipython.user_ns["evil"]
    assert is_text((tmp_path / "runs/evil/report.html").read_text(encoding="utf-8"), f"said {EVIL}") and is_text(report(run.folder), f"asked {EVIL}")
    assert is_text(plan_card(EVIL, run.plan())) and name in Markup(plan_card("x", run.plan())).text
    data = read_data(rows, Bytes())
    assert is_text(data.show(0)._repr_html_(), None) and EVIL in "".join(Markup(data.show(0)._repr_html_()).text.split("▸")[0:]).replace("\n", "")
    assert is_text(data.report()._repr_html_(), "<script>key</script>") and is_text(data.check()._repr_html_(), None)


def test_markup_in_an_error_stays_text(ipython, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(magic, "view_for", lambda shell: magic.LiveCard())
    model, views = broken(desk / "small.pth", tmp_path / "hole.pth"), []
    rows = ROWS[:4] + [{"prompt": EVIL[:60] + "\x7f", "completion": " x"}] + ROWS[4:]
    captured, error = cell(ipython, "%%rwkv_finetune hole\n" + body({**FAST, "model": str(model), "eval_split": 0.0, "max_steps": 13, "seed": 1}) + "data = evil_rows", evil_rows=rows)
    assert type(error) is UsageError and EVIL[:40] in str(error)
    cards = [o.data["text/html"] for o in captured.outputs if "text/html" in o.data]
    assert all(is_text(html, "") for html in cards) and is_text(cards[-1] if "row 4" in cards[-1] else next(c for c in reversed(cards) if "row 4" in c), EVIL[:40])
    assert is_text((tmp_path / "runs/hole/report.html").read_text(encoding="utf-8"), EVIL[:40])


# ---------------------------------------------------------------- generate and demo

@pytest.mark.parametrize("words, said", [
    (["nowhere.pth", "--prompt", ""], ["prompt is empty"]),
    (["nowhere.pth", "--prompt", "\udcff"], ["prompt", "no text"]),
    (["small.pth"], ["--prompt"]),
    (["nowhere.pth", "--prompt", "x", "--adapter", "nowhere"], ["--adapter", "nowhere"]),
    (["nowhere.pth", "--prompt", "x", "--adapter", "folder"], ["folder", "no adapter"]),
    (["nowhere.pth", "--prompt", "x", "--state", "nowhere"], ["--state", "nowhere"]),
    (["nowhere.pth", "--prompt", "x", "--state", "small.pth"], ["small.pth", "no state file"]),
    (["nowhere.pth", "--prompt", "x", "--state", "code.pth"], ["code.pth", "could run code"]),
    (["nowhere.pth", "--prompt", "x", "--seed", "-1"], ["--seed"]),
    (["nowhere.pth", "--prompt", "x", "--seed", str(2 ** 32)], ["--seed"]),
    (["nowhere.pth", "--prompt", "x", "--top-p", "3"], ["--top-p"]),
    (["nowhere.pth", "--prompt", "x", "--max-tokens", "0"], ["--max-tokens"]),
    *[([name, "--prompt", "x"], said) for name, said in MODELS if name != "words.pth"],
], ids=lambda v: " ".join(v)[:60].encode("ascii", "replace").decode() if v and isinstance(v[0], str) else "")
def test_generate_refuses_before_the_model_is_read(capsys, at_desk, words, said):
    told = refused_in_shell(capsys, "generate", *words)
    assert all(piece in told for piece in said), told


def test_generate_takes_an_adapter_and_a_state_together(capsys, desk, done, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save({f"blocks.{i}.att.time_state": torch.randn(2, 16, 16) * 9 for i in range(2)}, tmp_path / "s.pth")
    shutil.copytree(done / "mine/adapter", tmp_path / "strong")
    learnt = load_file(tmp_path / "strong/adapter_model.safetensors")
    save_file({name: x * 60 if "lora_B" in name else x for name, x in learnt.items()}, tmp_path / "strong/adapter_model.safetensors", {"format": "pt"})
    state, adapter = ["--state", tmp_path / "s.pth"], ["--adapter", tmp_path / "strong"]
    said = [command(capsys, "generate", desk / "small.pth", "--prompt", "1 + 1 =", "--temperature", "0", "--max-tokens", "30", *more)[:2] for more in ([], adapter, state + adapter)]
    assert all(code == 0 for code, _ in said) and len({text for _, text in said}) == 3      # without the adapter a new model's zero output matrices hide the state


def test_demo_refuses_before_it_says_anything(capsys, at_desk):
    assert "nowhere.jsonl" in refused_in_shell(capsys, "demo", "--data", "nowhere.jsonl", "--output", "dd")
    assert "folder" in refused_in_shell(capsys, "demo", "--data", "folder", "--output", "dd")
    assert "small.pth" in refused_in_shell(capsys, "demo", "--output", "small.pth")
    assert not (at_desk / "dd").exists()


def test_a_terminal_with_another_alphabet(desk, tmp_path):
    "A Windows console or LC_ALL=C can't show an arrow or a Chinese name; the run must not end for that."
    words = pairs({"model": str(desk / "small.pth"), "data": str(desk / "rows.jsonl"), "max_steps": 1, "name": "名"})
    ran = subprocess.run([sys.executable, "-c", "from rwkv_peft.cli import main; main()", "tune", *words], cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0 and b"done, step 1 of 1" in ran.stdout and not ran.stderr, ran.stderr
