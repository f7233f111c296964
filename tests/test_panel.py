"""The panel without a browser: its form against `Config`, what it refuses, and a round of a run by its buttons."""
import json
import re
import sys
import threading
import time
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from IPython.core.error import UsageError

from markup import Markup
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.data.chat import TEMPLATES
from rwkv_peft.export.formats import import_
from rwkv_peft.model.checkpoint import load, read, save
from rwkv_peft.model.sample import Sampler
from rwkv_peft.notebook.chat import Conversation, conversation_table, form_of
from rwkv_peft.notebook.panel import Panel, close, hushed, offers, open_panel, run_of
from rwkv_peft.notebook.panel_form import PRESETS, Field, as_toml, cell_of, complaints_of, field_text, kind_of_field, literal, python_of, read_cell, read_field
from rwkv_peft.notebook.results import write_result
from rwkv_peft.peft.adapters import merge
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.train.config import Config, ConfigError, setting, settings_table
from rwkv_peft.train.loop import Run, finetune
from rwkv_peft.train.optim import methods_of
from rwkv_peft.train.plan import plan_like
from rwkv_peft.train.script import read_script

ROWS = {row["name"]: row for row in settings_table()}
rows = [{"prompt": f"<b>{i}</b> + 1 =", "completion": f" {i + 1}."} for i in range(20)]


def small():
    torch.manual_seed(0)
    return RWKV(RWKVConfig(n_layer=1, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def shell(monkeypatch):
    "As much of a shell as `open_panel` asks for."
    monkeypatch.setattr(Panel, "show", lambda panel: None)
    return SimpleNamespace(user_ns={})


def panel_of(**more):
    names = {"model": small(), "rows": rows}
    return Panel(names, **{"model": names["model"], "data": rows, "name": "clicked", "accumulate": 1, "r": 2, "eval_split": .2, **more})


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(.02)


# the form

def test_a_new_setting_appears_by_itself():
    class More(Config):
        "Ours"
        extra: int | None = setting(None, "something new", gt=0)
    new = [row for row in settings_table(Config) if row["name"] not in ROWS]
    assert new == [] and set(panel_of().fields) == set(Config.model_fields)
    row = {"group": "g", "name": "extra", "allowed": [], "expects": "a whole number", "default": None, "description": "something new"}
    field = Field(row, {}, lambda: None)
    assert kind_of_field(row) == "literal" and field.widget.description == "extra" and "something new" in field.note.value


def test_every_field_holds_its_default_and_every_allowed_word():
    for row in ROWS.values():
        field = Field(row, {}, lambda: None)
        assert field.default, row["name"]
        for word in row["allowed"]:
            field.set(word)
            assert field.value() == word
        field.set(None)
        assert field.default


plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-2 ** 60, 2 ** 60) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()


@settings(max_examples=300, deadline=None)
@given(value=plain | numbers | st.lists(plain | numbers, max_size=3) | st.dictionaries(plain, plain | numbers, max_size=3))
def test_what_a_literal_field_shows_is_what_it_reads(value):
    import tomllib
    assert tomllib.loads(f"x = {as_toml(value)}")["x"] == value
    assert read_field(ROWS["ranks"], field_text(ROWS["ranks"], value, {}), {}) == value


@settings(max_examples=300, deadline=None)
@given(text=plain | st.sampled_from(["a\nb", " x", "a ", "rows", "'rows'", '"', "8", "lora"]))
def test_a_text_that_a_field_shows_is_read_as_that_text(text):
    "Also one that is a variable's name."
    for name in ("data", "output", "sft_split", "peft"):
        shown = field_text(ROWS[name], text, {"rows": rows})
        assert read_field(ROWS[name], shown, {"rows": rows, "lora": LoRA()}) == text and "\n" not in shown


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_in_a_field_does_more_than_be_read(text):
    for name in ("ranks", "targets", "peft", "model", "lr_init"):
        try: value = read_field(ROWS[name], text, {})
        except ConfigError as e: assert str(e).startswith(f"{name}: ")
        else: assert value is None or isinstance(value, (str, int, float, bool, list, dict))


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(["lr=1e-4", "-x", "--resume", "it's", "a`b", "run#1", "$HOME", "{r}", "é"]) | st.from_regex(r"[A-Za-z0-9][\w .-]{0,8}[A-Za-z0-9]", fullmatch=True).filter(str.isascii), r=st.integers(1, 64), lr=st.floats(1e-6, 1), prompts=st.lists(plain.filter(str.strip), max_size=2), ranks=st.none() | st.dictionaries(st.sampled_from(["ffn", "att"]), st.integers(1, 9), min_size=1),
       quant=st.sampled_from(["none", "int8", "nf4"]), cp=st.sampled_from(["auto", True, False]))
