"One run at a time: in a process, and in a folder that two processes share."
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest
import torch
from IPython.core.error import UsageError

from rwkv_peft.notebook import panel as panel_module
from rwkv_peft.notebook.magic import refuse_second
from rwkv_peft.notebook.panel import Panel
from rwkv_peft.train import loop
from rwkv_peft.train.events import as_event, claim, is_gone, is_over, other_writer, read_events, training, unclaim
from rwkv_peft.train.loop import Run, TrainingError

from test_train import ROWS, make, of, tiny


# ---------------------------------------------------------------- in a process

def test_a_second_run_is_refused_however_both_begin(tmp_path):
    first, second = make(tmp_path, name="first"), make(tmp_path, name="second")
    left = first.steps()
    assert training() is None                                       # made is not begun
    next(left)
    mark = torch.get_rng_state()
    for begin in (second.fit, second.start, lambda: next(second.steps())):
        with pytest.raises(TrainingError, match="'first' is still training"): begin()
    with pytest.raises(UsageError, match="'first' is still training"): refuse_second()
    assert torch.equal(mark, torch.get_rng_state()) and not second.prepared and not second.folder.exists()
    left.close()
    assert training() is None and first.events[-1]["event"] == "stopped"
    refuse_second()
    assert second.fit().events[-1]["event"] == "done" and training() is None


def test_a_claim_ends_with_its_run_however_that_ends(tmp_path):
    broken = make(tmp_path, name="broken", max_steps=3, lr_init=1e30, eval_split=0., warmup_steps=0)
    with pytest.raises(TrainingError): broken.fit()
    assert training() is None
    held = [make(tmp_path, name="forgotten")]
    held += [held[0].steps(), held]                                 # a circle, which nobody but the collector finds
    next(held[1])
    gc.disable()
    try:
        del held
        assert training() is not None
        make(tmp_path, name="next", max_steps=1).fit()
    finally: gc.enable()
    background = make(tmp_path, name="background", max_steps=10 ** 6).start()
    assert training() is background                                 # from the call on
    background.pause()
    deadline = time.monotonic() + 60
    while not of(background.events, "paused") and time.monotonic() < deadline: time.sleep(.02)
    with pytest.raises(TrainingError, match="'background' is still training"): make(tmp_path, name="other").fit()      # paused is not over
    background.stop()
    background.wait()
    assert training() is None


def test_a_pause_ends_with_its_session(tmp_path):
    run = make(tmp_path, max_steps=3)
    for said in run.steps():
        if said["event"] == "step": run.pause(), run.stop()
    assert said["event"] == "stopped"
    kinds = [e["event"] for e in run.steps()]
    assert kinds[-1] == "done" and "paused" not in kinds


def test_a_panel_that_gets_ready_counts(tmp_path, monkeypatch):
    "The second panel is refused while the first prepares; a panel that can't prepare lets go."
    monkeypatch.chdir(tmp_path)
    ready, entered = threading.Event(), threading.Event()
    def slowly(run):
        entered.set()
        assert ready.wait(60)
        loop.prepare(run)
    monkeypatch.setattr(panel_module, "prepare", slowly)
    panels = [Panel({}, model=tiny(), data=ROWS, name=name, accumulate=1, r=2, eval_split=0., max_steps=10 ** 6) for name in ("one", "two")]
    panels[0].start()
    assert entered.wait(60)
    with pytest.raises(UsageError, match="'one' is still training"): refuse_second()
    panels[1].start()
    panels[1].task.join()
    assert panels[1].run is None and "is still training" in panels[1].sheet.bundle["text/plain"]
    ready.set()
    panels[0].task.join()
    panels[0].run.stop()
    panels[0].wait()
    assert panels[0].view.progress.status == "stopped" and training() is None
    monkeypatch.setattr(panel_module, "prepare", lambda run: 1 / 0)
    panels[1].start()
    panels[1].task.join()
    assert "ZeroDivisionError" in panels[1].sheet.bundle["text/plain"] and training() is None


# ---------------------------------------------------------------- in a folder

