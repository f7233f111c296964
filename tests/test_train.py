"The loop against oracles: PyTorch's own loss, other ways to split a step, a disk that is full, rows that are broken."
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
import numpy as np
import pytest
import torch
from torch.nn import functional as F
import rwkv_peft.train.folder as folder_module
from rwkv_peft.data.batches import batches
from rwkv_peft.data.records import read_data
from rwkv_peft.model.checkpoint import load, read, save
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.state import load_state
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.peft.adapters import attach, detach, load_adapter, trained_parameters
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.peft.state_tuning import StateTuning
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.evaluate import evaluate, trained_bytes
from rwkv_peft.train.events import EventLog, event, read_events, timeline
from rwkv_peft.train.folder import checkpoints, load_checkpoint
from rwkv_peft.train.loop import Run, TrainingError, finetune
from rwkv_peft.train.lr_finder import find_lr
from rwkv_peft.train.optim import lr_at, make_optimizer, parameter_groups

torch.set_num_threads(1)
ROWS = [{"prompt": f"{i} + {i % 7} =", "completion": f" {i + i % 7}{'!' * (i % 5)}"} for i in range(40)]


def tiny(seed=0, dtype=torch.float32):
    "A small model with noise everywhere, so that every path carries a gradient."
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    torch.set_rng_state(state)
    return model.to(dtype)


def make(folder, **settings):
    base = dict(model=tiny(), data=ROWS, forget_data="none", r=4, lr_init=1e-2, micro_bsz=2, accumulate=2, max_steps=8, eval_split=.2, eval_steps=2, output=str(folder), name="run")
    return finetune(**{k: v for k, v in (base | settings).items() if v is not None})


def of(events, kind): return [e for e in events if e["event"] == kind]
def losses(run): return [e["loss"] for e in of(timeline(run.events), "step")]


# --- loss ---------------------------------------------------------------------------------------------------------------------

def test_step_loss_is_pytorchs(tmp_path):
    "The reported loss of the first step, and of step 0's evaluation, recomputed from full logits by F.cross_entropy."
    run = make(tmp_path, max_steps=1, eval_steps=1)
    seen = list(run.steps())
    base = tiny()
    def oracle(examples):
        kept, wanted = [], []
        for e in examples:
            logits = base(e.tokens[None, :-1])[0][0]
            on = e.weights[1:] > 0
            kept.append(logits[on]), wanted.append(e.tokens[1:][on])
        return F.cross_entropy(torch.cat(kept), torch.cat(wanted)).item()
    step = of(seen, "step")[0]
    assert abs(step["loss"] - oracle([run.data[i] for i in step["rows"]])) < 1e-5
    assert abs(of(seen, "eval")[0]["loss"] - oracle(run.held_out)) < 1e-5 and len(step["rows"]) == 4