def test_a_panel_is_its_cell_and_its_cell_is_the_panel(name, r, lr, prompts, ranks, quant, cp):
    values = dict(model="rwkv7-tiny", data=rows, name=name, r=r, lr_init=lr, sample_prompts=prompts, ranks=ranks, quant=quant, grad_cp=cp)
    differ = {k: v for k, v in values.items() if v != ROWS[k]["default"]}
    fields = {k: Field(row, {"rows": rows}, lambda: None) for k, row in ROWS.items()}
    for k, v in values.items(): fields[k].set(v)
    cell = cell_of(fields)
    assert read_cell(cell, {"rows": rows}) == differ
    heard = {}
    code = python_of(cell).replace("import rwkv_peft", "").replace("rwkv_peft.finetune", "heard.update").replace("run = ", "").replace("run.fit()", "")
    exec(code, {"heard": heard, "rows": rows})
    assert heard == differ


def test_nothing_in_a_cell_is_evaluated():
    for source in ("print('no')", "[x for x in (1,)]", "rows[0]", "rows.pop()", "f'{rows}'", "(lambda: 1)()", "unknown"):
        with pytest.raises(UsageError, match="would have to be evaluated"): read_cell(f"%%rwkv_finetune x\nr = {source}", {"rows": rows})
    with pytest.raises(UsageError, match="did you mean 'ranks'"): read_cell("%%rwkv_finetune x\nrnaks = 1", {})
    assert read_cell("%rwkv_panel 'my run' --resume", {}) == {"name": "my run", "resume": True} and read_cell("r = 3", {}) == {"r": 3}


@pytest.mark.parametrize("source, words", [("r = {[1]: 2}", "no value"), ("r = b'x'", "no setting takes"), ("lr_init = 1e999", "no setting takes"), ("r = -" + "-" * 5000 + "1", "nested too deeply"), ("r = ...", "no setting takes"),
                                           ("r = {1, 2}", "expected a whole number"), ("quant = 'int9'", "expected 'none'"), ("seed = 1.5", "expected a whole number"), ("weight_decay = 'much'", "expected a number"), ("output = ['a']; r = {}", "expected a whole number")])
def test_an_odd_value_is_one_sentence(here, shell, source, words):
    with pytest.raises(UsageError, match=words) as told: open_panel(shell, "", source)
    assert "\n" not in str(told.value) and "panel" not in shell.user_ns
    panel = panel_of()
    panel.parts["cell"].value = f"%%rwkv_finetune x\n{source}"
    panel.parts["read"].click()
    assert re.search(words, panel.sheet.bundle["text/plain"])


def test_no_number_without_an_end(here):
    panel = panel_of()
    panel.fields["lr_init"].widget.value = "inf"
    assert "finite" in panel.fields["lr_init"].note.value and "inf" not in panel.parts["cell"].value
    read_cell(panel.parts["cell"].value, panel.names)


def test_the_button_reads_the_cell_and_none_is_the_default(here):
    panel = panel_of()
    choices = {name: field.widget.options for name, field in panel.fields.items() if kind_of_field(field.row) == "words"}
    panel.parts["cell"].value = "%%rwkv_finetune x\nmodel = model\ndata = rows\nr = 8"
    panel.parts["read"].click()
    assert panel.sheet.bundle["text/plain"] == "" and panel.values() == {"model": panel.names["model"], "data": rows, "r": 8, "name": "x"}
    panel.set(**dict.fromkeys(panel.fields))
    assert panel.values() == {} and {name: panel.fields[name].widget.options for name in choices} == choices


