"What an error card says: over errors that PyTorch, the system and this project raise themselves, wherever they can be raised here."
import ast
import errno

import pytest
import torch
from hypothesis import given, settings, strategies as st

from markup import Markup
from rwkv_peft import Config, finetune, read_data
from rwkv_peft.data.rows import DataError
from rwkv_peft.look.errors import error_card, explain
from rwkv_peft.model.checkpoint import load
from rwkv_peft.model.tokenizer import Bytes, tokenizer_for
from rwkv_peft.peft.adapters import AdapterError
from rwkv_peft.train.config import ConfigError, settings_table
from rwkv_peft.train.folder import write_whole
from rwkv_peft.train.launch import RankError
from rwkv_peft.train.loop import TrainingError


def raised(call, *args, **kwargs) -> Exception:
    with pytest.raises(Exception) as found: call(*args, **kwargs)
    return found.value


def from_error(outer, inner):
    try: raise outer from inner
    except Exception as e: return e


def full_disk(path):
    def fill(draft): raise OSError(errno.ENOSPC, "No space left on device")
    return raised(write_whole, path / "x", fill)


def config(**given): return raised(Config, **{"model": "rwkv7-tiny", "data": ["a text"], **given})


def made(tmp):
    "(error, kind of the explanation, the settings that it should name first)"
    row, short = {"question": "a", "answer": "b"}, tmp / "short.safetensors"
    short.write_bytes(b"\x00" * 20)
    yield torch.OutOfMemoryError("any words"), "out of memory on the GPU", "micro_bsz"
    yield RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"), "out of memory on the GPU", "micro_bsz"
    yield MemoryError(), "out of memory", "micro_bsz"
    yield OSError(errno.ENOMEM, "x"), "out of memory", "micro_bsz"
    yield raised(torch.empty, 2 ** 50), "out of memory", "micro_bsz"                 # PyTorch's own words
    yield RankError("rank 1 was killed by SIGKILL; the system does that when memory runs out"), "out of memory", "micro_bsz"
    yield full_disk(tmp), "the disk is full", "keep"
    yield TrainingError(str(full_disk(tmp))), "the disk is full", "keep"             # as the loop hands it on
    yield from_error(RuntimeError("the checkpoint"), OSError(errno.ENOSPC, "?")), "the disk is full", "keep"
    yield OSError(errno.EROFS, "Read-only file system", "/output"), "the system doesn't allow it", "output"
    yield TrainingError("step 2: the loss is nan for every row, so the step before went too far; start again with a lower lr_init than 0.5"), "a number is not finite", "lr_init"
    yield TrainingError("step 7: the loss is 2.000, but its gradient is inf for every row"), "a number is not finite", "lr_init"
    yield TrainingError("step 7: the loss is nan because of line 12, which begins 'x'; look at that row"), "a number is not finite", "data"
    yield TrainingError("step 1: the loss is inf, before any step: m.pth holds weights that are not finite, or too large for float16; try precision='fp32'"), None, "precision"
    if not torch.cuda.is_available():
        yield config(device="cuda"), "there is no CUDA here", "device"
        yield raised(torch.zeros(1).to, "cuda"), "there is no CUDA here", "device"       # PyTorch's own words
        yield config(precision="fp16"), "this device doesn't compute in that type", "precision"
    yield RuntimeError('"addmm_impl_cpu_" not implemented for \'Half\''), "this device doesn't compute in that type", "precision"
    yield raised(tokenizer_for, 50_000), "tokenizer and model don't fit", "data"
    yield raised(torch.nn.Embedding(9, 2), torch.tensor([9])), "tokenizer and model don't fit", "data"
    yield raised(load("rwkv7-tiny"), torch.tensor([[60_000]])), "tokenizer and model don't fit", "data"
    yield config(data="nowhere.jsonl"), "a file is missing", "data"
    yield raised(load, "nowhere.pth"), "a file is missing", "model"
    yield raised(load, str(short)), "a file is damaged or of another kind", "model"
    yield raised(open, "/nowhere/at/all"), "a file is missing", None
    yield raised(finetune, name="x", output=str(tmp), resume=True), "there is no such run", "resume"
    yield AdapterError("runs/a/adapter was trained on another base model (world.pth, 24 layers): load that, or pass check_base=False"), "the adapter belongs to another base", "model"
    yield ConfigError("strategy: DeepSpeed can't be imported here (no module); use strategy = 'ddp' or 'auto'"), "DeepSpeed can't be used here", "strategy"
    yield ModuleNotFoundError("No module named 'deepspeed'"), "DeepSpeed can't be used here", "strategy"
    yield RankError("the ranks ended with exit code 1: Segmentation fault"), "a process of the run died", "devices"
    yield TrainingError("this run is going already; wait for it, or stop() it first"), "another run is alive", None
    yield ConfigError("name: 'runs/x' holds a run already; choose another name, or pass resume=True to go on with it"), "the name is taken", "name"
    yield config(lr_int=1e-4), "no such setting", "lr_init"
    yield config(optim="adam"), "no such value", "optim"
    yield config(zzzzz=1), "no such setting", None
    yield raised(read_data, [row], Bytes(), fields={"prompt": "q"}), "the rows have other columns", "sft_field"
    yield raised(read_data, ["a long text " * 20], Bytes(), ctx_len=32), "a row is too long", "ctx_len"
    yield raised(read_data, [{"text": 7}], Bytes()), "a row can't be used", "bad"


@pytest.fixture(scope="module")
def cases(tmp_path_factory): return list(made(tmp_path_factory.mktemp("errors")))


