"A run that lives in another process, or lived once, followed from its folder alone."
import asyncio
import json
import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
from IPython.core.error import UsageError

from rwkv_peft.look.report import progress_of, report
from rwkv_peft.notebook.attach import Attach, Watcher, attach, run_folder, run_names
from rwkv_peft.notebook.card import TextCard
from rwkv_peft.notebook.magic import alive
from rwkv_peft.train.events import is_gone, read_events
from rwkv_peft.train.loop import report_of

from test_train import make

LIMIT = 60


def soon(true):
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(.02)


def line(kind, **fields): return json.dumps({"event": kind, "time": time.time(), **fields}) + "\n"


@pytest.fixture
def book(tmp_path):
    "A folder whose events are written by the test, as by a process that is this one."
    folder = tmp_path / "runs" / "written"
    folder.mkdir(parents=True)
    file = folder / "events.jsonl"
    file.write_text(line("start", config={"name": "written"}, plan={"steps": 9}, data={}, versions={}, folder=str(folder), pid=os.getpid()))

    def write(text):
        with open(file, "a") as out: out.write(text)
    return folder, write


def step(n): return line("step", step=n, loss=1 / n, lr=.1, grad_norm=1., tokens=5, seconds=.1, memory=None, rows=[0])


# ---------------------------------------------------------------- the folder

def test_names_and_folders(book, monkeypatch):
    folder, _ = book
    monkeypatch.chdir(folder.parent.parent)
    assert run_names() == ["written"] and run_folder("written").resolve() == run_folder(folder).resolve() == run_folder("runs/written").resolve() == folder
    with pytest.raises(FileNotFoundError, match="did you mean 'written'"): run_folder("writen")
    with pytest.raises(FileNotFoundError, match="there are written$"): run_folder("zzz")
    with pytest.raises(FileNotFoundError, match="there is none"): run_folder("x", folder)
    (folder.parent / "young").mkdir()
    (folder.parent / "young" / "config.toml").touch()
    with pytest.raises(FileNotFoundError, match="has not begun yet"): run_folder("young")


def test_new_lines_are_followed_whole_and_in_order(book):
    folder, write = book
    write(step(1))
    view = TextCard()
    run = attach(folder, view=view)
    assert view.progress.step == 1 and alive() is None and isinstance(run.thread, Watcher)
    half = step(2)
    write(half[:20])
    write(half[20:] + step(3))
    soon(lambda: run.progress.step == 3)
    run.stop()
    assert (folder / "stop").exists()
    write(line("stopped", step=3, message="as asked"))
    assert run.wait(LIMIT).progress.status == "stopped" and run.over and run.thread.finished.is_set()
    assert run.events == read_events(folder / "events.jsonl") and progress_of(run.events).curve == run.progress.curve
    assert "stopped, step 3" in repr(run)

    async def awaited(): return await run
    assert asyncio.run(awaited()) is run


def test_looking_away_changes_nothing_and_one_looks_at_a_time(book):
    folder, write = book
    first = attach(folder, view=TextCard())
    second = attach(folder, view=TextCard())
    first.wait(LIMIT)
    assert first.thread.finished.is_set() and first.progress.status == "training" and not second.thread.finished.is_set()
    second.leave()
    assert second.wait(LIMIT).progress.status == "training" and not (folder / "stop").exists()


def test_a_failed_run_is_explained(book):
    folder, write = book
    write(step(1) + line("error", step=1, message="step 2: the loss is nan", error_type="TrainingError", rows=[0], where=["row 1"], text=["<script>"]))
    seen = []

    class View(TextCard):
        def end(self, error=None, blind=None):
            super().end(error, blind)
            seen.append(self.failed)
    run = attach(folder, view=View())
    assert run.progress.status == "error" and run.progress.message == "step 2: the loss is nan" and seen[0]["where"] == ["row 1"]


def test_who_is_gone():
    now = time.time()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    told = lambda pid, ago, kind="step": [{"event": "start", "time": now - ago, "pid": pid}, {"event": kind, "time": now - ago}]
    assert not is_gone(told(os.getpid(), 3), now) and not is_gone([], now) and not is_gone(told(ended.pid, 99, "done"), now)
    assert is_gone(told(ended.pid, 99), now) and not is_gone(told(ended.pid, 3), now)
    assert is_gone(told(os.getpid(), 10 ** 8), now)                                                            # the number has been given again
    assert not is_gone(told(None, 500), now) and is_gone(told(None, 700), now)                               # of a version that wrote none
    again = [*told(ended.pid, 50, "stopped"), *told(os.getpid(), 0)[:1], {"event": "step", "time": now - 20}]
    assert not is_gone(again, now)                                                                              # the last session counts


# ---------------------------------------------------------------- runs