SCRIPT = """--load_model base.pth --data_file '<b>rows.jsonl' --data_type jsonl --wandb '<b>&' --proj_dir out/mine \\
 --peft lora --lora_config '{"lora_load":"","lora_r":8,"lora_alpha":16,"lora_dropout":0.0}' --micro_bsz 4"""


def test_a_panel_takes_the_flags_of_a_script_as_the_magic_does(here):
    converted, said = read_script(SCRIPT), []
    assert read_cell("%%rwkv_finetune\n" + SCRIPT, {}, said.append) == read_cell(SCRIPT, {}) == converted.settings and said == converted.notes and len(said) > 3
    assert read_cell("%%rwkv_finetune other\n" + SCRIPT, {})["name"] == "other" and f"l2wrap={converted.settings['l2wrap']!r}" in python_of(SCRIPT)
    with pytest.raises(UsageError, match="body line 2: --peft 'lorra'"): read_cell("%%rwkv_finetune x\n--load_model a --data_file b\n--peft lorra", {})
    panel = panel_of()
    panel.parts["cell"].value = SCRIPT
    panel.parts["read"].click()
    usual = {name: ROWS[name]["default"] for name in converted.settings if name != "peft"}
    assert panel.values() == {name: value for name, value in converted.settings.items() if name == "peft" or value != usual[name]}      # the fields of the earlier form are empty again
    for shown in (panel, Panel.from_cell(SCRIPT)):
        assert shown.values() == panel.values() and shown.sheet.bundle["text/plain"] == "\n".join(f"note: {s}" for s in said)
        assert all(s in Markup(shown.sheet.bundle["text/html"]).text for s in said)
    assert read_cell(panel.as_cell(), {}) == panel.values()


@pytest.mark.parametrize("said, methods", [({}, ["LoRA"]), ({"train_type": "state"}, ["StateTuning"]), ({"train_type": "state", "peft": "lora"}, ["LoRA", "StateTuning"]), ({"peft": "lora"}, ["LoRA"]), ({"peft": "state"}, ["StateTuning"])])
def test_the_method_that_a_form_shows_is_the_one_that_trains(here, said, methods):
    "Also where the word said is the default: the form, its cell, and the form made of that cell."
    panel = panel_of(r=None, **said)
    assert panel.fields["peft"].text == said.get("peft", "") and ('peft = ' in panel.as_cell()) == ("peft" in said)
    for values in (panel.values(), read_cell(panel.as_cell(), panel.names), Panel.from_cell(panel.as_cell(), panel.names).values()):
        assert [type(m).__name__ for m in methods_of(Config(**values))] == methods
    panel.set(peft=None)
    assert "peft" not in panel.values() and panel.fields["peft"].widget.placeholder == "(by train_type)"


def test_objects_are_shown_by_name():
    method = LoRA(r=4)
    panel = panel_of(peft=method, r=None)
    assert panel.values()["peft"] is method and panel.fields["peft"].text == "peft" and "peft = peft" in panel.as_cell()
    assert panel.fields["data"].text == "rows" and panel.values()["data"] is rows
    assert panel.fields["model"].text == "model"
    texts = ["a text of some length", "another text"]
    panel = Panel({"texts": texts, "train": rows}, data=texts, eval_data="train")
    assert panel.fields["data"].text == "texts" and panel.values() == {"data": texts, "eval_data": "train"} and "data = texts\neval_data = 'train'" in panel.as_cell()
    assert Panel.from_cell(panel.as_cell(), panel.names).values() == panel.values()


@pytest.mark.parametrize("name, text, words", [("r", -1, "greater than 0"), ("peft", "lorra", "did you mean 'lora'"), ("ranks", "{ffn = ", "brackets"), ("data", "nowhere.jsonl", "no file 'nowhere.jsonl'"),
                                               ("micro_bsz", "many", "expected a whole number, got 'many'"), ("name", "a/b", "can't be a folder's name"), ("max_steps", "0", "greater than 0")])
