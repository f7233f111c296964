"The cell magic inside one process: what it reads, what it refuses, what it hands on, what it completes."
import ast
import json
import re
import sys
import threading
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config as Traits

from rwkv_peft import RWKV, RWKVConfig
from rwkv_peft.look.report import report
from rwkv_peft.look.runs import remarks
from rwkv_peft.notebook import magic
from rwkv_peft.notebook.card import TextCard
from rwkv_peft.peft.adapters import detach
from rwkv_peft.train import loop
from rwkv_peft.train.config import Config, ConfigError, settings_table

NAMES = list(Config.model_fields)


class FakeRun:
    "Takes settings as a run does, and plays `steps` events until it is stopped."

    def __init__(self, settings, steps=3, fails=None):
        self.config, self.settings, self.length, self.fails = SimpleNamespace(name=settings.get("name"), model=settings.get("model")), settings, steps, fails
        self.asked, self.begun, self.thread = threading.Event(), threading.Event(), None

    def stop(self): self.asked.set()
    def plan(self):
        return {"methods": ["LoRA"], "parameters": 100, "trained": 10, "rows": 9, "held_out_rows": 3, "rows_per_step": 3, "steps": self.length, "epochs": 1, "lr_init": 1e-4, "time": "unknown", "device": "cpu", "precision": "float32", "memory": None}

    def steps(self):
        self.thread = threading.current_thread()
        yield {"event": "start", "config": {"name": self.settings.get("name") or "dated"}, "plan": {"steps": self.length}, "data": {}, "versions": {}, "folder": f"runs/{self.settings.get('name') or 'dated'}"}
        for step in range(1, self.length + 1):
            self.begun.set()
            if self.fails: raise self.fails
            if self.asked.wait(.001):
                yield {"event": "stopped", "step": step - 1, "message": ""}
                return
            yield {"event": "step", "step": step, "loss": 1.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "seconds": .001, "memory": None, "rows": [0]}
        yield {"event": "done", "step": self.length, "best_step": None, "message": ""}


@pytest.fixture
def shell(monkeypatch):
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=Traits(HistoryManager={"enabled": False}))
    made = []

    def finetune(**settings):
        if settings.get("peft") == "loar": raise ConfigError("peft: 'loar' is not known; did you mean 'lora'?")
        made.append(FakeRun(settings, **shell.user_ns.get("_fake", {})))
        return made[-1]

    fake = ModuleType("rwkv_peft.train.loop")
    fake.finetune = finetune
    monkeypatch.setitem(sys.modules, "rwkv_peft.train.loop", fake)
    with capture_output(): shell.run_cell("%load_ext rwkv_peft")
    shell.made = made
    yield shell
    for run in made: run.stop()
    if worker := magic.alive(): worker.join(5)
    InteractiveShell.clear_instance()


def run(shell, cell):
    "The cell's printed text and its error, if any."
    with capture_output() as captured: result = shell.run_cell(cell)
    return captured, result.error_in_exec or result.error_before_exec


def complaint(shell, cell):
    captured, error = run(shell, cell)
    assert isinstance(error, UsageError), error
    assert "\n" not in str(error) and "Traceback" not in captured.stdout + captured.stderr
    return str(error)


# ---------------------------------------------------------------- the body

def test_values_are_the_namespaces_own_objects_and_nothing_leaks(shell):
    shell.user_ns["my_rows"] = rows = [{"text": "x"}]
    captured, error = run(shell, "%%rwkv_finetune my-run\nmodel = 'm' # a comment; with = signs\n\ndata = my_rows\nr = 4; alpha = 2 * r\n")
    assert error is None and shell.made[0].settings == {"name": "my-run", "model": "m", "data": rows, "r": 4, "alpha": 8}
    assert shell.made[0].settings["data"] is rows
    assert not {"model", "data", "r", "alpha"} & set(shell.user_ns)
    assert shell.user_ns["run"] is shell.user_ns["my_run"] is shell.made[0]


def test_earlier_names_are_seen_inside_functions_too(shell):
    run(shell, "%%rwkv_finetune\nmodel = 'm'\nr = 4\ntemplate = lambda row: row * r\ndata = [r for _ in range(r)]")
    settings = shell.made[0].settings
    assert settings["template"](2) == 8 and settings["data"] == [4] * 4


