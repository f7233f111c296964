"Ranks that are real processes: the same numbers as one process, asked to stop, killed in every way, and on two hosts."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import psutil
import pytest
import torch
from rwkv_peft import load_adapter
from rwkv_peft.model.checkpoint import load, save
from rwkv_peft.train import launch
from rwkv_peft.train.config import ConfigError
from rwkv_peft.train.events import read_events
from rwkv_peft.train.folder import checkpoints
from rwkv_peft.train.loop import Run, TrainingError, finetune
from test_train import ROWS, losses, of, tiny

torch.set_num_threads(1)
COMMAND = [sys.executable, "-c", "from rwkv_peft.cli import main; main()"]
TOLD = dict(r=4, lr_init=1e-2, micro_bsz=1, accumulate=5, max_steps=6, eval_split=.2, eval_steps=3, early_stop=0)      # five micro-batches: one rank has an idle one in each step


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Ranks with one thread each, whatever the machine has."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A base model and rows in files."
    folder = tmp_path_factory.mktemp("launch")
    save(tiny(), folder / "base.pth")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return folder


@pytest.fixture(scope="module")
def alone(place):
    "The run in this process, that the others must equal."
    return finetune(model=str(place / "base.pth"), data=ROWS, output=str(place), name="alone", **TOLD).fit()


def close(one, other): assert len(one) == len(other) and all(abs(a - b) < 1e-5 * abs(b) for a, b in zip(one, other)), (one, other)
def ranks_in(folder): return [p for p in psutil.process_iter(["cmdline"]) if "rwkv_peft.train.launch" in (p.info["cmdline"] or []) and any(str(folder) == word for word in p.info["cmdline"])]


def until(what, limit=120, tell=lambda: "it did not happen"):
    end = time.monotonic() + limit
    while not (found := what()) and time.monotonic() < end: time.sleep(.02)
    assert found, tell()
    return found


def steps_in(folder): return [e["step"] for e in read_events(folder / "events.jsonl") if e["event"] == "step"] if (folder / "events.jsonl").exists() else []


# --- the same run ----------------------------------------------------------------------------------------------------------

def test_two_processes_are_one_run(place, alone):
    "Rows and template are objects of this process. The events are yielded as they stand in the file, the losses and the result are those of one process, and no process is left."
    run = finetune(model=load(place / "base.pth", device="cpu"), data=ROWS, output=str(place), name="both", devices=2, **TOLD)
    seen = list(run.steps())
    assert seen == read_events(run.folder / "events.jsonl") == run.events and [e["event"] for e in seen] == [e["event"] for e in alone.events]
    close(losses(run), losses(alone))
    close([e["loss"] for e in of(seen, "eval")], [e["loss"] for e in of(alone.events, "eval")])
    assert [sorted(e["rows"]) for e in of(seen, "step")] == [sorted(e["rows"]) for e in of(alone.events, "step")] and run.report()["status"] == "done"
    assert [e["tokens"] for e in of(seen, "step")] == [e["tokens"] for e in of(alone.events, "step")]
    there = load_adapter(load(place / "base.pth", device="cpu"), run.folder / "adapter")
    text = torch.arange(1, 60)[None]
    with torch.no_grad(): expected, got, handed = [m.eval()(text)[0] for m in (alone.model, there, run.model)]
    assert torch.equal(got, handed) and (got - expected).abs().max() < 1e-4 * expected.abs().max() and (tiny().eval()(text)[0] - expected).abs().max() > .01
    assert not ranks_in(run.folder) and not [p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE]


def test_pause_and_stop_reach_the_ranks_and_one_process_goes_on(place, alone):
    told = dict(model=str(place / "base.pth"), data=ROWS, output=str(place), name="asked", **TOLD)
    run, seen = finetune(devices=2, **told | {"max_steps": 10 ** 5, "lr_schedule": "constant", "warmup_steps": 0, "eval_steps": 10 ** 5}), []
    for e in run.steps():
        seen.append(e["event"])
        if e["event"] == "step" and "paused" not in seen: run.pause()
        if e["event"] == "paused": run.unpause()
        if "paused" in seen and e["event"] == "resumed": run.stop()
    assert seen.index("paused") < seen.index("resumed") < seen.index("stopped") == len(seen) - 1
    last = run.events[-1]["step"]
    assert "resume with finetune(name='asked'" in run.events[-1]["message"] and checkpoints(run.folder)[-1] == last and not run.asked_to_stop()
    on = Run.resume(run.folder, devices=1, max_steps=last + 2).fit()
    whole = finetune(**told | {"name": "whole", "max_steps": last + 2, "lr_schedule": "constant", "warmup_steps": 0, "eval_steps": 10 ** 5}).fit()
    close(losses(on), losses(whole))
    assert [e["event"] for e in on.events].count("resumed") == 2