def test_what_is_wrong_stands_beside_its_field(here, name, text, words):
    panel = panel_of()
    good = panel.fields[name].text
    panel.fields[name].widget.value = text
    said = {n: unescape(f.note.value) for n, f in panel.fields.items() if "✗" in f.note.value}
    assert set(said) == {name} and words in said[name] and f"{name}: " not in said[name]
    panel.fields[name].widget.value = good
    assert not any("✗" in f.note.value for f in panel.fields.values())


def test_a_complaint_about_no_field_is_not_lost():
    assert complaints_of(ConfigError("epochs and max_steps both say how long the run is; give one of them"), ROWS)["epochs"].startswith("epochs and max_steps")
    assert complaints_of(OSError("the disk is full"), ROWS) == {"": "the disk is full"}
    both = complaints_of(ConfigError("r: should be greater than 0, got -1; quant: 'int9' is not known; did you mean 'int8'? allowed: none"), ROWS)
    assert both == {"r": "r: should be greater than 0, got -1", "quant": "quant: 'int9' is not known; did you mean 'int8'? allowed: none"}


def test_the_filter_finds_what_it_says():
    panel = panel_of()
    for text in ("", "learning rate", "rate learning", "nothing like this"):
        panel.parts["filter"].value = text
        shown = [box for group in panel.groups.children for box in group.children]
        assert shown == [f.box for f in panel.fields.values() if all(word in f"{f.name} {f.row['description']}".lower() for word in text.split())]
        assert ("no setting says that" in panel.parts["message"].value) == (not shown)
        if "rate" in text: assert panel.fields["lr_init"].box in panel.groups.children[panel.groups.selected_index].children


def test_what_is_at_hand_is_proposed(tmp_path):
    for file in ("a.pth", "b.jsonl", "c.docx"): (tmp_path / file).touch()
    class Odd(dict): __getattr__ = dict.__getitem__
    found = offers({"odd": Odd(a=1), "mine": small(), "rows": rows, "_hidden": rows, "text": "rows", "RWKV": RWKV, "empty": []}, tmp_path)
    assert found["model"][-2:] == ["mine", "a.pth"] and "rwkv7-tiny" in found["model"] and found["data"] == ["rows", "b.jsonl"]


@pytest.mark.parametrize("label", ["0.1B · CPU, 8 GB of RAM", "1.5B · GPU of 16 GB", "7.2B · GPU of 16 GB, tight", "13.3B · GPU of 40 GB"])
def test_a_preset_fits_where_it_says(label):
    "By the plan, in 95 % of the memory: a GPU's driver takes some."
    size, memory = re.match(r"([\d.]+B)", label)[1], int(re.search(r"(\d+) GB", label)[1])
    plan = plan_like(f"RWKV7-{size}", PRESETS[label], "cpu" if "CPU" in label else "cuda", int(.95 * memory * 2 ** 30))
    assert plan["fits"] is not False and (plan["fits"] or "tight" in label)


# what it does

def test_hostile_rows_and_answers_stay_text(here):
    bad = [{"prompt": "<script>alert(1)</script> \x1b[31mred \u202eabc", "completion": "x" * 100_000}, {"prompt": "<img src=x onerror=y>", "completion": "$a$"}]
    panel = panel_of(data=bad, eval_split=0.0)
    panel.preview(0)
    panel.wait()
    html = panel.sheet.bundle["text/html"]
    assert "<script" not in html and "\x1b" not in html and "more tokens" in html and len(html) < 1_500_000
    assert "<script>alert(1)</script>" in unescape(re.sub(r"<[^>]*>", "", html))
    table = conversation_table([("<script>", {"base": "<b>\x1b[0m", "tuned": "\u202eabc"})])
    assert "<script" not in table and "<b>" not in table and "\x1b" not in table and 'dir="auto"' in table


def test_only_this_thread_is_hushed(capsys):
    with hushed() as caught:
        print("mine")
        other = threading.Thread(target=print, args=("theirs",))
        other.start()
        other.join()
    print("after")
    assert "".join(caught) == "mine\n" and capsys.readouterr().out == "theirs\nafter\n"