@pytest.mark.parametrize("body, line, words", [
    ("model = 'm'\n\nmodle = 'm'", 3, ["modle", "'model'"]),
    ("model = 'm'\nr = 1\nr = 2", 3, ["r was already set on line 2"]),
    ("import os", 1, ["name = value", "import os"]),
    ("r = 1\nfor x in y:\n    r = 2", 2, ["for x in y:"]),
    ("r: int = 3", 1, ["name = value"]),
    ("r = s = 3", 1, ["name = value"]),
    ("r, s = 3, 4", 1, ["name = value"]),
    ("r += 3", 1, ["name = value"]),
    ("data['x'] = 3", 1, ["name = value"]),
    ("model = 'm'\nr = (4", 2, ["never closed"]),
    ("model = 'm", 1, ["unterminated"]),
    ("--load_model x.pth --data_file y\n--peft lora --lr_init fast", 2, ["--lr_init 'fast'", "a number"]),
    ("# a script\nx=1\npython train.py --load_model $y", 3, ["$y is not assigned"]),
    ("model = 'm'\ndata = my_rowz", 2, ["NameError", "my_rowz"]),
    ("model = 'm'\n\n# why\nr = 1 // 0", 4, ["ZeroDivisionError", "r = 1 // 0"]),
    ("model = 'm'\npeft = 'loar'", 2, ["'loar'", "did you mean 'lora'"]),
])
def test_a_refusal_says_where_and_what(shell, body, line, words):
    said = complaint(shell, "%%rwkv_finetune x\n" + body)
    assert said.startswith(f"body line {line}:") and all(word in said for word in words), said
    assert not shell.made and "x" not in shell.user_ns


def test_nothing_is_evaluated_before_all_names_are_right(shell):
    run(shell, "calls = []")
    complaint(shell, "%%rwkv_finetune\ndata = calls.append(1)\nnope = 1")
    assert shell.user_ns["calls"] == []


@pytest.mark.parametrize("line, words", [
    ("--bakground", ["--bakground", "'--background'"]),
    ("one two", ["one name"]),
    ('"open', ["quote"]),
    ("x --wait", ["--wait", "--resume"]),
])
def test_the_first_line_is_checked(shell, line, words):
    said = complaint(shell, f"%%rwkv_finetune {line}\nr = 1")
    assert all(word in said for word in words), said


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(body):
    try: settings = magic.parse_body(body, NAMES)
    except UsageError as error: assert "\n" not in str(error)
    else: assert all(s.name in NAMES and ast.dump(ast.parse(s.source.strip(), mode="eval").body) for s in settings)


# ---------------------------------------------------------------- flags

def test_show_code_is_python_that_makes_the_same_settings(shell):
    shell.user_ns["my_rows"] = [1, 2, 3]
    captured, error = run(shell, "%%rwkv_finetune my-run --show-code\nmodel = 'm'; data = my_rows[:2]\nr = 4\nalpha = 2 * r   # twice")
    assert error is None and not shell.made and shell.user_ns.get("run") is None
    caught = {}
    code = captured.stdout.replace("import rwkv_peft\n", "").replace("run.fit()", "")
    exec(code, {"my_rows": [1, 2, 3], "rwkv_peft": SimpleNamespace(finetune=lambda **settings: caught.update(settings))})
    assert caught == {"name": "my-run", "model": "m", "data": [1, 2], "r": 4, "alpha": 8}


@pytest.mark.parametrize("value", ["(4 +\n     4)", "(s := 4)", "1, 2", "[1,\n 2]", "\'\'\'a\nb\'\'\'", "(i for i in [1])", "lambda x: (x, 1)", "*[1], 2", "(1)"])
def test_code_shown_is_python(value):
    "Alone on a line, and as an argument."
    for body in (f"r = {value}", f"r = {value}\nalpha = r"):
        settings = magic.parse_body(body, NAMES)
        tree = ast.parse(magic.as_code(magic.Options("x"), settings))
        call = tree.body[-2].value
        given = {k.arg: k.value for k in call.keywords}
        told = given["r"] if body.count("alpha") == 0 else tree.body[1].value
        assert ast.dump(told) == ast.dump(settings[0].tree) and set(given) == {"name", *(s.name for s in settings)} and not call.args


