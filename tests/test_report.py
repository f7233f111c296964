"The reducer, the card and the report over events made by hand: nothing here trains."
import json
import math
import re
from functools import reduce
from html import unescape

import pytest
from hypothesis import given, settings, strategies as st

from markup import Markup
from rwkv_peft.look.report import Progress, advance, advice, card, headline, means, numbers, plan_card, progress_of, report, write_report
from rwkv_peft.look.runs import difference
from rwkv_peft.notebook.card import LiveCard, TextCard, curve_bundle, ended
from rwkv_peft.train.plan import as_rows

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \ud800"


def told(name="my-run", steps=5, end="done"):
    yield {"event": "start", "time": 0, "config": {"name": name, "peft": "lora"}, "plan": {"steps": steps}, "data": {"rows": 3}, "versions": {"torch": "2"}, "folder": f"runs/{name}"}
    for step in range(1, steps + 1):
        yield {"event": "step", "time": 0, "step": step, "loss": 2.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "seconds": .5, "memory": 2 ** 30, "rows": [step]}
    yield {"event": "eval", "time": 0, "step": steps, "loss": .4, "bits_per_byte": .2, "tokens": 50, "best": True}
    if end: yield {"event": end, "time": 0, "step": steps, "best_step": None, "message": ""}


def known(events): return reduce(advance, events, Progress())


def test_numbers_are_those_of_the_events():
    p = known(told())
    assert (p.status, p.step, p.steps, p.tokens, p.seconds, p.memory) == ("done", 5, 5, 500, 2.5, 2 ** 30)
    assert "200" in card(p) and "held-out loss" in card(p) and "1.00 GiB" in card(p)


def test_the_reducer_is_pure():
    events = list(told())
    before = json.dumps(events)
    states = [Progress()]
    for event in events: states.append(advance(states[-1], event))
    assert json.dumps(events) == before and states[0] == Progress() and states[3].step == 2
    assert known(events) == states[-1]


def test_a_resumed_run_draws_the_history_of_the_model_that_came_out():
    whole = known(told(steps=6))
    events = [*told(steps=5, end="stopped"), {"event": "resumed", "step": 3}]
    events += [e for e in told(steps=6) if e["event"] in ("step", "eval", "done") and e["step"] > 3]
    p = known(events)
    assert p.curve == whole.curve and p.held_out == whole.held_out and p.status == "done"
    assert p.tokens == whole.tokens + 200                                   # two steps were taken twice


def test_a_report_of_several_sessions_tells_of_the_model_that_came_out():
    "Killed at step 5, resumed from 3: steps 4 and 5 of the first session are nobody's, in curve, sums and losses."
    first = [*told(steps=5, end=None), {"event": "warning", "message": "a note"}, {"event": "sample", "step": 5, "prompt": "p", "text": "a text that is lost"}]
    second = [{"event": "start", "config": {"name": "my-run"}, "plan": {"steps": 6}, "folder": "runs/my-run"}, {"event": "resumed", "step": 3}]
    second += [{"event": "step", "step": s, "loss": 7.0, "tokens": 100, "seconds": .5} for s in (4, 5, 6)]
    p = progress_of([*first, *second])
    assert p.curve == ((1, 2.0), (2, 1.0), (3, 2 / 3), (4, 7.0), (5, 7.0), (6, 7.0)) and p.held_out == () and p.notes == ("a note",)
    assert (p.tokens, p.seconds, p.steps) == (600, 3.0, 6)
    html = report([*first, *second])
    assert "a text that is lost" not in html and "training from 2 to 7, lowest 0.6667" in html


STEPS = st.builds(lambda kind, s, x: {"event": kind, "step": s, "loss": x}, st.sampled_from(["step", "eval"]), st.integers(0, 9), st.floats(-9, 9))
RESUMES = st.builds(lambda s: {"event": "resumed", "step": s}, st.integers(0, 9))


