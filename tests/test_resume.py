"Real processes, really interrupted: a resumed run's losses are those of the run that nobody touched, bit for bit."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest
import torch
from rwkv_peft.data.records import read_data
from rwkv_peft.model.checkpoint import load, save
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.peft.adapters import attach, detach
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.train.config import ConfigError
from rwkv_peft.train.events import read_events, timeline
from rwkv_peft.train.folder import checkpoints
from rwkv_peft.train.loop import Run, finetune
from test_train import ROWS, losses, make, of, tiny

torch.set_num_threads(1)
METHODS = {"lora": dict(peft="lora", r=4, dropout=.2, lr_init=1e-2), "state": dict(peft="state", lr_init=1e-1), "none": dict(peft="none", lr_init=1e-3), "lisa": dict(peft={"method": "lisa", "layers": 1, "every": 3}, lr_init=1e-3)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A base model and rows in files, and for each method the run that nobody interrupts."
    folder = tmp_path_factory.mktemp("resume")
    save(tiny(), folder / "base.pth")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    return folder


def settings(place, method): return dict(model=str(place / "base.pth"), forget_data="none", data=str(place / "rows.jsonl"), micro_bsz=2, accumulate=2, epochs=3, eval_split=.2, eval_steps=5, save_steps=5, early_stop=0, output=str(place)) | METHODS[method]


def whole(place, method):
    if not (place / f"whole-{method}").exists():
        for _ in finetune(**settings(place, method), name=f"whole-{method}").steps(): pass
    return losses(Run.resume(place / f"whole-{method}"))


SCRIPT = """
import sys, time, json, torch
torch.set_num_threads(1)
from rwkv_peft.train.loop import Run, finetune
told = json.loads(sys.argv[1])
run = finetune(**told)
def slow(steps):
    for e in steps:
        time.sleep(.05)
        yield e
run.steps = (lambda steps: lambda: slow(steps()))(run.steps)
run.fit()
print("ended", run.step)
"""


def start(told):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(told)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(process, folder, step, limit=120):
    "Until the events tell of `step`."
    for _ in range(limit * 100):
        if process.poll() is not None: pytest.fail(f"ended early: {process.communicate()}")
        if (folder / "events.jsonl").exists() and any(e.get("step", 0) >= step for e in read_events(folder / "events.jsonl") if e["event"] == "step"): return
        time.sleep(.01)
    pytest.fail("the run did not get there")


@pytest.mark.parametrize("method", list(METHODS))
def test_kill_9(place, method):
    folder = place / f"killed-{method}"
    process = start(settings(place, method) | {"name": folder.name})
    wait_for(process, folder, 8)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = read_events(folder / "events.jsonl")
    assert 8 <= of(before, "step")[-1]["step"] < 24 and checkpoints(folder)[-1] % 5 == 0, "it was killed midway"
    run = Run.resume(folder)
    seen = list(run.steps())
    assert of(seen, "resumed")[0]["step"] == of(before, "saved")[-1]["step"] and seen[-1]["event"] == "done"
    assert losses(run) == whole(place, method) and len(losses(run)) == 24
    repeated = {e["step"]: e["loss"] for e in of(before, "step")}
    assert all(repeated[e["step"]] == e["loss"] for e in of(seen, "step") if e["step"] in repeated)
    assert read_events(folder / "events.jsonl") == before + seen == run.events


def test_kill_9_before_the_first_checkpoint(place):
    "Without held-out rows nothing is saved before step 5: the run starts again at step 0, and comes out the same."
    folder = place / "early"
    told = settings(place, "lora") | {"name": folder.name, "eval_split": 0., "save_steps": 20}
    process = start(told)
    wait_for(process, folder, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints(folder) == []
    run = finetune(name="early", output=str(place), resume=True).fit()
    untouched = finetune(**told | {"name": "early-whole"}).fit()
    assert losses(run) == losses(untouched)


def test_ctrl_c_twice_over(place):
    "SIGINT to a process in fit(): it finishes its step, saves, says how to go on, and ends well. Again, and to the end."
    folder, method = place / "ctrl-c", "lora"
    told = settings(place, method) | {"name": folder.name}
    for stop_at in (7, 13):
        process = start(told)
        wait_for(process, folder, stop_at)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        said = read_events(folder / "events.jsonl")[-1]
        assert process.returncode == 0 and said["event"] == "stopped" and said["step"] >= stop_at, err
        assert said["message"] in out and f"resume with finetune(name='ctrl-c', output={str(place)!r}, resume=True).fit()" in out and f"ended {said['step']}" in out
        assert checkpoints(folder)[-1] == said["step"]
        told = {"name": folder.name, "output": str(place), "resume": True}
    run = Run.resume(folder)
    list(run.steps())
    assert losses(run) == whole(place, method)


def test_a_second_ctrl_c_breaks_off(place):
    "Two signals within one step: KeyboardInterrupt, and the last checkpoint is still whole."
    code = f"""
import os, signal, torch
from rwkv_peft.train.loop import finetune
run = finetune(**{settings(place, "lora") | {"name": "impatient"}!r})
def hurry(real):
    def step():
        if run.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        real()
    return step
for e in run.steps():
    if e["event"] == "start": run.optimizer.step = hurry(run.optimizer.step)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "KeyboardInterrupt" in ran.stderr and ran.returncode != 0
    assert checkpoints(place / "impatient")[-1] == 5
    run = Run.resume(place / "impatient").fit()
    assert losses(run) == whole(place, "lora")


def test_a_finished_run_can_be_made_longer(place):
    folder = place / "longer"
    for _ in finetune(**settings(place, "lora") | {"name": "longer", "lr_schedule": "constant"}).steps(): pass
    run = Run.resume(folder, epochs=4)
    seen = list(run.steps())
    long = finetune(**settings(place, "lora") | {"name": "long", "lr_schedule": "constant", "epochs": 4})
    list(long.steps())
    assert [e["step"] for e in of(seen, "step")] == list(range(25, 33)) and losses(run)[:24] == losses(long)[:24]


def test_only_some_settings_may_change(place):
    whole(place, "lora")
    folder = place / "whole-lora"
    for wrong in (dict(lr_init=.5), dict(r=8), dict(micro_bsz=4), dict(seed=1), dict(peft="state"), dict(weight_decay=.1), dict(loss_mask="all"), dict(lr_schedule="wsd"), dict(eval_split=.5)):
        with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: this run was made with"): Run.resume(folder, **wrong)
    assert Run.resume(folder, eval_steps=2, save_steps=3, keep=1, early_stop=5, sample_prompts=["x"], max_steps=50).plan()["steps"] == 50
    assert Run.resume(folder, r=4, lr_init=1e-2, micro_bsz=2).plan()["steps"] == 24           # said again, the same: fine
    with pytest.raises(FileNotFoundError, match="no run to resume"): Run.resume(place / "nothing")


def test_another_base_or_other_rows_are_refused(place, tmp_path):
    whole(place, "lora")
    folder = place / "whole-lora"
    save(tiny(seed=1), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="model: this is not the base"): Run.resume(folder, model=str(tmp_path / "other.pth")).plan()
    with pytest.raises(ConfigError, match="data: these are not the rows"): Run.resume(folder, data=ROWS[:30]).plan()
    assert Run.resume(folder, data=ROWS, model=tiny()).plan()["rows"] == 32                   # the same rows and weights as objects


def test_a_run_over_a_model_object_asks_for_it_again(tmp_path):
    run = make(tmp_path, max_steps=4)
    for e in run.steps():
        if e["event"] == "step": run.stop()
    with pytest.raises(ConfigError, match="model: .*hand the same model over again"): Run.resume(run.folder).plan()
    detach(run.model)
    resumed = Run.resume(run.folder, model=run.model).fit()
    untouched = make(tmp_path, name="untouched", max_steps=4).fit()
    assert losses(resumed) == losses(untouched)


@pytest.mark.parametrize("settings", [dict(dropout=.2), dict(peft="state", r=None, lr_init=.1), dict(train_parts=["ln"])])
def test_the_very_object_of_a_stopped_run_goes_on(tmp_path, settings):
    "Its own adapters come off and the checkpoint's go on, over the base as it was, in two sessions more; anything else that is attached to it is refused."
    base = save(tiny(), tmp_path / "base.pth")
    model = load(base, device="cpu", dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = make(tmp_path, model=model, max_steps=9, **settings)
    for n, stop in enumerate((2, 5)):
        for e in run.steps():
            if e["event"] == "start" and stop == 2:
                with pytest.raises(ConfigError, match=r"detach\(model\)"): Run.resume(run.folder, model=model).plan()     # it is at work
            if e["event"] == "step" and e["step"] == stop: run.stop()
        assert model.attached
        run = Run.resume(run.folder, model=model)
    run.fit()
    untouched = make(tmp_path, model=load(base, device="cpu", dtype=torch.float32), name="untouched", max_steps=9, **settings).fit()
    assert losses(run) == losses(untouched) and len(losses(run)) == 9
    detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    attach(model, LoRA(r=4))
    with pytest.raises(ConfigError, match=r"detach\(model\)"): Run.resume(run.folder, model=model).plan()


def test_the_source_file_may_be_gone(place, tmp_path):
    "The folder holds the rows; where they came from is not asked again."
    rows = tmp_path / "rows.jsonl"
    rows.write_text((place / "rows.jsonl").read_text())
    run = finetune(**settings(place, "lora") | {"data": str(rows), "name": "gone", "output": str(tmp_path)})
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 9: run.stop()
    rows.unlink()
    assert losses(Run.resume(tmp_path / "gone").fit()) == whole(place, "lora")


def test_a_damaged_folder_is_named(place, tmp_path):
    import shutil
    whole(place, "lora")
    shutil.copytree(place / "whole-lora", tmp_path / "copy")
    data = tmp_path / "copy" / "data" / "train" / "tokens.bin"
    data.write_bytes(data.read_bytes()[:-40] + b"\1" * 40)
    with pytest.raises(ValueError, match="fingerprint"): Run.resume(tmp_path / "copy").plan()