@pytest.fixture
def sleeper():
    "Another process, that lives."
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def as_if_by(run, **start):
    "Ends the run's events as another process would leave them in the middle."
    events = run.folder / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines() if '"stopped"' not in line]
    events.write_text("".join(json.dumps(e | start if e["event"] == "start" else e) + "\n" for e in lines))


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path, sleeper):
    run = make(tmp_path, max_steps=6)
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 2: break
    as_if_by(run, pid=sleeper.pid, time=time.time())
    before = (run.folder / "events.jsonl").read_bytes()
    (run.folder / "stop").touch()                                   # meant for the other
    again = Run.resume(run.folder, model=tiny())
    with pytest.raises(TrainingError, match=f"'run' is still training in process {sleeper.pid} of this machine; .* called stop"): again.fit()
    assert (run.folder / "events.jsonl").read_bytes() == before and (run.folder / "stop").exists() and training() is None and not again.prepared
    sleeper.kill()
    sleeper.wait()
    assert again.fit().events[-1]["event"] == "done" and not (run.folder / "stop").exists()


def test_it_is_asked_again_when_all_is_ready(tmp_path, sleeper, monkeypatch):
    "The other begins while this one prepares: nothing of this one comes into the other's file."
    run = make(tmp_path, max_steps=6)
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 2: break
    def meanwhile(run, real=loop.prepare):
        real(run)
        as_if_by(run, pid=sleeper.pid, time=time.time())
    monkeypatch.setattr(loop, "prepare", meanwhile)
    with pytest.raises(TrainingError, match="is still training in process"): Run.resume(run.folder, model=tiny()).fit()
    assert not of(read_events(run.folder / "events.jsonl"), "error")


def test_damaged_events_are_named_before_anything_is_written(tmp_path):
    run = make(tmp_path, max_steps=4)
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 2: break
    with open(run.folder / "events.jsonl", "a") as file: file.write("null\n")
    before = (run.folder / "events.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=r"events.jsonl line \d+: not an event"): Run.resume(run.folder, model=tiny()).fit()
    assert (run.folder / "events.jsonl").read_bytes() == before


def test_who_writes(sleeper):
    now = time.time()
    told = lambda pid, ago=0, **more: [{"event": "start", "time": now - ago, "pid": pid, **more}, {"event": "step", "time": now - ago, "step": 1}]
    assert other_writer(told(sleeper.pid)) == sleeper.pid and other_writer(told(os.getpid())) is None and other_writer([]) is None
    assert other_writer(told(sleeper.pid, host=platform.node())) == sleeper.pid and other_writer(told(sleeper.pid, host="elsewhere")) is None
    assert other_writer([*told(sleeper.pid), {"event": "done"}, {"event": "warning"}]) is None and is_over([{"event": "done"}, {"event": "warning"}])
    assert not is_over([{"event": "stopped"}, {"event": "start"}])
    sleeper.kill()
    sleeper.wait()
    assert other_writer(told(sleeper.pid)) is None
    assert is_gone(told(sleeper.pid, 60, host=platform.node()), now) and not is_gone(told(sleeper.pid, 60, host="elsewhere"), now) and is_gone(told(sleeper.pid, 700, host="elsewhere"), now)


@pytest.mark.parametrize("line", ["null", "3", "{}", "[1]", '{"event": 3}', '{"event": "step", "step": 1}', '{"event": "resumed", "time": 1}', '{"event": "start", "time": 1, "config": null, "plan": [1], "data": {}, "versions": {}, "folder": "x"}',
                                  '{"event": "resumed", "time": 1, "step": "x"}', '{"event": "resumed", "time": 1, "step": true}', '{"event": "resumed", "time": NaN, "step": 1}', '{"event": "resumed", "time": 1, "step": 1e999}', "[" * 100_000])
def test_what_is_no_event(line):
    with pytest.raises(ValueError): as_event(line)


def test_what_a_later_version_says_is_let_through():
    assert as_event('{"event": "moved", "time": 1, "to": 3}')["to"] == 3


def test_numbers_that_are_none_are_reported(tmp_path):
    from types import SimpleNamespace
    run = make(tmp_path, max_steps=2).fit()
    events = [dict(e) for e in run.events]
    for e in of(events, "eval")[:1] + of(events, "step")[:1]: e["loss"] = "nan"
    of(events, "step")[1]["seconds"] = "inf"
    found = loop.report_of(SimpleNamespace(events=events, folder=run.folder))
    assert found["after"]["loss"] == min(e["loss"] for e in of(events, "eval")[1:]) and found["seconds"] == float("inf") and found["train_loss"][0] != found["train_loss"][0]