def test_two_that_are_hushed_at_once_leave_the_stream_as_it_was(capsys):
    stream, first, second = sys.stdout, threading.Event(), threading.Event()
    caught = {}
    def job(name, inside, before):
        with hushed() as pieces:
            inside.set()
            assert before.wait(10)                                                  # the first leaves while the second is inside
            print(name)
            with hushed() as inner: print("inner")
            print(name)
        caught[name] = "".join(pieces), "".join(inner)
    one = threading.Thread(target=job, args=("one", first, second))
    one.start()
    first.wait(10)
    released = threading.Event()
    two = threading.Thread(target=job, args=("two", second, released))
    two.start()
    one.join()
    print("meanwhile")
    released.set()
    two.join()
    assert sys.stdout is stream and capsys.readouterr().out == "meanwhile\n"
    assert caught == {"one": ("one\none\n", "inner\n"), "two": ("two\ntwo\n", "inner\n")}


def test_an_error_is_told_while_a_field_can_not_be_read(here):
    panel = panel_of()
    panel.fields["ranks"].widget.value = "{ffn = "
    panel.parts["pause"].click()
    assert "no run of this panel is training" in panel.sheet.bundle["text/html"]
    panel.plan()
    panel.wait()
    assert "brackets" in panel.sheet.bundle["text/html"]