def test_dry_run_shows_the_plan_and_trains_nothing(shell):
    captured, error = run(shell, "%%rwkv_finetune my-run --dry-run\nmodel = 'm'; data = []")
    shown = captured.outputs[0].data
    assert error is None and "<table" in shown["text/html"] and "steps: 3" in shown["text/plain"]
    assert shell.made[0].thread is None and "run" not in shell.user_ns


def test_help_names_every_setting_and_flag(shell):
    captured, error = run(shell, "%rwkv_finetune --help")
    assert error is None and all(f"  {name} " in captured.stdout for name in [*NAMES, *magic.FLAGS])


def test_resume_needs_no_body(shell):
    captured, error = run(shell, "%rwkv_finetune my-run --resume")
    assert error is None and shell.made[0].settings == {"name": "my-run", "resume": True}


@pytest.mark.parametrize("source", ["-" * 5000 + "1", "-" * 100_000 + "1", "(" * 5000 + "1" + ")" * 5000, "[" * 300 + "]" * 300])
def test_an_endless_expression_is_one_sentence(shell, source):
    assert re.search("nested too deeply|too many nested", complaint(shell, "%%rwkv_finetune x\nmodel = 'm'\nr = " + source)) and not shell.made


def test_name_said_twice_is_refused(shell):
    assert complaint(shell, "%%rwkv_finetune a\nname = 'b'").startswith("body line 1: name: is said twice")


# ---------------------------------------------------------------- running

def test_waiting_prints_text_from_the_main_thread(shell, monkeypatch):
    captured, error = run(shell, "%%rwkv_finetune my-run\nmodel = 'm'; data = []")
    assert error is None and "my-run: done, step 3 of 3" in captured.stdout
    assert shell.made[0].thread is not threading.main_thread() and not shell.made[0].thread.is_alive()


def test_background_returns_at_once_and_a_second_launch_is_refused(shell):
    shell.user_ns["_fake"] = {"steps": 10 ** 6}
    captured, error = run(shell, "%%rwkv_finetune long-one --background\nmodel = 'm'; data = []")
    assert error is None and shell.made[0].thread.is_alive()
    said = complaint(shell, "%%rwkv_finetune other\nmodel = 'm'; data = []")
    assert "'long-one'" in said and "long_one.stop()" in said and len(shell.made) == 1
    captured, error = run(shell, "long_one.stop()")
    shell.made[0].thread.join(5)
    assert not shell.made[0].thread.is_alive() and magic.alive() is None and captured.stdout == ""


def test_our_errors_are_one_line_and_faults_keep_their_type(shell):
    shell.user_ns["_fake"] = {"fails": ConfigError("lr_init: 3.0 made the loss infinite at step 1; try a tenth")}
    assert complaint(shell, "%%rwkv_finetune\nmodel = 'm'\nlr_init = 3.0").startswith("body line 2: lr_init: 3.0 made")
    shell.user_ns["_fake"] = {"fails": ZeroDivisionError("a fault")}
    captured, error = run(shell, "%%rwkv_finetune\nmodel = 'm'")
    assert type(error) is ZeroDivisionError and "Traceback" in captured.stdout


def test_interrupt_stops_gracefully_and_twice_raises(shell, monkeypatch):
    shell.user_ns["_fake"] = {"steps": 10 ** 6}
    presses = iter([KeyboardInterrupt])

    def between(self):
        if shell.made[0].begun.is_set() and (press := next(presses, None)): raise press

    monkeypatch.setattr(magic.TextCard, "between", between)
    captured, error = run(shell, "%%rwkv_finetune my-run\nmodel = 'm'; data = []")
    assert error is None and "stopped at step" in captured.stdout and "%rwkv_finetune my-run --resume" in captured.stdout

    presses = iter([KeyboardInterrupt, KeyboardInterrupt])
    shell.user_ns["_fake"] = {"steps": 10 ** 6}
    monkeypatch.setattr(FakeRun, "stop", lambda self: None)
    shell.made.clear()
    with capture_output(): result = shell.run_cell("%%rwkv_finetune my-run\nmodel = 'm'; data = []")
    assert isinstance(result.error_in_exec, KeyboardInterrupt) and magic.alive() is not None
    monkeypatch.undo()
    shell.made[0].asked.set()