@pytest.mark.parametrize("peft", ["lora", "state", "none"])
def test_accumulation_changes_nothing(tmp_path, peft):
    "Rows of very different length: 1 x 4, 2 x 2 and 4 x 1 give the same losses and the same gradient norms, step after step."
    found = {}
    for n, micro in enumerate((4, 2, 1)):
        order = read_data(ROWS, Bytes())
        order.examples.sort(key=lambda e: e.length)
        run = make(tmp_path, name=f"{peft}{micro}", peft=peft, r=None, data=order, micro_bsz=micro, accumulate=4 // micro, eval_split=0., lr_init=1e-3, max_steps=1)
        # one step over the same rows: the order of batches depends on micro_bsz, so the rows are chosen here
        list(run.steps())
        run.model.zero_grad()
        run.step, rows = 0, [0, 11, 23, 39]
        from rwkv_peft.data.batches import collate
        from rwkv_peft.train.loss import accumulate, trained_tokens
        parts = [collate([run.data[i] for i in rows[j:j + micro]]) for j in range(0, 4, micro)]
        restore = {k: p.detach().clone() for k, p in run.trained.items()} if n == 0 else restore
        with torch.no_grad():
            for k, p in run.trained.items(): p.copy_(restore[k])
        loss = accumulate(run.model, parts, run.accelerator.backward).sum() / trained_tokens(parts)
        found[micro] = loss.item(), torch.cat([p.grad.flatten() for p in run.trained.values()])
    for micro in (2, 1):
        assert abs(found[micro][0] - found[4][0]) < 1e-6 * abs(found[4][0]) + 1e-6
        assert (found[micro][1] - found[4][1]).norm() < 1e-6 * found[4][1].norm() + 1e-7


def test_evaluation_is_token_weighted_and_per_byte():
    model, data = tiny(), read_data(ROWS, Bytes())
    got = [evaluate(model, data, micro_bsz=n) for n in (1, 7)]
    assert abs(got[0]["loss"] - got[1]["loss"]) < 1e-5
    assert trained_bytes(data, Bytes()) == sum(len(r["completion"].encode()) for r in ROWS)
    nats = got[0]["loss"] * got[0]["tokens"]
    assert math.isclose(got[0]["bits_per_byte"], nats / math.log(2) / trained_bytes(data, Bytes()), rel_tol=1e-9)
    assert got[0]["tokens"] == sum(len(r["completion"].encode()) + 1 for r in ROWS)      # the end of a document is learnt too


def test_evaluation_leaves_the_model_as_it_was():
    model, data = tiny(), read_data(ROWS, Bytes())
    attach(model, LoRA(r=4, dropout=.5))
    model.train()
    state = torch.get_rng_state()
    assert evaluate(model, data)["loss"] == evaluate(model, data)["loss"] and model.training
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate(model, data, stop=lambda: True) is None


# --- schedule and optimiser ---------------------------------------------------------------------------------------------------

def test_learning_rates_by_hand():
    assert [lr_at(i, 5, 1., .1, "linear") for i in range(5)] == pytest.approx([1, .775, .55, .325, .1])
    assert [lr_at(i, 5, 1., .1, "constant", 2) for i in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert lr_at(50, 101, 1., .1, "cos") == pytest.approx(.55) and lr_at(50, 101, 1., .01, "exp") == pytest.approx(.1)
    assert lr_at(80, 101, 1., .1, "wsd") == 1 and lr_at(100, 101, 1., .1, "wsd") == pytest.approx(.1)


def test_groups_follow_the_rules():
    model = tiny()
    groups = parameter_groups(model.named_parameters(), .1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(n for g in groups for n in [names[id(p)] for p in g["params"]]) == sorted(names.values())
    for g in groups:
        for n in (names[id(p)] for p in g["params"]):
            assert g["lr_scale"] == (2 if n.endswith("att.w0") else 1), n
            assert g["weight_decay"] == (0 if n.split(".")[-1] in ("bias", "r_k", "w0", "a0", "v0", "k_k", "k_a", "x_r", "x_w", "x_k", "x_v", "x_a", "x_g") or "ln" in n else .1), n


def test_clipping_bounds_the_gradient_and_reports_it_unclipped(tmp_path):
    run = make(tmp_path, peft="none", r=None, grad_clip=.01, max_steps=1)
    asked, seen = run.steps(), []
    next(asked)                                      # start: the optimiser is there now
    def spy(real=run.optimizer.step):
        seen.append(torch.cat([p.grad.flatten() for p in run.trained.values()]).norm().item())
        real()
    run.optimizer.step = spy
    step = of(asked, "step")[0]
    assert step["grad_norm"] > 1 and seen == [pytest.approx(.01, rel=1e-3)]


def test_finder_is_deterministic_and_leaves_no_trace():
    for method in (StateTuning(), LoRA(r=4)):
        model = tiny()
        attach(model, method)
        trained, whole = trained_parameters(model), {n: p.detach().clone() for n, p in model.named_parameters()}
        found = [find_lr(model, read_data(ROWS, Bytes()), trained, micro_bsz=4) for _ in range(2)]
        assert found[0] == found[1] and 1e-5 <= found[0]["lr"] <= 1 and len(found[0]["rates"]) <= 15
        assert all(torch.equal(p, whole[n]) and p.grad is None for n, p in model.named_parameters())


def test_state_tuning_asks_the_finder(tmp_path):
    run = make(tmp_path, peft="state", r=None, lr_init=None, max_steps=4, micro_bsz=4)
    assert run.plan()["lr_init"] is None
    list(run.steps())
    assert run.plan()["lr_init"] == run.rates["lr"] and Config.from_toml(run.folder / "config.toml", model="x", data=ROWS).lr_init == run.rates["lr"]
    assert set(load_state(run.folder / "state.pth")) == set(run.trained)


# --- the run ------------------------------------------------------------------------------------------------------------------

def test_events_and_folder(tmp_path):
    run = make(tmp_path, sample_prompts=["1 + 1 ="])
    assert not run.folder.exists() and run.plan()["steps"] == 8 and not run.folder.exists()
    seen = list(run.steps())
    assert read_events(run.folder / "events.jsonl") == seen == run.events
    assert [e["step"] for e in of(seen, "step")] == list(range(1, 9)) and [e["step"] for e in of(seen, "eval")] == [0, 2, 4, 6, 8]
    assert set(seen[0]) >= {"config", "versions", "plan", "data"} and seen[0]["plan"]["trained"] == sum(p.numel() for p in run.trained.values())
    assert of(seen, "eval")[-1]["loss"] < of(seen, "eval")[0]["loss"]
    names = {p.name for p in run.folder.iterdir()}
    assert names == {"config.toml", "data", "events.jsonl", "checkpoints", "eval.jsonl", "adapter", "samples.jsonl"}
    assert not list(run.folder.rglob("*.part")) and not list(run.folder.rglob(".*"))
    samples = of(seen, "sample")
    assert len(samples) == 5 and samples[0]["base"] == samples[0]["text"] == samples[-1]["base"]
    assert run.report()["after"]["loss"] == min(e["loss"] for e in of(seen, "eval")) and run.report()["status"] == "done"
    again = load_adapter(tiny(), run.folder / "adapter")
    assert evaluate(again, run.held_out)["loss"] == pytest.approx(run.report()["after"]["loss"], abs=1e-6)


def test_full_training_saves_a_whole_model(tmp_path):
    run = make(tmp_path, peft="none", r=None, lr_init=1e-3)
    list(run.steps())
    tensors, _ = load_checkpoint(run.folder)
    assert set(tensors) == set(dict(tiny().named_parameters())) and not (run.folder / "adapter").exists()
    saved = load(run.folder / "model.pth", device="cpu", dtype=torch.float32)
    assert evaluate(saved, run.held_out)["loss"] == pytest.approx(run.report()["after"]["loss"], abs=1e-6)


def test_nothing_is_pickled(tmp_path):
    run = make(tmp_path, max_steps=2)
    list(run.steps())
    for file in run.folder.rglob("*"):
        if file.suffix == ".pth": assert torch.load(file, weights_only=True)
        elif file.is_file(): assert file.suffix in (".safetensors", ".json", ".jsonl", ".toml", ".md", ".bin", ".idx"), file      # .bin and .idx are numbers one after another, mapped by numpy


def test_epochs_are_whole(tmp_path):
    "Three epochs of 40 rows, 12 rows a step: 10 steps, each row three times, the last step shorter."
    run = make(tmp_path, max_steps=None, epochs=3, micro_bsz=4, accumulate=3, eval_split=0.)
    rows = [i for e in run.steps() if e["event"] == "step" for i in e["rows"]]
    assert sorted(rows) == sorted(list(range(40)) * 3) and run.step == 10
    assert make(tmp_path, name="half", max_steps=None, epochs=.5, eval_split=0.).plan()["steps"] == 5


def test_second_run_in_the_same_process(tmp_path):
    first, second = make(tmp_path, name="a"), make(tmp_path, name="b")
    list(first.steps()), list(second.steps())
    assert losses(first) == losses(second)


def test_a_run_neither_hears_nor_disturbs_the_notebooks_random_numbers(tmp_path):
    quiet, noisy = make(tmp_path, name="a", dropout=.3), make(tmp_path, name="b", dropout=.3)
    list(quiet.steps())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    for e in noisy.steps(): pass
    mine = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert mine == (torch.rand(1).item(), random.random(), np.random.rand()) and losses(noisy) == losses(quiet)
    shaken = make(tmp_path, name="c", dropout=.3)
    for e in shaken.steps(): torch.rand(3), random.random(), np.random.rand()
    assert losses(shaken) == losses(quiet)


def test_looking_changes_nothing(tmp_path):
    often, never = make(tmp_path, name="a", dropout=.2, eval_steps=3, sample_prompts=["1"]), make(tmp_path, name="b", dropout=.2, eval_steps=100)
    list(often.steps()), list(never.steps())
    assert losses(often) == losses(never)


def test_early_stop_keeps_the_best(tmp_path):
    "A rate that spoils the model: the run ends after three evaluations without progress and gives back the best weights."
    run = make(tmp_path, lr_init=.05, lr_schedule="constant", max_steps=60, early_stop=3, keep=1)
    seen = list(run.steps())
    evals, done = of(seen, "eval"), seen[-1]
    best = min(evals, key=lambda e: e["loss"])
    assert done["event"] == "done" and done["step"] < 60 and done["best_step"] == best["step"] and evals.index(best) == len(evals) - 4
    assert evaluate(run.model, run.held_out)["loss"] == pytest.approx(best["loss"], abs=1e-6)
    assert best["step"] in checkpoints(run.folder) and len(checkpoints(run.folder)) <= 2
    assert f"step {best['step']}" in done["message"] and "no lower held-out loss in 3" in done["message"]


def test_training_that_only_harms_gives_back_the_base(tmp_path):
    say = lambda letter: [{"prompt": f"{i}", "completion": letter * 12} for i in range(8)]
    run = make(tmp_path, data=say("a"), eval_data=say("z"), lr_init=.05, early_stop=2, max_steps=20)
    done = list(run.steps())[-1]
    assert done["best_step"] == 0 and "did not help" in done["message"]
    assert evaluate(run.model, run.held_out)["loss"] == pytest.approx(of(run.events, "eval")[0]["loss"], abs=1e-6)


def test_without_held_out_rows_it_says_so(tmp_path):
    run = make(tmp_path, eval_split=0., max_steps=2)
    seen = list(run.steps())
    assert of(seen, "warning") and not of(seen, "eval") and seen[-1]["best_step"] is None and seen[-1]["event"] == "done"


@pytest.mark.parametrize("peft", ["lora", "pissa", "state", "none"])
def test_a_stopped_run_leaves_what_it_has_learnt(tmp_path, peft):
    "The results hold the weights of the step at which it stopped, as the checkpoint beside them does, and a later end replaces them."
    save(tiny(), tmp_path / "small.pth")
    run = make(tmp_path / "runs", model=str(tmp_path / "small.pth"), peft=peft, max_steps=9, r=None)
    for event in run.steps():
        if event["event"] == "step" and event["step"] == 3: run.stop()
    said, x = run.events[-1], torch.arange(1, 9)[None]
    assert said["event"] == "stopped" and said["step"] == 3 and "whose weights are kept" in said["message"]
    def told(names):
        if names == ["model.pth"]: return load(run.folder / "model.pth")(x)[0]
        model = load(tmp_path / "small.pth")
        load_adapter(model, run.folder / "adapter")
        return model(x)[0]
    first = told(said["results"])
    assert torch.equal(first, run.model(x)[0]) and not torch.equal(first, load(tmp_path / "small.pth")(x)[0])
    done = Run.resume(run.folder).fit()
    assert done.events[-1]["event"] == "done" and not torch.equal(told(done.events[-1]["results"]), first)


def test_stop_pause_and_leaving_early(tmp_path):
    run = make(tmp_path, max_steps=30)
    kinds = []
    for e in run.steps():
        kinds.append(e["event"])
        if e["event"] == "step" and e["step"] == 2:
            run.pause()
            threading.Timer(.3, run.unpause).start()
        if e["event"] == "step" and e["step"] == 4: run.stop()
    assert kinds[-1] == "stopped" and "paused" in kinds and run.step == 4 and checkpoints(run.folder)[-1] == 4
    assert "resume=True" in run.events[-1]["message"] and "step 4 of 30" in run.events[-1]["message"]
    for e in run.steps():                                        # the same object goes on
        if e["event"] == "step" and e["step"] == 7: break        # and walking away saves
    assert checkpoints(run.folder)[-1] == 7 and run.events[-1]["event"] == "stopped"
    assert [e["step"] for e in of(timeline(run.events), "step")] == [1, 2, 3, 4, 5, 6, 7]


def test_in_a_thread_and_awaited(tmp_path):
    import asyncio
    run = make(tmp_path, max_steps=3)
    async def wait(): return await run
    assert asyncio.run(wait()) is run and run.events[-1]["event"] == "done"
    bad = make(tmp_path, name="bad", max_steps=3, lr_init=1e30, eval_split=0., warmup_steps=0)
    bad.start()
    with pytest.raises(TrainingError): bad.wait()


def slowly(run, seconds=.1):
    "Lets `run` take its time at each event."
    steps = run.steps
    def slow():
        for e in steps():
            time.sleep(seconds)
            yield e
    run.steps = slow
    return run


def test_an_interrupt_while_waiting_leaves_the_run_going_and_it_can_be_waited_for_again(tmp_path):
    import _thread
    run = slowly(make(tmp_path, max_steps=8)).start()
    threading.Timer(.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt): run.wait()
    assert run.thread.is_alive() and run.wait(.01) is run and not of(run.events, "done")
    with pytest.raises(TrainingError, match="going already"): run.start()
    assert run.wait().events[-1]["event"] == "done" and run.error is None
    run.wait().start().wait()                                    # the moment it has ended it can go on


def test_waiting_covers_the_last_card(tmp_path):
    import asyncio
    from rwkv_peft.notebook.worker import Worker
    class Slow:
        drawn = 0
        def take(self, event): pass
        def end(self, error, blind): time.sleep(.3); self.drawn += 1
    for how in ("wait", "await"):
        run, view = make(tmp_path, name=how, max_steps=1), Slow()
        run.thread = Worker(run, view)
        run.thread.start()
        async def wait(): return await run
        if how == "wait": run.wait()
        else: asyncio.run(wait())
        assert view.drawn == 1 and run.events[-1]["event"] == "done"


# --- faults -------------------------------------------------------------------------------------------------------------------

def test_a_broken_row_is_named_and_not_learnt(tmp_path):
    data = read_data(ROWS, Bytes())
    data[7].weights[-1] = math.inf
    run = make(tmp_path, data=data, eval_split=0., max_steps=20, micro_bsz=2)
    with pytest.raises(TrainingError, match="row 7") as caught: run.fit()
    said = run.events[-1]
    assert said["event"] == "error" and said["rows"] == [7] == caught.value.rows and said["text"][0].strip("\0") == "7 + 0 = 7!!"
    assert "\n" not in str(caught.value) and "checkpoint" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in run.trained.values())
    assert read_events(run.folder / "events.jsonl")[-1] == said


def test_a_rate_that_explodes_is_blamed_on_the_rate(tmp_path):
    run = make(tmp_path, peft="none", r=None, lr_init=1e30, warmup_steps=0, max_steps=9, eval_steps=100, eval_split=.1)
    with pytest.raises(TrainingError, match="lower lr_init") as caught: run.fit()
    assert checkpoints(run.folder) == [0] and "step-0 is kept" in str(caught.value)
    tensors, _ = load_checkpoint(run.folder)
    assert all(torch.equal(tensors[n], p) for n, p in tiny().named_parameters())


@pytest.mark.parametrize("fault", ["write_safetensors", "torch_save"])
def test_disk_full_leaves_the_older_checkpoint(tmp_path, monkeypatch, fault):
    run = make(tmp_path, max_steps=8)
    seen = []
    def full_file(tensors, path, *rest):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    def full_torch(value, path, *rest):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    with pytest.raises(TrainingError) as caught:
        for e in run.steps():
            seen.append(e)
            if e["event"] == "saved" and e["step"] == 2:
                if fault == "write_safetensors": monkeypatch.setattr(folder_module, "write_safetensors", full_file)
                else: monkeypatch.setattr(folder_module.torch, "save", full_torch)
    assert seen[-1]["event"] == "error" and "step-4" in str(caught.value) and "make room" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoints(run.folder) == [0, 2] and not list(run.folder.rglob("*.part"))
    whole = make(tmp_path, name="whole", max_steps=8)
    list(whole.steps())
    resumed = Run.resume(run.folder, model=tiny())
    list(resumed.steps())
    assert losses(resumed) == losses(whole)


def test_a_file_size_limit_ends_a_run_with_one_sentence(tmp_path):
    "A real refusal of the system: a process that may write no file above 60 kB, in a run whose checkpoints are larger once the optimiser has its moments."
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_train import make, TrainingError
run = make({str(tmp_path)!r}, peft="none", r=None, lr_init=1e-3, eval_split=0., save_steps=2, eval_steps=100)
try:
    for e in run.steps():
        if e["event"] == "step" and e["step"] == 3:
            size = max(f.stat().st_size for f in (run.folder / "checkpoints" / "step-2").iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 5000, size - 5000))
except TrainingError as error: print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.strip().splitlines()) == 1 and "step-4 could not be written" in ran.stdout, ran.stdout
    assert checkpoints(tmp_path / "run") == [2] and load_checkpoint(tmp_path / "run")[1]["step"] == 2
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["event"] == "error"