def test_each_error_gets_its_card(cases):
    for error, kind, first in cases:
        e = explain(error)
        assert e.what == (str(error) or type(error).__name__)
        assert kind is None or e.kind == kind, (error, e)
        assert (e.changes[0].setting if e.changes else None) == first, (error, e)
        assert len(e.changes) <= 3 and e.cause.endswith(".") and "\n" not in e.cause


def test_an_event_is_explained_as_its_error_is(cases):
    "The file keeps the name of the class and the words; errno is lost, and the words must do."
    for error, kind, first in cases:
        if type(error) is OSError and "No space" not in str(error) or not str(error) or isinstance(error.__cause__, OSError) and "No space" not in str(error): continue
        event = {"event": "error", "step": 1, "message": str(error), "error_type": type(error).__name__}
        assert explain(event).kind == explain(error).kind, error


def test_what_is_proposed_can_be_set(cases):
    "Every value that is a literal is taken by Config for a setting that exists; the others are words for something of the user's."
    names, values = {row["name"] for row in settings_table()}, 0
    for error, _, _ in cases:
        for known in ({}, {"micro_bsz": 8, "chunk_ctx": 256, "grad_cp": False, "lr_init": 1e-3, "grad_clip": 0}, {"micro_bsz": 1, "grad_cp": True, "quant": "int8"}, {"peft": "none"}):
            for c in explain(error, known).changes:
                assert c.setting in names, c
                try: value = ast.literal_eval(c.value)
                except (ValueError, SyntaxError): continue
                if c.setting in ("model", "name", "resume", "data"): continue
                Config(**{"model": "rwkv7-tiny", "data": ["a text"], "peft": "lora", c.setting: value})
                values += 1
    assert values > 50


def test_values_fit_the_run():
    error = torch.OutOfMemoryError("x")
    said = lambda **known: {c.setting: c.value for c in explain(error, known).changes}
    assert said(micro_bsz=8)["micro_bsz"] == "4" and said(micro_bsz=3)["micro_bsz"] == "1" and "micro_bsz" not in said(micro_bsz=1)
    assert said(chunk_ctx=1000)["chunk_ctx"] == "500" and said(grad_cp=False)["grad_cp"] == "True"
    assert "quant" not in said(micro_bsz=1, quant="nf4") and said(micro_bsz=1, peft="none")["peft"] == '"lora"'
    nan = TrainingError("step 2: the loss is nan for every row; start again with a lower lr_init than 1e+30")
    assert explain(nan).changes[0].value == "1e+29" and explain(nan, {"lr_init": .02}).changes[0].value == "0.002"


def test_the_class_decides_before_the_words():
    "Words that sound like another kind, in the error itself or around it."
    assert explain(torch.OutOfMemoryError("No space left on device")).kind == "out of memory on the GPU"
    assert explain(from_error(DataError("line 3 isn't JSON"), None)).kind == "a row can't be used"
    assert explain(from_error(ValueError("could not write"), OSError(errno.ENOSPC, "full"))).kind == "the disk is full"
    hidden = ValueError("no words")
    hidden.__context__, hidden.__suppress_context__ = MemoryError(), True
    assert explain(hidden).kind == "ValueError"
    loop = ValueError("a")
    loop.__cause__ = KeyError("b")
    loop.__cause__.__cause__ = loop                                       # a chain that bites its tail
    assert explain(loop).kind == "ValueError"


def test_an_unknown_error_is_told_as_it_is():
    e = explain(ZeroDivisionError("float division by zero"))
    assert (e.kind, e.what, e.changes) == ("ZeroDivisionError", "float division by zero", ()) and "%rwkv_env" in e.cause
    assert "%rwkv_env" not in explain(ConfigError("epochs and max_steps both say how long the run is; give one of them")).cause
    assert explain({"event": "error"}).what == "error" and explain(KeyError()).what == "KeyError"


EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \x1b[31mred\x1b[0m \u202eright to left \ud800 $x$"


def test_markup_stays_text_and_a_long_line_is_cut():
    event = {"event": "error", "message": EVIL + "x" * 100_000, "error_type": EVIL, "where": [EVIL], "text": [EVIL + "y" * 100_000]}
    html = error_card(explain(event))
    found = Markup(html)
    assert not {"script", "img"} & set(found.tags) and not any(name.startswith("on") for name, _ in found.attributes)
    assert "cut here" in html and len(html) < 10_000 and "\x1b" not in html
    html.encode("utf-8")
    styles = " ".join(found.values("style"))
    assert "color:inherit" in styles and "http" not in html


@given(st.dictionaries(st.sampled_from(["message", "error_type", "where", "text", "step"]), st.none() | st.text(max_size=60) | st.lists(st.text(max_size=20), max_size=3)))
@settings(max_examples=60, deadline=None)
def test_any_event_has_a_card(event): Markup(error_card(explain(event)))


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_words_are_kept(words):
    e = explain(RuntimeError(words))
    assert e.what == (words or "RuntimeError") and isinstance(str(e), str)


def test_advice_names_what_is_there():
    "The row's own columns, and the nearest file or model."
    change = lambda error: explain(error).changes[0]
    assert (change(raised(read_data, [{"question": "a", "answr": "b"}], Bytes())).value) == "['question', 'answr']"
    assert change(ConfigError("model: 'rwkv7-tny' is neither a file nor a bundled model: bundled are rwkv7-tiny; did you mean 'rwkv7-tiny'?")).value == "'rwkv7-tiny'"
    assert explain(ConfigError("lr_int: there is no such setting")).cause == "`%rwkv_finetune --help` lists all settings."
