"Killed in a step, in a save, in a rename: always resumable, never a corrupt checkpoint, the losses of a run that nobody touched."
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from rwkv_peft.model.checkpoint import save
from rwkv_peft.train.events import read_events, timeline
from rwkv_peft.train.folder import checkpoints, load_checkpoint, save_checkpoint
from rwkv_peft.train.loop import Run, finetune
from test_train import ROWS, losses, make, tiny

torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_twenty_kills(tmp_path):
    save(tiny(), tmp_path / "base.pth")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    told = dict(model=str(tmp_path / "base.pth"), data=str(tmp_path / "rows.jsonl"), device="cpu", r=4, dropout=.2, lr_init=1e-2, micro_bsz=2, accumulate=2, max_steps=40, eval_split=.2, eval_steps=3, save_steps=2, keep=2, early_stop=0, output=str(tmp_path))
    ran = subprocess.run([sys.executable, Path(__file__).parent / "faults_child.py", json.dumps(told | {"name": "killed"}), "20", "3"], capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found["fell"]) == 20 and found["status"] == 0 and {kind for kind, *_ in found["fell"]} == {"fsync", "rename", "update", "line", "second file", "deletion"}, found
    untouched, killed = timeline(read_events(tmp_path / "untouched" / "events.jsonl")), timeline(read_events(tmp_path / "killed" / "events.jsonl"))
    said = lambda events, kind: {e["step"]: e["loss"] for e in events if e["event"] == kind}
    assert said(killed, "step") == said(untouched, "step") and len(said(untouched, "step")) == 40 and said(killed, "eval") == said(untouched, "eval")
    (a, kept_a), (b, kept_b) = load_checkpoint(tmp_path / "killed", 40), load_checkpoint(tmp_path / "untouched", 40)
    assert all(torch.equal(a[n], b[n]) for n in b) and all(torch.equal(kept_a["moments"][n][k], x) for n, kept in kept_b["moments"].items() for k, x in kept.items())
    assert checkpoints(tmp_path / "killed") == checkpoints(tmp_path / "untouched")
    assert not [p for p in (tmp_path / "killed").rglob(".*")], "nothing half-written is left"


@pytest.mark.parametrize("optim", ["adamw", "lorafa", "loraplus", "adamw8bit", "apollo"])
def test_moments_by_name_come_back(tmp_path, optim):
    "Stopped and resumed, every optimiser goes on to the last bit."
    settings = dict(optim=optim, max_steps=6, **(dict(peft="none", lr_init=1e-3, r=None) if optim == "apollo" else {}))
    run = make(tmp_path, **settings)
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 3: run.stop()
    names = set(load_checkpoint(run.folder)[1]["moments"])
    assert names and names <= set(run.trained) and (optim != "lorafa" or all(n.endswith(".B") for n in names))
    resumed = Run.resume(run.folder, model=tiny()).fit()
    assert losses(resumed) == losses(make(tmp_path, name="untouched", **settings).fit())


def test_a_checkpoint_written_twice_over(tmp_path):
    "The same step again: the old one is there until the new one is; after a fall between the two renames, the others stand."
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(2)}, {"n": 1})
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(2)}, {"n": 1})
    real, calls = os.replace, []
    def fails(a, b):
        calls.append(b)
        if len(calls) == 2: raise OSError(5, "Input/output error")
        real(a, b)
    os.replace = fails
    try:
        with pytest.raises(OSError, match="Input/output error"): save_checkpoint(tmp_path, 2, {"x": torch.ones(2)}, {"n": 2})
    finally: os.replace = real
    assert checkpoints(tmp_path) in ([1], [1, 2]) and torch.equal(load_checkpoint(tmp_path)[0]["x"], torch.zeros(2))