@given(st.lists(st.one_of(STEPS, STEPS, RESUMES), max_size=30))
@settings(deadline=None)
def test_a_live_card_and_a_report_forget_the_same(events):
    live, later = known(events), progress_of(events)
    assert (live.curve, live.held_out, live.loss if live.curve else None) == (later.curve, later.held_out, later.loss)


def test_held_out_loss_goes_from_before_to_the_best():
    events, losses = list(told(end=None))[:1], [3.0, 2.0, 2.5]
    said = []
    for step, loss in enumerate(losses):
        events.append({"event": "eval", "step": step, "loss": loss})
        said.append(numbers(known(events))["held-out loss"])
    assert said == ["3.000", "3.000 → 2.000 (-33%)", "3.000 → 2.000 (-33%), now 2.500"]
    done = known([*events, {"event": "done", "step": 2, "message": ""}])
    assert numbers(done)["held-out loss"] == said[1] and said[1] in headline(done) and said[1] in card(done)
    assert numbers(known([{"event": "eval", "step": s, "loss": x} for s, x in enumerate(["nan", 2.0, "nan"])]))["held-out loss"] == "nan → 2.000"


def test_what_is_not_a_number_is_drawn_and_not_fatal():
    p = known([*told(end=None), {"event": "step", "step": 6, "loss": "nan", "tokens": 1, "seconds": 1, "memory": None}, {"event": "error", "step": 6, "message": "the loss is nan at step 6"}])
    assert "nan" in card(p) and "the loss is nan at step 6" in card(p)
    final = curve_bundle(p, final=True)
    assert final["text/html"].startswith('<img src="data:image/png;base64,') and f'alt="{final["text/plain"]}"' in final["text/html"] and "<svg" in curve_bundle(p)["text/html"]


def words(html): return unescape(re.sub("<[^>]*>", "", html))


MEMORY = {"weights": 4 * 2**30, "optimiser": 2**30, "gradients": 2**29, "activations": 5 * 2**29, "peak": 8 * 2**30, "loading": 2**30, "ram": 2**30, "outside": (2**29, 2**30), "room": 16 * 2**30, "fits": True}
PLAN = {"methods": ["LoRA", "StateTuning"], "parameters": 1000, "trained": 25, "rows": 108, "held_out_rows": 12, "rows_per_step": 4, "steps": 60, "epochs": 2.222, "lr_init": 4e-3, "time": "unknown", "device": "cpu", "precision": "float32", "memory": MEMORY}


def test_a_plan_is_told_in_sentences_and_as_a_bar():
    html = plan_card("x", PLAN)
    drawn = lambda plan: Markup(plan_card("x", plan)).values("stroke-dasharray")
    text = words(html)
    assert "60 steps of 4 rows: 2.222 times over 108 rows; 12 are held out." in text and "LoRA and StateTuning train 25 of 1,000 numbers (2.50%), learning rate 0.004." in text
    assert "Needs 8.00 GiB for tensors at the peak and 0.50 GiB to 1.00 GiB beside them; 16.00 GiB are there. It fits." in text
    widths = [float(value) for name, value in Markup(html).attributes if name == "width" and "." in value]
    assert [round(w / widths[1]) for w in widths] == [4, 1, 0, 3, 1] and drawn(PLAN)      # of 9 GiB, and 16 are within sight
    assert "9 steps of 1 row: 62,500 times over" in words(plan_card("x", PLAN | {"steps": 9, "rows_per_step": 1, "epochs": 62500.0}))
    assert "few to judge by" not in text and "; 3 are held out, few to judge by; a larger eval_split holds out more." in words(plan_card("x", PLAN | {"held_out_rows": 3}))
    assert "LoRA trains 25" in words(plan_card("x", PLAN | {"methods": ["LoRA"]})) and "learning rate to be found before the first step." in words(plan_card("x", PLAN | {"lr_init": None}))
    tight = PLAN | {"memory": MEMORY | {"room": 2**33, "fits": False, "cheapest": {"change": {"quant": "nf4"}, "peak": 2**32}}}
    assert "It doesn't fit; the cheapest change that does: quant = nf4 (4.00 GiB)" in words(plan_card("x", tight))
    assert not drawn(PLAN | {"memory": MEMORY | {"room": 2**40}}) and "svg" not in Markup(plan_card("x", PLAN | {"memory": None})).tags