# --- what other processes can't have ---------------------------------------------------------------------------------------

def test_a_model_that_they_cannot_read_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match="^devices: other processes can't read a model that has no file"): list(finetune(model=tiny(), data=ROWS, output=str(tmp_path), devices=2).steps())
    changed = load(place / "base.pth", device="cpu")
    with torch.no_grad(): changed.head.weight += 1
    with pytest.raises(ConfigError, match="^model: it is no longer what .*base.pth holds"): list(finetune(model=changed, data=ROWS, output=str(tmp_path), devices=2).steps())
    assert not list(tmp_path.iterdir())


# --- ends -----------------------------------------------------------------------------------------------------------------

TROUBLE = """
import os, signal
if os.environ.get("RANK") == "1":
    import rwkv_peft.train.loop as loop
    real = loop.take_step
    def take_step(run):
        if run.step == 4: {what}
        return real(run)
    loop.take_step = take_step
"""


@pytest.mark.parametrize("what, words, trace", [
    ("raise ZeroDivisionError('nobody expected this')", "rank 1 ended with ZeroDivisionError: nobody expected this", "in take_step"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was killed by SIGKILL; the system does that when memory runs out", None)])
def test_a_rank_that_dies_ends_the_run(place, tmp_path, monkeypatch, what, words, trace):
    (tmp_path / "sitecustomize.py").write_text(TROUBLE.format(what=what))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run, seen = finetune(model=str(place / "base.pth"), data=ROWS, output=str(tmp_path), name="dies", devices=2, **TOLD), []
    with pytest.raises(TrainingError, match=words) as raised:
        for e in run.steps(): seen.append(e)
    assert seen[-1]["event"] == "error" and seen[-1]["message"] == str(raised.value) and f"checkpoint step-3 is kept" in str(raised.value)
    assert [e["event"] for e in seen].count("error") == 1 and seen == read_events(run.folder / "events.jsonl") and seen[-1]["step"] == 4
    assert (trace in seen[-1]["traceback"]) if trace else "traceback" not in seen[-1]
    assert checkpoints(run.folder)[-1] == 3 and not ranks_in(run.folder)


def test_a_step_that_is_not_finite_is_told_as_ever(place, tmp_path):
    "All ranks meet it, rank 0 says it, with the rows; it is said once."
    run, seen = finetune(model=str(place / "base.pth"), data=ROWS, output=str(tmp_path), name="far", devices=2, **TOLD | {"lr_init": 1e30, "lr_schedule": "constant", "warmup_steps": 0, "grad_clip": 0.}), []
    with pytest.raises(TrainingError, match="^step .*; (start again|look at)") as raised:
        for e in run.steps(): seen.append(e)
    assert [e["event"] for e in seen].count("error") == 1 and seen[-1]["message"] == str(raised.value) and raised.value.rows == seen[-1]["rows"]


def endless(place, name): return [*COMMAND, "tune", f"model={place / 'base.pth'}", f"data={place / 'rows.jsonl'}", f"output={place}", f"name={name}", "devices=2", "r=4", "accumulate=2", "max_steps=100000", "eval_split=0"]


def test_ctrl_c_in_a_shell_and_a_killed_parent(place):
    "Ctrl-C is polite and ends with 130. When nobody is left who could ask, the ranks save and end all the same."
    for name, number in (("ctrl-c", signal.SIGINT), ("orphans", signal.SIGKILL)):
        folder = place / name
        parent = subprocess.Popen(endless(place, name), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: len(steps_in(folder)) > 3 or parent.poll() is not None)
        assert len(ranks_in(folder)) == 3, "the launcher and two ranks"
        parent.send_signal(number)
        out, err = parent.communicate(timeout=120)
        until(lambda: not ranks_in(folder), tell=lambda: (name, [(p.pid, p.ppid(), p.status(), p.cpu_times(), p.info["cmdline"]) for p in ranks_in(folder)], (folder / "ranks/log.txt").read_text(), read_events(folder / "events.jsonl")[-3:]))
        last = read_events(folder / "events.jsonl")[-1]
        assert last["event"] == "stopped" and checkpoints(folder)[-1] == last["step"] == steps_in(folder)[-1], (out, err)
        if number == signal.SIGINT: assert parent.returncode == 130 and f"stopped at step {last['step']}" in out and "Traceback" not in out + err


def test_a_rank_ends_without_python_s_end():
    "Which frees DDP's reducer while gloo's threads may wait for Python's lock. What was printed is not lost."
    code = """
import atexit, torch
from torch import distributed
from rwkv_peft.train.launch import part
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
atexit.register(print, "Python's end")
print("ours", end="")
part()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "ours"), ran.stderr


def test_ranks_leave_with_their_launcher(tmp_path):
    "A process that is killed without a chance to end its children: they end by themselves."
    rank = "import threading, os; from rwkv_peft.train.launch import leave_with; open(str(os.getpid()), 'w').close(); leave_with(os.getppid())"
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; [subprocess.Popen([sys.executable, '-c', {rank!r}]) for _ in range(2)]; sys.stdin.read()"], cwd=tmp_path, stdin=subprocess.PIPE, env=launch.environment(2))
    started = [psutil.Process(int(f.name)) for f in until(lambda: len(list(tmp_path.iterdir())) == 2 and list(tmp_path.iterdir()))]
    parent.kill()
    parent.communicate()
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_leaving_the_loop_early_saves_and_leaves_nobody(place, tmp_path):
    "A run for which the learning rate must be found first, left at its second step."
    run = finetune(model=str(place / "base.pth"), data=ROWS, output=str(tmp_path), name="left", devices=2, peft="state", micro_bsz=4, accumulate=2, max_steps=10 ** 5, eval_split=0.)
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 2: break
    assert run.events[-1]["event"] == "stopped" and checkpoints(run.folder)[-1] == run.events[-1]["step"] and not ranks_in(run.folder)
    assert run.events[0]["config"]["lr_init"] == run.rates["lr"]


# --- two hosts --------------------------------------------------------------------------------------------------------------

HOSTS = """
set -e
ip link set lo up
ip link add va type veth peer name vb
unshare --net sleep 300 & there=$!
trap 'kill $there' EXIT
until [ "$(readlink /proc/$there/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
ip link set vb netns $there
ip addr add 10.123.0.1/24 dev va
ip link set va up
nsenter --net=/proc/$there/ns/net sh -c 'ip link set lo up; ip addr add 10.123.0.2/24 dev vb; ip link set vb up'
nsenter --net=/proc/$there/ns/net "$@" node_rank=1 output=B >B.txt 2>&1 & second=$!
"$@" node_rank=0 output=A >A.txt 2>&1
wait $second
"""


def test_two_hosts(place, alone, tmp_path):
    "Two network namespaces with one cable between them: one process in each, the losses of one process in one, and everything is written on host 0."
    told = [f"{k}={v}" for k, v in TOLD.items()]
    command = [*COMMAND, "tune", f"model={place / 'base.pth'}", f"data={place / 'rows.jsonl'}", "name=hosts", "devices=1", "nodes=2", "master=10.123.0.1:29500", *told]
    space = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    try: tried = subprocess.run([*space, "ip", "link", "add", "va", "type", "veth", "peer", "name", "vb"], capture_output=True, text=True)
    except FileNotFoundError as error: pytest.fail(f"two hosts are two network namespaces here, and {error.filename} is missing; apt-get install iproute2 util-linux")
    assert tried.returncode == 0, f"two hosts are two network namespaces here, and this user may not make them ({tried.stderr.strip()}); allow user namespaces, or run the tests as root"
    ran = subprocess.run([*space, "sh", "-c", HOSTS, "sh", *command], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    first, second = [Path(tmp_path, f).read_text() for f in ("A.txt", "B.txt")]
    assert ran.returncode == 0, ran.stderr + first + second
    events = read_events(tmp_path / "A/hosts/events.jsonl")
    close([e["loss"] for e in of(events, "step")], losses(alone))
    assert events[-1]["event"] == "done" and "hosts: done, step 6 of 6" in first and (tmp_path / "A/hosts/adapter").is_dir()
    assert "host 1 has done its part" in second and not (tmp_path / "B/hosts/events.jsonl").exists() and not (tmp_path / "B/hosts/adapter").exists()
