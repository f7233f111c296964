"Trackers, read back by their own readers; a tracker that fails, or that some other process should have."
import json
import socket
import sqlite3
import sys
import threading
import pytest
import torch
from test_evaluate import GENERAL, ROWS, make, of, tiny
import rwkv_peft.train.trackers as trackers
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.loop import Run

torch.set_num_threads(1)


@pytest.fixture
def alone(monkeypatch):
    "No address but this machine's own may be connected to; returns what was tried."
    tried, connect = [], socket.socket.connect
    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else None
        if host and not host.startswith("127.") and host not in ("localhost", "::1"):
            tried.append(address)
            raise OSError(f"{address} is not this machine")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", guarded)
    return tried


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    back = EventAccumulator(str(folder)).Reload()
    return {name: [(x.step, x.value) for x in back.Scalars(name)] for name in back.Tags()["scalars"]}


def test_tensorboard_holds_the_numbers_of_the_events(tmp_path, alone):
    run = make(tmp_path, log_with="tensorboard").fit()
    found = scalars(run.folder / "tensorboard")
    for name, kind, get in [("train/loss", "step", lambda e: e["loss"]), ("train/grad_norm", "step", lambda e: e["grad_norm"]), ("train/lr", "step", lambda e: e["lr"]),
                            ("eval/loss", "eval", lambda e: e["loss"]), ("eval/bits_per_byte", "eval", lambda e: e["bits_per_byte"])]:
        assert [s for s, _ in found[name]] == [e["step"] for e in of(run.events, kind)], name
        assert [v for _, v in found[name]] == pytest.approx([get(e) for e in of(run.events, kind)], rel=1e-6), name
    assert dict(found["eval/change_high"]) == pytest.approx({e["step"]: e["change"]["loss"][2] for e in of(run.events, "eval") if e["change"]}, rel=1e-6)
    assert dict(found["eval/general_loss"]) == pytest.approx({e["step"]: e["general"]["loss"] for e in of(run.events, "eval") if e["general"]}, rel=1e-6)
    settings, = (run.folder / "tensorboard").glob("*/hparams.yml")
    assert "lr_init: 0.01" in settings.read_text() and not alone and not of(run.events, "warning")


def test_a_resumed_runs_curve_is_that_of_the_model(tmp_path):
    "Left after step 5, saved at step 4 last: TensorBoard shows step 5 once, as the second session took it."
    run = make(tmp_path, log_with="tensorboard", eval_steps=4, save_steps=4)
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 5:
            run.working = True                   # as if killed: what is at work when a loop is left doesn't save
            break
    again = Run.resume(tmp_path / "run", model=tiny()).fit()
    steps = [s for s, _ in scalars(run.folder / "tensorboard")["train/loss"]]
    assert of(again.events, "resumed")[0]["step"] == 4 and steps == [1, 2, 3, 4, 5, 6]


def records(data):
    "LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB with pieces of (checksum, length, kind); kinds 1 whole, 2 first, 3 middle, 4 last."
    assert data[:4] == b":W&B"
    at, held = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        held += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4): yield held
        if kind in (1, 4): held = b""