def test_event_log_survives_a_torn_line_and_a_full_disk(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events.jsonl")
    log.add(event("warning", message="早 " + "é" * 5))
    with open(log.path, "ab") as file: file.write(b'{"event": "st')
    assert len(read_events(log.path)) == 1
    log = EventLog(log.path)
    import builtins
    real = open
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *_): self.f.close()
        def write(self, data): self.f.write(data[:5]); raise OSError(28, "No space left on device")
    monkeypatch.setattr(builtins, "open", lambda p, mode="r", *a, **k: Full(real(p, mode, *a, **k)) if mode == "ab" else real(p, mode, *a, **k))
    with pytest.raises(OSError): log.add(event("warning", message="two"))
    monkeypatch.undo()
    log.add(event("warning", message="three"))
    assert [e["message"] for e in read_events(log.path)] == ["早 ééééé", "three"]


# --- refusals before anything heavy -------------------------------------------------------------------------------------------

def test_a_taken_name_is_refused(tmp_path):
    list(make(tmp_path, max_steps=1).steps())
    with pytest.raises(ConfigError, match="name: .*holds a run already.*resume = True"): make(tmp_path)


def test_a_model_with_adapters_is_refused(tmp_path):
    run = make(tmp_path, max_steps=1)
    list(run.steps())
    for peft in ("lora", "none"):
        with pytest.raises(ConfigError, match=r"model: .*merge\(model\).*detach\(model\)"): make(tmp_path, name="b", model=run.model, peft=peft, r=None).plan()
    with pytest.raises(ConfigError, match=r"model: .*merge\(model\).*detach\(model\)"): Run.resume(make_and_stop(tmp_path, "d"), model=run.model).plan()
    detach(run.model)
    make(tmp_path, name="c", model=run.model).plan()