def test_a_round_by_buttons(here, capfd):
    save(small(), "small.pth")
    panel = panel_of(model="small.pth", max_steps=1000000, eval_steps=1000000, sample_prompts=["<b>1</b> ="])
    p = panel.parts
    off = lambda: {name for name in ("plan", "start", "pause", "stop", "resume") if p[name].disabled}
    assert off() == {"pause", "stop"}
    p["pause"].click()
    assert "no run of this panel is training" in panel.sheet.bundle["text/html"]
    p["plan"].click()
    panel.task.join()
    assert "memory, peak" in panel.sheet.bundle["text/html"] and run_of(panel) is panel.planned[1]
    planned = panel.planned[1]
    p["start"].click()
    panel.task.join()
    assert panel.run is planned and off() >= {"start", "resume"}                    # the plan's preparation was used
    until(lambda: panel.view.progress.step >= 2)
    with pytest.raises(UsageError, match="'clicked' is still training"): panel.start()
    with pytest.raises(UsageError, match="'clicked' is still training"): panel.resume()
    panel.ask("now?")
    panel.task.join()
    assert "pause the run" in panel.sheet.bundle["text/html"]
    p["pause"].click()
    until(lambda: panel.view.progress.status == "paused")
    step = panel.view.progress.step
    assert off() == {"plan", "start", "pause"}
    panel.ask("<i>now</i>?", max_tokens=4)
    panel.task.join()
    assert "&lt;i&gt;now&lt;/i&gt;" in panel.sheet.bundle["text/html"] and panel.run.step == step
    p["resume"].click()
    until(lambda: panel.view.progress.step > step)
    p["stop"].click()
    until(lambda: panel.view.progress.status == "stopped")
    stopped = panel.view.progress.step
    p["resume"].click()                                                             # at once, while the report may still be written
    panel.task.join()
    until(lambda: panel.view.progress.step > stopped)
    p["stop"].click()
    panel.wait()
    assert "stopped at step" in panel.card.bundle["text/html"] and "<img" in panel.curve.bundle["text/html"] and "&lt;b&gt;1&lt;/b&gt;" in panel.card.bundle["text/html"]
    events = [json.loads(line) for line in (panel.run.folder / "events.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in events if e["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and [e["event"] for e in events if e["event"] in ("paused", "stopped", "resumed")] == ["paused", "resumed", "stopped", "resumed", "stopped"]
    assert off() == {"pause", "stop"} and p["one"].options == ("clicked",)
    said = capfd.readouterr()
    assert said.out == "" and "Traceback" not in said.err


def test_after_the_end(here):
    panel = panel_of(max_steps=3, eval_steps=3)
    panel.start()
    panel.wait()
    assert panel.run.report()["status"] == "done"
    for do, words in ((lambda: panel.look("clicked"), "step 3 of 3"), (panel.runs, "clicked"), (lambda: panel.compare("clicked", "clicked"), "clicked"),
                      (lambda: panel.write("out.pth"), "made over a model object"), (lambda: panel.look("clickde"), "did you mean"), (lambda: panel.write(""), "needs a name"), (panel.start, "holds a run already")):
        do()
        panel.wait()
        assert words in panel.sheet.bundle["text/html"], (words, panel.sheet.bundle["text/plain"])
    panel.ask("1 =", max_tokens=3)
    panel.wait()
    assert set(panel.talk[1].turns[0][1]) == {"base", "tuned"}
    base = panel.talk[1].models["base"].state_dict()
    assert all(torch.equal(base[name], x) for name, x in small().state_dict().items())


def everything_of(model):
    "What a plan must not change: each part's own things, each tensor's identity, values and flags."
    parts = {name: {k: [*v] if isinstance(v, dict) else v for k, v in vars(part).items()} for name, part in model.named_modules()}
    return parts, {name: (id(x), x.data_ptr(), x.tolist(), x.requires_grad) for name, x in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("told", [dict(quant="int8", train_type="infctx", chunk_ctx=4, grad_cp=True, backend="chunk"), dict(peft="pissa"), dict(peft="none", r=None), dict(peft="lora", train_parts=["ln"]), dict(peft="dora", quant="nf4"),
                                  dict(peft="lora", quant="int8", train_parts=["att.key"])], ids=str)
def test_a_model_object_is_after_a_plan_as_it_was(here, told):
    panel = panel_of(max_steps=1)
    model = panel.names["model"].eval()
    model.head.weight.requires_grad_(False)
    before = everything_of(model)
    for settings in (told, {"peft": "none", "r": None}):
        panel.set(**dict.fromkeys(told), **{k: v for k, v in {"r": 2}.items() if k not in told})
        panel.set(**settings)
        panel.plan()
        panel.wait()
        assert ("quant: " if "att.key" in str(settings) else "memory") in panel.sheet.bundle["text/plain"]
        assert everything_of(model) == before


def test_a_start_that_fails_leaves_a_model_object_as_it_was(here):
    panel = panel_of(quant="int8", train_parts=["att.key"], max_steps=1)
    before = everything_of(panel.names["model"])
    panel.start()
    panel.wait()
    assert "att.key" in panel.sheet.bundle["text/plain"] and everything_of(panel.names["model"]) == before
    panel.set(train_parts=None)
    panel.start()
    panel.wait()
    assert panel.run.report()["status"] == "done"


@pytest.mark.parametrize("change", ["file", "list", "pair"])
def test_the_rows_that_are_there_now_are_shown_and_trained(here, tmp_path, change):
    "A plan was made, and a row looked at, of those that were there before."
    held = [dict(row) for row in rows]
    def write(word):
        for i, row in enumerate(held): row["prompt"] = f"{word} {i}"
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    write("old")
    save(small(), "small.pth")
    panel = panel_of(model="small.pth", data="rows.jsonl" if change == "file" else held, max_steps=1, eval_split=0.)
    panel.preview(0)
    panel.wait()
    panel.plan()
    panel.wait()
    kept = panel.planned[1]
    assert "old 0" in panel.rows[1].text(0) and run_of(panel) is kept and not sys.stdout.closed
    write("new")
    panel.preview(0)
    panel.wait()
    assert "new 0" in panel.sheet.bundle["text/plain"]
    if change == "pair": panel.plan(), panel.wait()
    panel.start()
    panel.wait()
    assert panel.run is not kept and "new 0" in panel.run.data.text(0)


@pytest.mark.parametrize("setting", ["model", "adapter"])
def test_a_plan_is_made_again_when_what_it_read_was_replaced(here, setting):
    save(small(), "small.pth")
    finetune(model="small.pth", data=rows, name="first", r=2, accumulate=1, max_steps=1, eval_split=0.).fit()
    panel = panel_of(model="small.pth", adapter="runs/first/adapter", r=None, max_steps=1)
    panel.plan()
    panel.wait()
    kept = run_of(panel)
    assert kept.prepared and run_of(panel) is kept
    path = panel.values()[setting] + ("/adapter_config.json" if setting == "adapter" else "")
    with open(path, "rb") as file: content = file.read()
    with open(path, "wb") as file: file.write(content)
    assert run_of(panel) is not kept


def test_an_error_of_the_rows_is_told_and_the_panel_goes_on(here):
    panel = panel_of(data=[{"prompt": "a"}])
    for do in (panel.preview, panel.plan, panel.start):
        do()
        panel.wait()
        assert "✗" in panel.sheet.bundle["text/html"] and panel.run is None
    panel.set(data=rows)
    panel.preview(10 ** 9)
    panel.wait()
    assert "Row 15 of 16" in panel.sheet.bundle["text/html"]


# the chat

TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "And 2?"}, {"role": "assistant", "content": "Three."}]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "raw"])
def test_a_question_has_the_form_of_the_rows(template):
    "What stands before the answer when trained stands before it when asked, in a first turn and in a second."
    model = small()
    talk = Conversation({"base": model, "tuned": model}, template)
    segments = TEMPLATES[template]([{"weight": 1., **m} for m in TURNS])
    before = ["".join(text for text, _ in segments[:i]) for i, (_, weight) in enumerate(segments) if weight]
    if template != "think": assert talk.text_of("tuned", "1 + 1?") == before[0]     # rows without reasoning hold an empty thought, and a question asks for one
    answer = {"think": "<think>\nso\n</think>\n", "fake_think": "<think>\n</think>\n"}.get(template, "") + "Two."
    talk.turns = [("1 + 1?", {"base": answer, "tuned": answer})]
    second = talk.text_of("base", "And 2?")
    if template == "think": assert second.endswith("Assistant: <think>\nso\n</think>\nTwo.\n\nUser: And 2?\n\nAssistant: <think")
    else: assert second == before[1]