def test_the_running_mean_is_one():
    "A plain mean while its window fills; drawn once it has seen ten of them; a NaN is left out; a resumed run goes back with it."
    losses = [3.0, 1.0, "nan", *(2 + (-1) ** i * .5 for i in range(98))]
    p = known([{"event": "step", "step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
    good = [float(x) for x in losses if x != "nan"]
    assert p.trend[8][1] == pytest.approx(sum(good[:9]) / 9) and p.seen == 100 and means(p)["training"][0][-1] == 101
    slow = sum(good[:10]) / 10
    for loss in good[10:]: slow = .9 * slow + .1 * loss
    assert p.trend[-1][1] == pytest.approx(slow)
    assert means(known([{"event": "step", "step": i, "loss": 1.0} for i in range(99)])) == {}
    long = known([{"event": "step", "step": i, "loss": float(i < 5000)} for i in range(10_000)])
    assert means(long)["training"][1][-1] == pytest.approx(math.exp(-50 * math.log(2)), abs=.01) and len(long.trend) <= 800      # a window of a fiftieth of what was seen
    back = advance(p, {"event": "resumed", "step": 50})
    assert back.trend == tuple(point for point in p.trend if point[0] <= 50)


def test_the_learning_rate_is_told_while_it_matters():
    p = known([*told(end=None), {"event": "step", "step": 6, "loss": 1.0, "lr": 1.25e-4}])
    assert numbers(p)["learning rate"] == "1.25e-04" and "1.25e-04" in card(p) and "learning rate" not in numbers(advance(p, {"event": "done", "step": 6}))


def test_markup_from_anywhere_stays_text():
    events = [{**e, "config": {"name": EVIL, "model": EVIL, EVIL: EVIL}, "data": {EVIL: [EVIL]}, "versions": {EVIL: EVIL}, "folder": EVIL} if e["event"] == "start" else e for e in told()]
    events += [{"event": "sample", "step": 5, "prompt": EVIL, "text": EVIL, "base": EVIL}, {"event": "warning", "message": EVIL}, {"event": "error", "step": 5, "message": EVIL}]
    for html in (card(known(events)), report(events), plan_card(EVIL, PLAN | {"model": EVIL, "methods": [EVIL], "time": EVIL, "device": EVIL, EVIL: EVIL})):
        found = Markup(html)
        assert not {"script", "img"} & set(found.tags) and not any(name.startswith("on") for name, _ in found.attributes)
        assert "https://" not in html and "http://" not in html
        html.encode("utf-8")


@given(st.lists(st.one_of(
    st.builds(lambda s, l: {"event": "step", "step": s, "loss": l}, st.integers(0, 99), st.floats(allow_nan=True) | st.sampled_from(["nan", "inf", "-inf"])),
    st.builds(lambda s, l: {"event": "eval", "step": s, "loss": l}, st.integers(0, 99), st.floats()),
    st.builds(lambda s, e: {"event": e, "step": s}, st.integers(0, 99), st.sampled_from(["resumed", "stopped", "paused", "done", "error", "what"])),
    st.builds(lambda t: {"event": "sample", "step": 1, "prompt": t, "text": t}, st.text())), max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_order_of_events_can_be_drawn(events):
    p = known(events)
    assert "<progress" not in card(p) and "\n" not in headline(p)            # there is no start, hence no plan
    report(events)


def test_nobody_has_to_read_python_in_a_table():
    "A list, a table, a switch and what is unset, in every card and table that shows settings."
    config = {"name": "a", "peft": [{"method": "lora", "r": 8}, "state"], "grad_cp": True, "layerwise_lr": False, "ranks": {"att": 16}, "targets": ["att", "ffn"], "lr_init": 2e-4}
    start = {"event": "start", "config": config, "plan": {"methods": ["LoRA", "StateTuning"], "steps": 5, "lr_init": None}, "data": {"rows": 3, "source": None, "notes": ["one", "two"]}, "versions": {}}
    plan = as_rows(start["plan"])
    found = difference([start], [{**start, "config": {"name": "b", "peft": "lora", "loss_mask": None}}])
    shown = {"card": Markup(card(known([start]))).text, "plan": Markup(plan_card("a", PLAN | start["plan"])).text, "lines": "\n".join(f"{k}: {v}" for k, v in plan.items()), "difference": Markup(found._repr_html_()).text, "difference as text": repr(found)}
    for where, text in shown.items(): assert not re.search(r"[\[{]['\"]|\b(None|True|False)\b", text), (where, text)
    for where in ("card", "plan", "lines"): assert "LoRA + StateTuning" in shown[where]
    assert "(method = lora, r = 8), state" in shown["difference"] and "true" in shown["card"] and "att, ffn" in shown["card"] and "unset" in shown["difference as text"]


def test_dark_pages_keep_their_colours():
    styles = " ".join(Markup(card(known(told()))).values("style"))
    assert not re.search(r"(?:^|[;\s])color:\s*(?!inherit)", styles) and not re.search(r"#[0-9a-f]{3,6}|white|black", styles)


def test_a_folder_is_enough_and_the_killed_runs_half_line_is_no_harm(tmp_path):
    lines = [json.dumps(event) for event in told(end=None)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "ste')
    path = write_report(tmp_path)
    html = path.read_text(encoding="utf-8")
    assert "stopped at step 5 — resume with" in html and "svg" in Markup(html).tags and sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "report.html"]
    with pytest.raises(FileNotFoundError, match="events.jsonl"): report(tmp_path / "other")


def test_a_long_run_is_drawn_in_few_points():
    events = ({"event": "step", "step": s, "loss": 9.0 if s == 30_001 else 1.0, "tokens": 1, "seconds": .1} for s in range(1, 50_001))
    p = known(events)
    assert len(p.curve) <= 800 and max(loss for _, loss in p.curve) == 9.0 and p.curve[0][0] == 1 and p.curve[-1][0] == 50_000
    assert len(report([{"event": "step", "step": s, "loss": 1.0} for s in range(5000)])) < 60_000


# ---------------------------------------------------------------- live

class Handle:
    def __init__(self): self.bundles = []
    def update(self, bundle, raw): self.bundles.append(bundle)


def live_card(monkeypatch, now):
    import IPython.display
    handles = []
    monkeypatch.setattr(IPython.display, "display", lambda *a, **k: handles.append(Handle()) or handles[-1])
    return LiveCard(now=now), handles


def test_text_at_most_twice_a_second_and_the_curve_once(monkeypatch):
    clock = [0.0]
    live, (text, picture) = live_card(monkeypatch, lambda: clock[0])
    for event in told(steps=1000, end=None):
        clock[0] += .01
        live.take(event)
    assert 18 <= len(text.bundles) <= 24 and 9 <= len(picture.bundles) <= 12
    live.end()
    assert "<img" in picture.bundles[-1]["text/html"] and "<svg" not in picture.bundles[-1]["text/html"] and "stopped at step 1000" in text.bundles[-1]["text/html"]


def test_what_drawing_took_is_measured_and_told(monkeypatch):
    clock = [0.0]
    def now(): clock[0] += .01; return clock[0]
    live, (text, picture) = live_card(monkeypatch, now)
    for event in told(): live.take(event)
    live.end()
    assert live.progress.drawing > 0 and live.progress.drawing == pytest.approx(clock[0] - .01 * len(list(told())), abs=.02)
    assert f"drawing took {live.progress.drawing:.2f} s, {live.progress.drawing / 2.5:.1%} of the time" in text.bundles[-1]["text/html"]


def test_slow_drawing_is_done_seldom(monkeypatch):
    clock = [0.0]
    live, (text, picture) = live_card(monkeypatch, lambda: clock[0])
    def slow(bundle, raw): clock[0] += .05
    text.update = picture.update = slow
    for event in told(steps=10_000, end=None):
        clock[0] += .01
        if event["event"] == "step": live.take(event)
    assert live.progress.drawing / clock[0] < .025                              # one percent for each of the two outputs


def test_a_death_without_a_word_is_still_an_end():
    p = known(told(end=None))
    assert ended(p).status == "stopped" and ended(p, OSError("disk full")).message == "OSError: disk full"
    assert "ZeroDivisionError" in ended(p, blind=ZeroDivisionError("x")).notes[0]
    assert ended(known(told())).status == "done"


def test_a_terminal_gets_lines_from_the_thread_that_waits(capsys):
    view = TextCard()
    for event in [*told(), {"event": "warning", "message": "two rows are alike"}]: view.take(event)
    view.end()
    assert capsys.readouterr().out == ""
    view.close()
    out = capsys.readouterr().out
    assert "note: two rows are alike\n" in out and "my-run: done, step 5 of 5, loss 0.400" in out and "\r" not in out


def test_advice_can_be_typed():
    "The name comes back from the line, or is given only where Python reads it."
    from rwkv_peft.notebook.magic import read_line
    for name in ("my run", "it's \"x\"", "plain"):
        command = re.search(r"`%rwkv_finetune (.*?)`", advice(known(told(name, end="stopped"))))[1]
        assert read_line(command) == (name, {"resume"})
    for name in ("-x", "lr=1", "{a}", "$a"): assert "%rwkv" not in advice(known(told(name, end="stopped"))) and repr(f"runs/{name}") in advice(known(told(name, end="stopped")))


def test_a_card_has_a_limit_and_says_so():
    long = [*told(end=None), {"event": "sample", "step": 1, "prompt": "p" * 100_000, "text": "t" * 100_000, "base": "b"}, {"event": "warning", "message": "w" * 100_000}, {"event": "error", "step": 1, "message": "m" * 100_000}]
    html = card(known(long))
    assert len(html) < 20_000 and html.count("events.jsonl has all 100,000 characters") == 4 and len(report(long)) < 40_000
    assert "cut" not in card(known([*told(end=None), {"event": "error", "step": 1, "message": "m" * 2000}]))


def test_time_that_is_no_number_is_drawn():
    for seconds in ("inf", "nan"):
        p = known([*told(steps=2, end=None), {"event": "step", "step": 3, "loss": 1.0, "tokens": 1, "seconds": seconds}])
        assert "time left unknown" in headline(p) and "unknown" in card(p) and "time unknown" in headline(ended(p))


def test_what_comes_often_waits_for_its_turn(monkeypatch):
    clock = [0.0]
    live, (text, picture) = live_card(monkeypatch, lambda: clock[0])
    for event in list(told(end=None))[:1] + [{"event": kind, "step": s, "loss": 1.0, "tokens": 1, "seconds": .01, "message": "", "prompt": "p", "text": "x"} for s in range(100) for kind in ("step", "eval", "sample", "warning")]:
        clock[0] += .005
        live.take(event)
    assert len(text.bundles) <= 6 and len(picture.bundles) <= 4
    for i, kind in enumerate(("paused", "resumed", "stopped")):
        drawn = len(text.bundles)
        live.take({"event": kind, "step": 1, "message": ""})
        assert len(text.bundles) == drawn + 1


def test_a_terminal_obeys_no_row(capsys):
    view = TextCard()
    for event in [*told(name="a\x1b[31mb"), {"event": "warning", "message": "row \x1b[2J\x07 \u202eabc\nnext \u05e9"}]: view.take(event)
    view.close()
    out = capsys.readouterr().out
    assert not set("\x1b\x07\u202e") & set(out) and r"row \x1b[2J\x07 \u202eabc" in out and "\nnext \u05e9\n" in out and r"a\x1b[31mb: done" in out


def test_the_card_says_what_can_be_done_now():
    at = lambda status: advice(Progress(status=status, step=3, start={"folder": "runs/x"}))
    assert at("paused").startswith("paused at step 3") and "unpause()" in at("paused") and "--resume" not in at("paused")
    assert "run.stop()" in at("training") and "--resume" in at("stopped")
