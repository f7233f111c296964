"What is said of runs: over events made by hand, whose answers are known, and over tiny runs that fit by heart, fall apart, or differ in one setting."
import json
import math
import os
import platform
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from markup import Markup
import rwkv_peft
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.look.report import report
from rwkv_peft.look.runs import COLUMNS, FLAT, curves, difference, history, is_flat, remark_list, remarks, rows_behind, runs_in, runs_table, spikes

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \x1b[31mred \u202eleft \ud800 $x$"


def steps(losses, **more):
    return [{"event": "step", "time": 1.7e9, "step": i + 1, "loss": x, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "seconds": .5, "memory": 2 ** 30, "rows": [i], **{k: v[i] for k, v in more.items()}} for i, x in enumerate(losses)]


def evals(*points): return [{"event": "eval", "time": 1.7e9, "step": s, "loss": x, "bits_per_byte": x / math.log(2), "tokens": 50, "best": False} for s, x in points]
def start(name="my-run", **config): return {"event": "start", "time": 1.7e9, "config": {"name": name, "peft": "lora", **config}, "plan": {"steps": 9, "methods": ["LoRA"]}, "data": {}, "versions": {"torch": "2"}, "folder": f"runs/{name}"}
def kinds(events): return {r.kind: r for r in remarks(events)}


def test_a_quiet_run_gets_no_remark_but_that_of_its_rate():
    noise = np.random.default_rng(3)
    falling = [3 * .99 ** i * (1 + .1 * noise.standard_normal()) for i in range(150)]
    events = [*evals((0, 3.)), *steps(falling), *evals((75, 2.), (150, 1.5))]
    events[-1] |= {"change": {"loss": [-1.5, -1.7, -1.3], "documents": 9}}
    assert list(kinds(events)) == ["learning rate"] and remarks([]) == [] and "nothing remarkable" in remark_list([])


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_warm_up_ends_where_the_schedule_says(warmup):
    from rwkv_peft.train.optim import lr_at
    rates = [lr_at(i, 40, 3e-4, 3e-5, "cos", warmup) for i in range(40)]
    found = remarks(steps([3 - i * .05 for i in range(40)], lr=rates))[0]
    assert (found.kind, found.step) == ("warm-up" if warmup else "learning rate", warmup + 1) and "0.0003" in found.text


def test_divergence_is_for_good_and_not_a_bad_batch():
    fine = [3 - i * .05 for i in range(30)]
    assert "divergence" not in kinds(steps([*fine[:20], 9., *fine[20:]]))                       # one step
    assert "divergence" not in kinds(steps([*fine[:10], 6, 6, 6, 6, 6, 6, 6, *fine[10:]]))       # it came back
    assert "divergence" not in kinds(steps([1., .1, .01, .001, .0005] * 2 + [.002] * 10))        # learnt by heart: half as much again of nothing
    found = kinds(steps([*fine, *(2 + i for i in range(12))]))["divergence"]
    assert 30 <= found.step <= 34 and "13.000" not in found.text and "11.000 at the end" in found.text
    assert "divergence" in kinds(steps([*fine, "nan", *(2 + i for i in range(12))]))             # a hole is no end


def test_flat_is_what_a_line_of_least_squares_says():
    "Against numpy's own fit with its covariance."
    noise, seen = np.random.default_rng(0), set()
    for n, slope, scale in [(30, 0, .01), (100, -.0001, .02), (100, -.01, .02), (200, 0, .5), (400, -.00002, .05), (31, 0, .1), (57, -.0004, .005)]:
        y = 2 + slope * np.arange(n) + scale * noise.standard_normal(n)
        (fit, _), cov = np.polyfit(np.arange(n), y, 1, cov=True)
        expected = (abs(fit) + 2 * math.sqrt(cov[0, 0])) * (n - 1) < FLAT * y.mean()
        assert is_flat(y) == expected
        seen.add(expected)
    assert seen == {True, False} and not is_flat([2.] * 29) and is_flat([2.] * 30) and not is_flat([2.] * 30 + [math.nan]) and not is_flat([0.] * 40)


def test_a_plateau_begins_where_the_fall_ends():
    losses = [*np.linspace(4, 2, 100), *np.full(103, 2.)]
    assert abs(kinds(steps(losses))["plateau"].step - 101) <= 6
    assert "plateau" not in kinds(steps(losses[:110]))                                          # too short to tell


def test_overfitting_needs_both_curves():
    falling, rising = steps([3 - i * .1 for i in range(20)]), steps([2 + i * .01 for i in range(20)])
    held = evals((0, 3.), (5, 2.5), (10, 2.2), (15, 2.3), (20, 2.5))
    found = kinds([*held[:1], *falling, *held[1:]])["overfitting"]
    assert found.step == 10 and "2.200" in found.text and "2.500 at step 20" in found.text
    assert "overfitting" not in kinds([*held[:1], *rising, *held[1:]])
    assert "overfitting" not in kinds([*falling, *evals((0, 3.), (10, 2.2), (20, 2.21))])       # half a per cent
    assert "overfitting" not in kinds([*falling, *evals((0, 3.), (10, 2.2), (15, 2.1), (20, 2.1))])
    worse = kinds([*falling, *evals((0, 2.), (10, 2.2), (20, 2.6))])
    assert worse["overfitting"].step == worse["no gain"].step == 0


def test_an_interval_that_holds_zero_is_a_doubt():
    def change(low, high): return [*evals((0, 2.)), {**evals((9, 1.9))[0], "change": {"loss": [-.1, low, high], "documents": 7}}]
    assert "holds 0" in kinds(change(-.3, .1))["noise"].text and "7 documents" in kinds(change(-.3, .1))["noise"].text
    assert "noise" not in kinds(change(-.3, -.01)) and "single document" in kinds(change(None, None))["noise"].text


def test_spikes_are_found_with_their_rows():
    noise = np.random.default_rng(1)
    norms = (1 + .3 * noise.random(120)).tolist()
    order = [[int(r) for r in noise.permutation(40)[:4]] for _ in range(120)]
    order = [[r for r in rows if r != 39] for rows in order]
    for i, size in ((3, 50.), (20, 30.), (50, 90.), (90, 40.), (110, 20.)): norms[i], order[i] = size, [*order[i][:2], 39]
    events = steps([2 - i * .01 for i in range(120)], grad_norm=norms, rows=order)
    assert [e["step"] for e, _ in spikes(events)] == [21, 51, 91, 111]                          # the fourth step has nothing to be measured by
    slow = [np.median(norms[max(0, i - 50):max(i, 1)]) for i in range(120)]
    assert [round(ratio, 9) for _, ratio in spikes(events)] == [round(norms[i] / slow[i], 9) for i in (20, 50, 90, 110)]
    found = [r for r in remarks(events) if r.kind == "gradient spike"]
    assert [r.step for r in found] == [21, 51, 91, 111] and "4 spikes in all" in found[-1].text
    assert all(r.rows[0] == 39 and set(r.rows) == set(order[r.step - 1]) and "row 39 was read in 4 of 4 spikes" in r.text for r in found[:3])


def test_a_row_of_every_step_is_no_suspect():
    norms = [1.] * 60
    norms[20] = norms[40] = 50.
    text = [r.text for r in remarks(steps([2.] * 60, grad_norm=norms, rows=[[0, 1]] * 60)) if r.kind == "gradient spike"]
    assert len(text) == 2 and not any("was read in" in t for t in text)


def test_not_finite_is_told_with_its_rows():
    end = {"event": "error", "step": 2, "message": f"step 3: the loss is nan because of row 7, which begins {EVIL!r}", "rows": [6]}
    found = kinds([*steps([2., 2.]), end])["not finite"]
    assert (found.step, found.rows) == (2, (6,)) and "<script" not in found._repr_html_()
    assert "not finite" not in kinds([*steps([2.]), {"event": "error", "step": 1, "message": "the disk is full"}])


def test_a_resumed_run_is_told_without_what_it_left():
    events = [*steps([2.] * 10), *steps([9.] * 30)[10:], {"event": "error", "step": 30, "message": "the loss is nan"}, {"event": "resumed", "step": 10}, *steps([2.] * 20)[10:]]
    assert not {"divergence", "not finite"} & set(kinds(events)) and len([e for e in history(events) if e["event"] == "step"]) == 20


EVENTS = st.lists(st.one_of(
    st.builds(lambda s, x, n, r: {"event": "step", "step": s, "loss": x, "lr": n, "grad_norm": n, "tokens": 5, "seconds": .1, "rows": r}, st.integers(0, 99), st.floats() | st.sampled_from(["nan", "inf"]), st.none() | st.floats(), st.lists(st.integers(0, 9), max_size=3)),
    st.builds(lambda s, x: {"event": "eval", "step": s, "loss": x}, st.integers(0, 99), st.floats()),
    st.builds(lambda s, e: {"event": e, "step": s, "message": "the loss is nan"}, st.integers(0, 99), st.sampled_from(["resumed", "stopped", "error", "done", "what"]))), max_size=30)


@given(EVENTS)
@settings(max_examples=80, deadline=None)
def test_any_order_of_events_has_curves_and_remarks(events):
    once = remarks(events)
    assert once == remarks(json.loads(json.dumps(events))) and [r.step for r in once] == sorted(r.step for r in once)
    for html in (curves(events), remark_list(once), difference(events, events)._repr_html_()): Markup(html)


def test_markup_and_long_lines_from_anywhere_stay_text(tmp_path):
    long = EVIL + "x" * 100_000
    def told(name): return [start(name=name, model=long, data=long), *steps([2., 1.]), *evals((0, 2.), (2, 1.)), {"event": "sample", "time": 1.7e9, "step": 2, "prompt": long, "base": long, "text": long}, {"event": "error", "time": 1.7e9, "step": 2, "message": f"the loss is nan {long}", "rows": [1]}]
    a, b = told(long), told(EVIL)
    place = tmp_path / "odd <b> name"
    place.mkdir()
    (place / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in a))
    for html in (curves(a), remark_list(remarks(a)), difference(a, b)._repr_html_(), runs_table(tmp_path), report(b)):
        found = Markup(html)
        assert not {"script", "img"} & set(found.tags) and not any(name.startswith("on") for name, _ in found.attributes) and "http:" not in html and "https:" not in html
        str(html).encode("utf-8")
    assert len(difference(a, b)._repr_html_()) < 60_000 and len(repr(difference(a, b))) < 5000 and len(remark_list(remarks(a))) < 5000