def test_a_file_stops_a_run_and_an_old_one_does_not(tmp_path):
    run, said = make(tmp_path, max_steps=20, accumulate=1, eval_steps=20), []
    run.folder.mkdir(parents=True)
    (run.folder / "stop").touch()                       # left by somebody before the run
    for event in run.steps():
        said.append(event)
        if event["event"] == "step" and event["step"] == 3: (run.folder / "stop").touch()
    assert [e["step"] for e in said if e["event"] == "step"] == [1, 2, 3] and said[-1]["event"] == "stopped"
    assert not (run.folder / "stop").exists() and (run.folder / "checkpoints/step-3").is_dir()
    assert said[0]["pid"] == os.getpid()
    view = TextCard()
    seen = attach(run.folder, view=view)
    assert seen.over and seen.thread.finished.is_set() and seen.progress == progress_of(run.events) and seen.report() == report_of(run)
    assert [e["event"] for e in run.steps()][-1] == "done"


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from test_train import make
make(sys.argv[1], max_steps=10**6, eval_steps=10**6, save_steps=10**6).fit()
"""


def test_a_run_elsewhere_is_seen_and_stopped(tmp_path):
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    trainer = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    try:
        soon(lambda: "run" in run_names(tmp_path) and b'"step"' in (tmp_path / "run/events.jsonl").read_bytes())
        run = attach("run", tmp_path, TextCard())
        seen = run.progress.step
        soon(lambda: run.progress.step > seen + 3)
        run.stop()
        assert run.wait(LIMIT).progress.status == "stopped" and trainer.wait(LIMIT) == 0 and not (tmp_path / "run/stop").exists()
    finally: trainer.kill()
    kept = [e["path"] for e in run.events if e["event"] == "saved"][-1]
    assert kept == f"checkpoints/step-{run.progress.step}" and (tmp_path / "run" / kept).is_dir()


def test_a_killed_run_is_told_from_a_slow_one(book, monkeypatch):
    "The process is one that sleeps, and writes nothing."
    monkeypatch.setattr(sys.modules[attach.__module__], "is_gone", partial(is_gone, quiet=.3))
    folder, write = book
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(line("start", config={"name": "written"}, plan={"steps": 9}, data={}, versions={}, folder=str(folder), pid=sleeper.pid) + step(1))
    run = attach(folder, view=TextCard())
    soon(lambda: time.time() - run.events[-1]["time"] > 1)
    assert not run.thread.finished.is_set()
    sleeper.kill()
    sleeper.wait()
    assert run.wait(LIMIT).progress.status == "stopped" and "its process is gone" in run.progress.notes[-1]
    run.stop()
    assert (folder / "stop").exists()                   # it does no harm, and helps where "gone" was a wrong guess


def test_a_run_of_another_machine_is_waited_for_and_stopped(book, monkeypatch):
    monkeypatch.setattr(sys.modules["rwkv_peft.notebook.attach"], "is_gone", partial(is_gone, quiet=.1))
    folder, write = book
    write(line("start", config={"name": "written"}, plan={"steps": 9}, data={}, versions={}, folder=str(folder), pid=2 ** 22 + 1, host="elsewhere") + step(1))
    run = attach(folder, view=TextCard())
    time.sleep(.6)
    assert not run.thread.finished.is_set() and run.progress.status == "training"
    run.stop()
    assert (folder / "stop").exists()
    write(line("stopped", step=1, message="as asked"))
    assert run.wait(LIMIT).progress.status == "stopped"


def test_a_new_run_in_the_same_folder_is_followed_from_its_beginning(book):
    folder, write = book
    write(step(1) + step(2) + step(3))
    run = attach(folder, view=TextCard())
    assert run.progress.step == 3
    first = (folder / "events.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "events.jsonl").write_text(first)
    soon(lambda: run.progress.step == 0)
    write(step(1))
    soon(lambda: run.progress.step == 1)
    write(line("stopped", step=1, message=""))
    assert [e["event"] for e in run.wait(LIMIT).events] == ["start", "step", "stopped"] and run.progress.curve == ((1, 1.0),)


@pytest.mark.parametrize("bad", ["garbage\n", "null\n", '{"event": "step", "step": 2}\n'])
def test_a_line_damaged_meanwhile_is_named(book, bad):
    folder, write = book
    run = attach(folder, view=TextCard())
    write(bad)
    with pytest.raises(ValueError, match="events.jsonl line 2: not an event"): run.wait(LIMIT)
    assert run.progress.status == "error" and "line 2: not an event" in run.progress.message
    with pytest.raises(ValueError, match="line 2: not an event"): attach(folder, view=TextCard())


def test_followed_runs_have_a_difference(book, tmp_path):
    folder, write = book
    write(step(1) + line("stopped", step=1, message=""))
    mine, other = make(tmp_path, max_steps=1).fit(), attach(folder, view=TextCard())
    assert (other - mine).names == ("written", "run") and (mine - other).names == ("run", "written") and (other - other).results["tokens read"][2] == 0
    with pytest.raises(TypeError): other - 3


def test_a_moved_run_knows_its_new_place(tmp_path):
    run = make(tmp_path / "runs", name="old", max_steps=2).fit()
    folder = run.folder.rename(tmp_path / "new")
    assert attach(folder, view=TextCard()).progress.folder == str(folder)
    assert f"{str(folder)}</code>" in report(folder) and f"{str(run.folder)}</code>" not in report(folder)             # settings and plan stay as they were
    assert attach(os.path.relpath(folder), view=TextCard()).progress.folder == os.path.relpath(folder)


def test_a_wrong_name_leaves_no_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["rwkv_peft.notebook.attach"], "view_for", lambda shell: pytest.fail("a card was shown"))
    with pytest.raises(UsageError, match="nobody"): Attach(SimpleNamespace(user_ns={}))("nobody")