def make_and_stop(tmp_path, name):
    "The folder of a run that was stopped after a step."
    run = make(tmp_path, name=name, max_steps=5)
    for e in run.steps():
        if e["event"] == "step": run.stop()
    return run.folder


def test_rows_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch):
    import rwkv_peft.train.loop as loop
    save(tiny(), tmp_path / "base.pth")
    monkeypatch.setattr(loop, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "no"}\n')
    with pytest.raises(ValueError, match="line 2"): make(tmp_path, model=str(tmp_path / "base.pth"), data=str(bad)).plan()
    with pytest.raises(ValueError, match="ctx_len"): make(tmp_path, model=str(tmp_path / "base.pth"), ctx_len=4).plan()
    with pytest.raises(ValueError): make(tmp_path, model=str(tmp_path / "missing.pth")).plan()
    assert not (tmp_path / "run").exists()


def test_ctx_len_can_cut_or_drop(tmp_path):
    assert make(tmp_path, ctx_len=12, long="drop", untrained="drop").plan()["rows"] < 32
    assert make(tmp_path, ctx_len=12, long="cut", untrained="drop").plan()["tokens_per_epoch"] <= 12 * 32


def test_eval_data(tmp_path):
    run = make(tmp_path, data=ROWS[:30], eval_data=ROWS[30:], max_steps=1)
    list(run.steps())
    assert len(run.data) == 30 and len(run.held_out) == 10