def test_wandb_writes_into_the_folder_and_sends_nothing(tmp_path, alone, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = make(tmp_path, log_with="wandb", max_steps=2).fit()
    from wandb.proto import wandb_internal_pb2
    file, = run.folder.glob("wandb/offline-run-*/*.wandb")
    rows, config = [], {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"): rows.append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        for update in (*record.run.config.update, *record.config.update): config[update.key or update.nested_key[0]] = json.loads(update.value_json)
    assert [r["train/loss"] for r in rows if "train/loss" in r] == pytest.approx([e["loss"] for e in of(run.events, "step")], rel=1e-6)
    assert config["lr_init"] == .01 and config["name"] == "run" and not of(run.events, "warning")
    assert not [t.name for t in threading.enumerate() if t.name.startswith("Otel")]      # wandb's own telemetry
    assert alone == [] and capfd.readouterr().err == ""


def test_trackio_keeps_them_at_home(tmp_path, alone, monkeypatch):
    import trackio.utils, trackio.sqlite_storage
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"): monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "home")
    run = make(tmp_path, log_with="trackio", max_steps=2).fit()
    base, = (tmp_path / "home").glob("*.db")
    with sqlite3.connect(base) as db: rows = [(step, json.loads(m)) for step, m in db.execute("select step, metrics from metrics where run_name = 'run'")]
    assert [m["train/loss"] for _, m in rows if "train/loss" in m] == pytest.approx([e["loss"] for e in of(run.events, "step")]) and {s for s, _ in rows} == {0, 1, 2}
    assert not alone and not of(run.events, "warning")


class Failing:
    "A tracker that fails at the third call of `log`, or at its end."
    name = "tensorboard"
    def __init__(self, at): self.at, self.calls = at, []
    def log(self, numbers, step):
        self.calls.append(step)
        if len(self.calls) == self.at: raise RuntimeError("the service is gone\nwith a long trace")
    def finish(self):
        if self.at == "end": raise RuntimeError("the last bytes are lost")


@pytest.mark.parametrize("at", [1, 3, "end"])
def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, at):
    failing = Failing(at)
    monkeypatch.setattr(trackers, "open_tracker", lambda *_: failing)
    seen = list(make(tmp_path, log_with="tensorboard").steps())
    told = [e for e in Run.resume(tmp_path / "run", model=tiny()).events if e["event"] == "warning"]
    assert of(seen, "done") and len(told) == 1 and "tensorboard failed (RuntimeError: the " in told[0]["message"] and "\n" not in told[0]["message"]
    if at != "end": assert len(failing.calls) == at and of(seen, "warning") == told


def test_only_the_first_process_speaks(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(trackers, "open_tracker", lambda *a: opened.append(a) or Failing(None))
    events = [{"event": "start", "config": {}}, {"event": "step", "step": 1, "loss": 2.}, {"event": "resumed", "step": 1}]
    for first, word, times in [(True, "wandb", 1), (False, "wandb", 0), (True, None, 0)]:
        opened.clear()
        assert list(trackers.tracked(iter_of(events), word, tmp_path, None, lambda: first)) == events and len(opened) == times


def iter_of(events): yield from events


def test_leaving_a_tracked_run_early_saves(tmp_path):
    run = make(tmp_path, log_with="tensorboard")
    events = run.steps()
    for e in events:
        if e["event"] == "step" and e["step"] == 3: break
    events.close()
    assert run.events[-1]["event"] == "stopped" and run.saved == 3


def test_a_loss_that_is_no_number_is_logged_as_such():
    found = trackers.metrics_of({"event": "step", "step": 1, "loss": "nan", "lr": 1e-3, "memory": None})
    assert found["train/loss"] != found["train/loss"] and set(found) == {"train/loss", "train/lr"}
    assert trackers.metrics_of({"event": "eval", "step": 1, "loss": 2.}) == {"eval/loss": 2.} and trackers.metrics_of({"event": "sample", "step": 1}) == {}


def test_words_and_what_is_missing(monkeypatch):
    settings = dict(model="rwkv7-tiny", data=ROWS)
    for word in ("tensorboard", "wandb", "wandb:online", "trackio"): assert Config(**settings, log_with=word).log_with == word
    with pytest.raises(ConfigError, match="log_with: 'tensorbord' is not known; did you mean 'tensorboard'"): Config(**settings, log_with="tensorbord")
    import rwkv_peft.train.config as config
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="log_with: 'wandb:online' needs wandb, which is not installed; pip install wandb"): Config(**settings, log_with="wandb:online")


def test_no_tracker_is_imported_unasked(tmp_path):
    import subprocess
    code = "import rwkv_peft.train.loop, sys; print([m for m in ('wandb', 'trackio', 'tensorboard', 'lm_eval', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