def test_a_run_never_replaces_a_variable_that_is_no_run(shell):
    shell.user_ns["my_rows"] = rows = [1]
    assert "my_rows holds a list" in complaint(shell, "%%rwkv_finetune my-rows\nmodel = 'm'") and not shell.made
    run(shell, "%%rwkv_finetune list\nmodel = 'm'; data = my_rows")
    assert "list" not in shell.user_ns and shell.user_ns["run"] is shell.made[0]
    run(shell, "%%rwkv_finetune mine\nmodel = 'm'")
    captured, error = run(shell, "%%rwkv_finetune mine --resume\nmodel = 'm'")
    assert error is None and shell.user_ns["mine"] is shell.made[-1]


# ---------------------------------------------------------------- what a real run leaves

@pytest.fixture
def real(shell, monkeypatch, tmp_path):
    "The shell with the real trainer, in an empty folder, with a small model of random weights and rows."
    monkeypatch.setitem(sys.modules, "rwkv_peft.train.loop", loop)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shell.user_ns["small"] = RWKV(RWKVConfig(n_layer=1, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
    shell.user_ns["rows"] = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}."} for i in range(20)]
    return shell


BODY = "\nmodel = small; data = rows\naccumulate = 2; r = 2; eval_split = 0.2; max_steps = 4; eval_steps = 2"


def state_of(model):
    parts = {name: {k: [*v] if isinstance(v, dict) else v for k, v in vars(part).items()} for name, part in model.named_modules()}
    return parts, {name: (id(x), x.tolist(), x.requires_grad) for name, x in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("more", ["quant = 'int8'; grad_cp = True", "peft = 'pissa'", "peft = 'none'", "quant = 'int8'; train_parts = ['att.key']"])
def test_a_dry_run_leaves_a_model_object_as_it_was(real, more):
    model = real.user_ns["small"].eval()
    before = state_of(model)
    captured, error = run(real, "%%rwkv_finetune mine --dry-run" + BODY.replace("r = 2; ", "" if "none" in more else "r = 2; ") + "\n" + more)
    assert (error is None) == ("train_parts" not in more) and state_of(model) == before


def test_a_dry_run_of_a_resumption_keeps_what_was_learnt(real):
    run(real, "%%rwkv_finetune mine" + BODY)
    before = state_of(real.user_ns["small"])
    captured, error = run(real, "%rwkv_finetune mine --resume --dry-run")
    assert error is None and "steps: 4" in captured.outputs[0].data["text/plain"] and state_of(real.user_ns["small"]) == before
    assert real.user_ns["small"].attached and real.user_ns["mine"].report()["status"] == "done"


def test_what_the_curves_show_is_worked_out_once(monkeypatch, tmp_path):
    "For the report and the last card together."
    import rwkv_peft.look.runs as runs
    found, asked, view = remarks, [], TextCard()
    for module in (magic, runs): monkeypatch.setattr(module, "remarks", lambda source: asked.append(source) or found(source))
    step = {"event": "step", "time": 0, "loss": 1., "lr": 1., "grad_norm": 1., "tokens": 9, "seconds": .1, "memory": 9, "rows": [0]}
    events = [{"event": "start", "time": 0, "config": {"name": "x"}, "plan": {}, "data": {}, "versions": {}, "folder": str(tmp_path)}, *(step | {"step": i} for i in (1, 2)), {"event": "done", "time": 0, "step": 2, "best_step": None, "message": ""}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    last = magic.WithReport(view)
    for event in events: last.take(event)
    last.end()
    assert len(asked) == 1 and [r.kind for r in view.progress.remarks] == ["learning rate"] and view.progress.remarks[0].text in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_leaves_its_report(real, tmp_path):
    captured, error = run(real, "%%rwkv_finetune mine" + BODY)
    assert error is None and "report.html" not in captured.stdout
    html = (tmp_path / "runs/mine/report.html").read_text(encoding="utf-8")
    assert html == report(tmp_path / "runs/mine") and "done · step 4 of 4" in html
    assert real.user_ns["mine"].report()["status"] == "done"


def test_a_report_that_can_not_be_written_hides_neither_result_nor_error(real, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(magic, "write_report", lambda folder, found: 1 / 0)
        captured, error = run(real, "%%rwkv_finetune mine" + BODY)
    assert error is None and "note: report.html was not written: division by zero" in captured.stdout and "mine: done, step 4 of 4" in captured.stdout
    assert not (tmp_path / "runs/mine/report.html").exists() and (tmp_path / "runs/mine/adapter").is_dir()
    detach(real.user_ns["small"])
    said = complaint(real, "%%rwkv_finetune broken" + BODY.replace("max_steps = 4", "max_steps = 40; lr_init = 1e30; warmup_steps = 0"))
    assert "lower lr_init" in said and "error" in (tmp_path / "runs/broken/report.html").read_text(encoding="utf-8")


def test_a_background_run_leaves_its_report_too_and_wait_covers_it(real, tmp_path):
    run(real, "%%rwkv_finetune mine --background" + BODY)
    real.user_ns["mine"].wait()
    assert "done · step 4 of 4" in (tmp_path / "runs/mine/report.html").read_text(encoding="utf-8")


def test_resume_in_the_same_kernel_over_the_same_object(real, tmp_path, monkeypatch):
    "After ■, the name alone is enough: the object is still there; the card begins with what was before."
    step = loop.take_step

    def interrupted(run):
        said = step(run)
        if said["step"] == 2: run.stop()
        return said

    monkeypatch.setattr(loop, "take_step", interrupted)
    captured, error = run(real, "%%rwkv_finetune mine" + BODY)
    assert error is None and "stopped at step 2 of 4" in captured.stdout
    first, views = real.user_ns["mine"].report(), []
    monkeypatch.setattr(magic, "view_for", lambda shell: views.append(magic.TextCard()) or views[-1])
    captured, error = run(real, "%rwkv_finetune mine --resume")
    assert error is None and "mine: done, step 4 of 4" in captured.stdout, captured.stdout
    progress = views[0].progress
    assert [s for s, _ in progress.curve] == [1, 2, 3, 4] and progress.held_out[0] == (0, first["before"]["loss"])
    assert replace(progress, remarks=()) == magic.progress_of(real.user_ns["mine"].events) and [r.kind for r in progress.remarks] == [r.kind for r in remarks(real.user_ns["mine"].events)]
    assert real.user_ns["mine"].model is real.user_ns["small"]


# ---------------------------------------------------------------- completion

def completions(shell, text):
    with provisionalcompleter(): return [c.text for c in shell.Completer.completions(text, len(text))]


@pytest.mark.parametrize("typed, has, lacks", [
    ("%%rwkv_finetune my-run --d", ["--dry-run"], ["--help"]),
    ("%%rwkv_finetune x\nlr_", ["lr_init", "lr_schedule", "lr_final"], ["model"]),
    ("%%rwkv_finetune x\nlr_init = 1\nlr_", ["lr_final"], ["lr_init"]),
    ("%%rwkv_finetune x\nr = 4; lr_sch", ["lr_schedule"], ["lr_init"]),
    ("%%rwkv_finetune x\npeft = ", ['"lora"', '"dora"', '"bat"', '"state"', '"none"'], ['"train"']),
    ("%%rwkv_finetune x\nlr_schedule = \"co", ["cos", "constant"], ["wsd"]),
    ("%%rwkv_finetune x\nquant = \"n", ["nf4", "none"], ["int8"]),
    ("%%rwkv_finetune x\noptim = \"lora", ["loraplus", "lorafa"], ["adamw"]),
    ("%%rwkv_finetune x\ndata = my_ro", ["my_rows"], ["model"]),
    ("%%rwkv_finetune x\n--lo", ["--load_model", "--lora_config", "--loss_mask"], ["--lr_init"]),
    ("%%rwkv_finetune x\npython train.py --load_model a --pe", ["--peft", "--peft_config"], ["--lr_init"]),
    ("%rwkv_attach o", ["one-run", "other"], ["two"]),
    ("lr_", [], ["lr_init"]),
])
def test_completion(shell, typed, has, lacks, tmp_path, monkeypatch):
    shell.user_ns["my_rows"] = [1]
    monkeypatch.chdir(tmp_path)
    for name in ("one-run", "other", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "events.jsonl").touch()
    found = completions(shell, typed)
    assert all(word in found for word in has) and not any(word in found for word in lacks), found


def test_every_setting_and_every_allowed_word_is_completed(shell):
    for row in settings_table():
        assert row["name"] in magic.complete(f"%%rwkv_finetune x\n{row['name'][:3]}", 1, len(row["name"][:3]))[1]
        words = [w for w in row["allowed"] if isinstance(w, str)]
        line = f"{row['name']} = "
        assert magic.complete(f"%%rwkv_finetune x\n{line}", 1, len(line))[1] == [f'"{w}"' for w in words]
    for name in NAMES:
        with pytest.raises(UsageError, match=f"did you mean '"): magic.parse_body(f"{name}x = 1", NAMES)


# ---------------------------------------------------------------- flags of a script

SCRIPT = """n=8
python train.py --load_model m --data_file d --data_type jsonl --proj_dir out/there \\
  --peft bone --bone_config '{"bone_load":"","bone_r":32}' --micro_bsz $n --n_layer 12
"""


def test_a_script_is_a_body(shell):
    captured, error = run(shell, "%%rwkv_finetune\n" + SCRIPT)
    made = shell.made[0].settings
    assert error is None and {k: made[k] for k in ("model", "data", "name", "output", "peft", "r", "micro_bsz", "lr_init")} == {
        "model": "m", "data": "d", "name": "there", "output": "out", "peft": "bone", "r": 32, "micro_bsz": 8, "lr_init": 6e-4}
    assert "note: left out: --n_layer (line 3)" in captured.stdout and "note: lr_init = 0.0006: RWKV-PEFT's default" in captured.stdout
    captured, error = run(shell, "%%rwkv_finetune here --show-code\n" + SCRIPT)
    caught = {}
    exec(captured.stdout.replace("import rwkv_peft\n", "").replace("run.fit()", ""), {"rwkv_peft": SimpleNamespace(finetune=lambda **settings: caught.update(settings))})
    assert caught == {**{k: v for k, v in made.items() if k != "name"}, "name": "here"}


def test_values_of_a_script_are_never_evaluated(shell, tmp_path):
    place = tmp_path / "made"
    run(shell, f"%%rwkv_finetune\n--load_model m --data_file \"__import__('os').mkdir('{place}')\" --data_type jsonl --wandb '$(touch {place})'")
    assert shell.made[0].settings["data"].startswith("__import__") and not place.exists()


# ---------------------------------------------------------------- the other magics

def test_attach_from_a_terminal(real, tmp_path):
    run(real, "%%rwkv_finetune mine" + BODY)
    captured, error = run(real, "%rwkv_attach mine")
    assert error is None and "mine: done, step 4 of 4" in captured.stdout
    assert real.user_ns["attached"].report() == real.user_ns["mine"].report() and real.user_ns["mine"] is real.user_ns["run"]
    assert "did you mean 'mine'" in complaint(real, "%rwkv_attach mime") and "which run?" in complaint(real, "%rwkv_attach")
    (tmp_path / "runs/mine/events.jsonl").write_text("no event\n")
    assert "not an event" in complaint(real, "%rwkv_attach mine")


def test_environment_tells_versions_and_no_secrets(shell, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("HOME", "/srv/people/anna")
    monkeypatch.setattr("rwkv_peft.kernels.wkv.backends", lambda: {"cpu": (False, "no compiler; looked in /srv/people/anna/.cache/rwkv/so.txt and /opt/lib/anna/x.so")})
    captured, error = run(shell, "%rwkv_env")
    assert error is None and torch.__version__ in captured.stdout and "front end" in captured.stdout and "terminal" in captured.stdout
    assert "hunter2" not in captured.stdout and "anna" not in captured.stdout and "~/.cache" in captured.stdout and "…/x.so" in captured.stdout
    assert "takes nothing" in complaint(shell, "%rwkv_env now")


def test_front_ends_are_told_apart(monkeypatch):
    from rwkv_peft.notebook.env import front_end
    for name in ("VSCODE_PID", "JPY_SESSION_NAME", "PAPERMILL_OUTPUT_PATH"): monkeypatch.delenv(name, raising=False)
    kernel, plain = SimpleNamespace(user_ns={}, kernel=1), SimpleNamespace(user_ns={})
    assert front_end(kernel) == "program" and front_end(plain) == "terminal" and front_end(SimpleNamespace(user_ns={"__vsc_ipynb_file__": "a"}, kernel=1)) == "vscode"
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert front_end(kernel) == "jupyter" and front_end(plain) == "terminal"
    monkeypatch.setenv("VSCODE_PID", "1")
    assert front_end(kernel) == "vscode" and front_end(plain) == "terminal"
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert front_end(kernel) == "colab"