def own(messages): return [(f"Question: {messages[0]['content']}\n\nAnswer:", 0), (f" {messages[1]['content']}", 1)]


@pytest.mark.parametrize("data, template, form, later", [(rows, None, "raw", "raw"), (rows, "instruct", "instruct", "instruct"), (rows, own, own, "qa"), ([{"text": f"It was {i}."} for i in range(4)], None, "rwkv", "rwkv"),
                                                         ([{"prompt": f"Question: {i}?\n\nAnswer:", "completion": " Yes."} for i in range(4)], None, "qa", "qa"), ([{"messages": TURNS}] * 4, None, "rwkv", "rwkv")])
def test_the_form_of_the_questions_is_that_of_the_run(here, data, template, form, later):
    "In its session, and from its folder."
    run = Run(Config(model=small(), data=data, template=template, name="asked", r=2, max_steps=1, eval_split=0.))
    next(run.steps())
    assert form_of(run) == form and form_of(Run.resume(run.folder, model=small())) == later


def test_prompts_without_a_form_stand_alone():
    talk = Conversation({"tuned": small()}, "raw")
    talk.turns.append(("1 + 1 =", {"tuned": "2"}))
    assert talk.text_of("tuned", " 3 + 1 = ") == "3 + 1 ="


def test_an_answer_ends_where_its_form_says(here):
    panel = panel_of(data=[{"prompt": "a?", "completion": "b"}] * 8, template="alpaca", lr_init=.05, max_steps=60, r=16, eval_split=0.)
    panel.start()
    panel.wait()
    panel.ask("a?", temperature=0, max_tokens=20)
    panel.wait()
    answer = panel.talk[1].turns[0][1]["tuned"]
    assert panel.talk[1].template == "alpaca" and answer == "b"


def test_a_question_that_fails_is_no_turn():
    talk = Conversation({"a": small(), "b": small()})
    with pytest.raises(ZeroDivisionError): talk.ask("x", Sampler(seed=0), 3, lambda: 1 / 0)
    assert talk.turns == []
    talk.ask("x", Sampler(seed=0), 3)
    assert len(talk.turns) == 1


# taking away