def test_figures_have_words_and_dark_pages_keep_their_colours():
    events = [*evals((0, 3.)), *steps([3., 2., 1.]), {**evals((3, 1.))[0], "change": {"loss": [-2, -2.5, -1.5], "documents": 4}, "general": {"loss": 4.}}]
    found = Markup(curves(events))
    labels = found.values("aria-label")
    assert len(labels) == found.tags.count("svg") == 4 and "training from 3 to 1, lowest 1" in labels[0] and "learning rate" in labels[1]
    assert "95 % from from 0.5 to 0.5" in labels[3] and "95 % to from 1.5 to 1.5" in labels[3] and "general text from 4" in labels[3]
    for html in (curves(events), remark_list(remarks(events)), difference(events, events)._repr_html_()):
        styles = " ".join(Markup(html).values("style"))
        assert not re.search(r"(?:^|[;\s])color:\s*(?!inherit)", styles) and "white;" not in styles
    assert Markup(curves([])).tags.count("svg") == 1


def test_the_table_of_runs(tmp_path):
    def write(name, events, more=""):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + more)
    write("b", [{**start("b"), "time": 1.8e9}, *evals((0, 3.), (2, 1.5)), *steps([2., 1.]), {"event": "done", "time": 1.8e9, "step": 2, "best_step": None, "message": ""}])
    write("a", [start("a"), *steps([5.]), *evals((1, 2.5))], more='{"event": "st')                # killed while it wrote
    write("c", [start("c"), *steps(["nan"]), {"event": "error", "time": 1.7e9, "step": 1, "message": "x"}])
    write("d", [], more="this is no event\n")
    write("e", [])
    (tmp_path / "no run").mkdir()
    found = {f["name"]: f for f in runs_in(tmp_path)}
    assert [f["name"] for f in runs_in(tmp_path)][0] == "b" and set(found) == set("abcde")
    assert {n: f["status"].split(":")[0] for n, f in found.items()} == {"a": "unfinished", "b": "done", "c": "error", "d": "can't be read", "e": "unfinished"}
    assert [found["b"][k] for k in COLUMNS[2:8]] == ["LoRA", 2, 1.0, 1.5, 200.0, 2 ** 30]
    assert [f["name"] for f in runs_in(tmp_path, by="held out")][:2] == ["b", "a"] and [f["name"] for f in runs_in(tmp_path, by="held out", descending=True)][:2] == ["a", "b"]
    assert [f["name"] for f in runs_in(tmp_path, by="loss")][:2] == ["b", "a"]                       # nan comes last with the unknown
    text = Markup(runs_table(tmp_path)).text
    assert "1.00 GiB" in text and "line 1: not an event" in text
    assert "there are no runs in" in runs_table(tmp_path / "nowhere") and "there are no runs" in runs_table(tmp_path / "no run")
    with pytest.raises(ValueError, match="held out"): runs_table(tmp_path, by="heldout")


