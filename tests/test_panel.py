"""The panel without a browser: its form against `Config`, what it refuses, and a round of a run by its buttons."""
import json
import re
import time
from html import unescape

import pytest
import torch
from hypothesis import given, settings, strategies as st
from IPython.core.error import UsageError

from markup import Markup
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.notebook.chat import conversation_table
from rwkv_peft.notebook.panel import Panel, find, hushed, offers, run_of
from rwkv_peft.notebook.panel_form import PRESETS, Field, as_toml, complaints_of, field_text, kind_of_field, literal, python_of, read_cell, read_field
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.train.config import Config, ConfigError, setting, settings_table
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
    text = field_text(ROWS["ranks"], value, {})
    if value != "" and not (isinstance(value, str) and not value.strip()): assert read_field(ROWS["ranks"], text, {}) == value


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_in_a_field_does_more_than_be_read(text):
    for name in ("ranks", "targets", "peft", "model", "lr_init"):
        try: value = read_field(ROWS[name], text, {})
        except ConfigError as e: assert str(e).startswith(f"{name}: ")
        else: assert value is None or isinstance(value, (str, int, float, bool, list, dict))


@settings(max_examples=30, deadline=None)
@given(name=st.from_regex(r"[A-Za-z0-9][\w .-]{0,8}[A-Za-z0-9]", fullmatch=True).filter(str.isascii), r=st.integers(1, 64), lr=st.floats(1e-6, 1), prompts=st.lists(plain.filter(str.strip), max_size=2), ranks=st.none() | st.dictionaries(st.sampled_from(["ffn", "att"]), st.integers(1, 9), min_size=1),
       quant=st.sampled_from(["none", "int8", "nf4"]), cp=st.sampled_from(["auto", True, False]))
def test_a_panel_is_its_cell_and_its_cell_is_the_panel(name, r, lr, prompts, ranks, quant, cp):
    values = dict(model="rwkv7-tiny", data=rows, name=name, r=r, lr_init=lr, sample_prompts=prompts, ranks=ranks, quant=quant, grad_cp=cp)
    differ = {k: v for k, v in values.items() if v != ROWS[k]["default"]}
    fields = {k: Field(row, {"rows": rows}, lambda: None) for k, row in ROWS.items()}
    for k, v in values.items(): fields[k].set(v)
    from rwkv_peft.notebook.panel_form import cell_of
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
    for text in ("", "learning rate", "nothing like this"):
        panel.parts["filter"].value = text
        shown = [box for group in panel.groups.children for box in group.children]
        assert shown == [f.box for f in panel.fields.values() if text in f"{f.name} {f.row['description']}".lower()]


def test_what_is_at_hand_is_proposed(tmp_path):
    for file in ("a.pth", "b.jsonl", "c.docx"): (tmp_path / file).touch()
    found = offers({"mine": small(), "rows": rows, "_hidden": rows, "text": "rows", "RWKV": RWKV, "empty": []}, tmp_path)
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
    import threading
    with hushed() as caught:
        print("mine")
        other = threading.Thread(target=print, args=("theirs",))
        other.start()
        other.join()
    print("after")
    assert "".join(caught) == "mine\n" and capsys.readouterr().out == "theirs\nafter\n"


def test_a_round_by_buttons(here, capfd):
    panel = panel_of(max_steps=1000000, eval_steps=1000000, sample_prompts=["<b>1</b> ="])
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


def test_a_plan_leaves_no_adapter_behind(here):
    panel = panel_of()
    panel.plan()
    panel.wait()
    assert panel.planned[1].prepared
    panel.set(r=3)
    panel.plan()
    panel.wait()
    assert panel.planned[1].config.r == 3 and "memory, peak" in panel.sheet.bundle["text/html"]


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