@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "(folder, merged model) of a short run over the bundled model."
    place = tmp_path_factory.mktemp("ended")
    torch.set_num_threads(1)
    run = finetune(model="rwkv7-tiny", data=rows, name="tuned", output=str(place), r=2, lr_init=4e-3, accumulate=1, max_steps=2, eval_split=0., device="cpu", precision="fp32").fit()
    return run.folder, merge(run.model)


@pytest.mark.parametrize("out", ["a.pth", "a.safetensors", "a.st", "a.gguf", "a"])
def test_what_is_written_is_the_tuned_model(ended, tmp_path, out):
    "Into a folder that isn't there yet, and read again by the format's own reader."
    folder, model = ended
    said, path = [], tmp_path / "new" / "folder" / out
    assert write_result(folder, path, say=said.append) == path and said
    with pytest.raises(ValueError, match="already"): write_result(folder, path)
    assert [p.name for p in path.parent.iterdir()] == [out]                         # nothing else is left
    whole = {name: x.detach() for name, x in model.state_dict().items()}
    if out == "a.gguf":
        from gguf import GGUFReader
        import numpy as np
        found = {t.name: torch.tensor(np.array(t.data, dtype=np.float32)) for t in GGUFReader(path).tensors}
        pairs = [(found["token_embd.weight"], whole["emb.weight"]), (found["output.weight"], whole["head.weight"])] + [(found[f"blk.{i}.channel_mix_{way}.weight"], whole[f"blocks.{i}.ffn.{way}.weight"]) for i in range(model.config.n_layer) for way in ("key", "value")]
    else:
        back = import_(path, tmp_path / "back.pth", say=said.append) if out in ("a", "a.st") else path
        found = torch.load(back, weights_only=True) if back.suffix == ".pth" else read(back)
        pairs = [(found[name].view_as(x), x) for name, x in whole.items()]
    base = load("rwkv7-tiny", device="cpu", dtype=torch.float32).state_dict()
    assert not torch.equal(whole["blocks.0.ffn.key.weight"], base["blocks.0.ffn.key.weight"])
    for x, y in pairs:
        if out in ("a.pth", "a.safetensors", "a"): assert torch.equal(x, y.to(x.dtype))
        else: assert torch.allclose(x.float(), y.to(torch.bfloat16).float(), rtol=2 ** -10, atol=1e-6)      # float16, of the bundled file's bfloat16


# widgets

def widgets():
    from ipywidgets.widgets import widget
    return len(widget._instances)


def test_the_filter_makes_no_widgets_and_a_new_panel_closes_the_old_one(here, shell):
    open_panel(shell)
    panel, held = shell.user_ns["panel"], widgets()
    for text in ("r", "ra", "rank", "", "nothing like this", ""): panel.parts["filter"].value = text
    assert widgets() == held
    for _ in range(3): open_panel(shell, "x")
    assert widgets() == held and panel.box.comm is None and shell.user_ns["panel"].box.comm is not None
    panel.set(r=3)                                                                  # the old one is held by somebody: it does nothing, and doesn't fail
    panel.heard()
    close(shell.user_ns["panel"])


def test_a_page_that_was_loaded_again_gets_its_panel_back(here, shell, monkeypatch):
    "The cell that opened the panel is run again while its run trains: the same panel, with the run that can still be stopped; its run is a variable."
    names, shown = shell.user_ns, []
    names |= {"model": small(), "rows": rows, "clicked": "mine"}
    cell = "model = model; data = rows; accumulate = 1; max_steps = 1000000; eval_steps = 1000000"
    open_panel(shell, "clicked", cell)
    panel = names["panel"]
    monkeypatch.setattr(Panel, "show", lambda panel: shown.append(panel))
    panel.start()
    panel.task.join()
    until(lambda: panel.view.progress.step >= 1)
    assert names["run"] is panel.run and names["clicked"] == "mine"                  # what is no run is left alone
    panel.set(seed=7)
    assert "for the next run" in panel.parts["message"].value
    open_panel(shell, "clicked", cell)
    assert names["panel"] is panel and shown == [panel] and panel.box.comm is not None
    panel.stop()
    panel.wait()
    open_panel(shell, "clicked", cell)
    assert names["panel"] is not panel and "stopped at step" in repr(panel.run) and "runs/clicked" in repr(panel.run)