@pytest.mark.parametrize("line", ["null", "3", "{}", "[1]", '{"event":"step","step":1}', '{"event":"resumed"}', '{"event":"start","config":null,"plan":[1]}',
                                  '{"event":"start","time":1e300,"config":{},"versions":{},"plan":{},"data":{},"folder":""}', '{"event":"start","time":1,"config":{},"versions":{},"plan":{"methods":3},"data":{},"folder":""}'])
def test_a_damaged_run_hides_no_other(tmp_path, line):
    for name, text in (("good", "".join(json.dumps(e) + "\n" for e in [start("good"), *steps([2.])])), ("bad", line + "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text(text)
    found = {f["name"]: f["status"] for f in runs_in(tmp_path)}
    assert found["good"] == "unfinished" and found["bad"].startswith("can't be read: ")
    if '"time"' not in line: assert "bad/events.jsonl line 1: not an event" in found["bad"]
    assert "can't be read" in Markup(runs_table(tmp_path)).text


def test_a_difference_is_of_settings_results_and_curves():
    a = [start("a", r=8, lr_init=1e-3), *evals((0, 3.)), *steps([3., 2.]), *evals((2, 2.)), {"event": "sample", "step": 0, "prompt": "p", "base": "B", "text": "B"}, {"event": "sample", "step": 2, "prompt": "p", "base": "B", "text": "A2"}]
    b = [start("b", r=8, optim="lorafa"), *evals((0, 3.)), *steps([3., 2.5, 2.4], tokens=[50, 50, 50]), *evals((3, 2.5)), {"event": "sample", "step": 3, "prompt": "p", "base": "B", "text": "B3"}, {"event": "sample", "step": 3, "prompt": "q", "base": "", "text": ""}]
    d = difference(a, b)
    assert d.settings == {"lr_init": (1e-3, None), "optim": ("adamw", "lorafa")}                     # one at its default
    assert d.results["held-out loss, best"] == (2., 2.5, -.5) and d.results["tokens read"] == (200, 150, 50) and d.results["memory, GiB"][2] == 0
    assert d.lines["training loss"] == {"a": ([100, 200], [3., 2.]), "b": ([50, 100, 150], [3., 2.5, 2.4])} and d.lines["held-out loss"]["b"] == ([0, 150], [3., 2.5])
    assert d.samples == [("p", "B", "A2", "B3")] and d.notes == ()
    assert "held-out loss, best: 2 - 2.5 = -0.5" in repr(d)
    assert difference(a, a).settings == {} and difference(a, a).names == ("a (a)", "a (b)") and "no setting differs" in difference(a, a)._repr_html_()


def test_what_cannot_be_compared_is_said():
    one, other = [start(), *evals((0, 3.), (2, 2.))], [start(), *evals((0, 3.1), (2, 2.))]
    assert "base model or held-out rows" in difference(one, other).notes[0]
    assert "60 tokens" in difference(one, [start(), *({**e, "tokens": 60} for e in evals((0, 3.)))]).notes[0]
    assert "no held-out loss" in difference(one, [start(), *steps([2.])]).notes[0] and difference(one, one).notes == ()


def test_a_report_tells_what_the_curves_show():
    events = [start(), *evals((0, 3.)), *steps([3 - i * .1 for i in range(20)]), *evals((10, 2.2), (20, 2.5))]
    html = report(events)
    assert "what the curves show: learning rate, overfitting" in html and all(str(remark_list([r]))[-60:-15] in html for r in remarks(events))
    assert "what the curves show" not in report([start()])


# ---------------------------------------------------------------- runs that are runs

@pytest.fixture(scope="module")
def train(tmp_path_factory):
    place, rows = tmp_path_factory.mktemp("runs"), demo_rows("en")
    common = dict(model="rwkv7-tiny", data=rows[:4], eval_data=rows[100:102], forget_data="none", output=str(place), micro_bsz=2, accumulate=1, lr_init=3e-2, lr_schedule="constant", warmup_steps=2, early_stop=0)
    def go(name, **given):
        run = rwkv_peft.finetune(name=name, **{**common, **given})
        try: run.fit()
        except rwkv_peft.train.TrainingError as error: run.said = str(error)
        return run
    return go


def test_real_runs_are_told_and_subtracted(train):
    over = train("by-heart", max_steps=12, eval_steps=3, r=4)
    _, held = zip(*[(e["step"], e["loss"]) for e in over.events if e["event"] == "eval"])
    found = kinds(over)
    assert held[-1] > 1.01 * min(held) and found["overfitting"].step == 3 * held.index(min(held)) and found["warm-up"].step == 3
    assert remarks(over) == remarks(over.folder) == remarks(over.events)
    boom = train("boom", lr_init=1e30, warmup_steps=0, max_steps=3, eval_steps=3)
    last = remarks(boom)[-1]
    assert (last.kind, last.text) == ("not finite", boom.said) and last.rows
    text = "".join(boom.data.tokenizer.decode(boom.data[last.rows[0]].tokens.tolist()).split())
    assert text.strip("\0")[:20] in "".join(Markup(rows_behind(boom.folder, last)).text.split())        # from the folder alone
    assert f"1 of the {len(last.rows)} rows" in rows_behind(boom, last, limit=1) and "no rows" in rows_behind(boom, remarks(boom)[0])
    one = train("r-1", max_steps=2, eval_steps=2, r=1)
    d = one - train("r-2", max_steps=2, eval_steps=2, r=2)
    matrices = (d.settings["plan: trained"][1] - d.settings["plan: trained"][0])
    assert set(d.settings) == {"r", "plan: trained"} and d.settings["r"] == (1, 2) and matrices == d.settings["plan: trained"][0]      # r (in + out) each
    assert d.results["held-out loss, first"][2] == 0 and not d.notes
    with pytest.raises(TypeError): one - 1
    assert [f["name"] for f in runs_in(one.folder.parent, by="name")] == ["boom", "by-heart", "r-1", "r-2"]


def test_a_run_that_trains_now_is_not_called_unfinished(tmp_path):
    "This very process wrote it a moment ago."
    (tmp_path / "now").mkdir()
    told = [{**start("now"), "time": time.time(), "pid": os.getpid(), "host": platform.node()}, *steps([2., 1.])]
    (tmp_path / "now/events.jsonl").write_text("".join(json.dumps(e | {"time": time.time()}) + "\n" for e in told))
    assert runs_in(tmp_path)[0]["status"] == "training"
