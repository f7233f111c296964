"Any strategy, any number of ranks: the numbers of plain training in one process."
import json
import math
import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
import pytest
import torch
from rwkv_peft.data.records import read_data
from rwkv_peft.model.checkpoint import load, save
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.events import read_events
from rwkv_peft.train.folder import checkpoints, load_checkpoint
from rwkv_peft.train.loop import Run, TrainingError, finetune
from test_train import ROWS, losses, tiny

torch.set_num_threads(1)
ZERO = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3", "deepspeed_stage_3_offload"]
METHODS = {"full": dict(peft="none", lr_init=1e-3), "lora": dict(peft="lora", r=4, lr_init=1e-2, optim="loraplus"), "qlora": dict(peft="lora", r=4, lr_init=1e-2, quant="nf4", weight_decay=.1), "state": dict(peft="state", lr_init=1e-1)}
SPLITS = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}
FEW = [{"prompt": "a", "completion": "b"}, {"prompt": "and", "completion": " so on and so on, to the end of it"}, {"prompt": "a longer question?", "completion": " no"}, {"prompt": "x", "completion": " yz" * 9}]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_all(folder: Path, tasks: list[dict], world: int) -> dict:
    "What came of each task, by name, when `world` processes make them one after the other. `error`: what a failing start wrote."
    out = folder / f"results-{world}"
    out.mkdir()
    (out / "tasks.json").write_text(json.dumps(tasks))
    script = [str(Path(__file__).parent / "strategy_runs.py"), str(out), str(out / "tasks.json")]
    start = [sys.executable] if world == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([*start, *script], capture_output=True, text=True, timeout=400, env={**clean, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning:deepspeed"})
    found = {t["name"]: json.loads(p.read_text()) for i, t in enumerate(tasks) if (p := out / f"{i}-{t['name']}.json").exists()}
    return found | {"error": done.stderr, "said": done.stdout, "rc": done.returncode}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    save(tiny(), folder / "base.pth")
    for name, rows in (("rows", ROWS), ("few", FEW)): (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return folder


def told(place, name, data="rows", **settings):
    return dict(model=str(place / "base.pth"), data=str(place / f"{data}.jsonl"), micro_bsz=2, accumulate=2, max_steps=20, eval_split=0., save_steps=50, output=str(place), name=name, device="cpu") | settings


@pytest.fixture(scope="module")
def alone(place):
    tasks = [told(place, f"{method}-{s}", strategy=s, **METHODS[method]) for method, s in product(METHODS, ["auto", *ZERO])]
    tasks += [told(place, f"{name}-auto", "few", micro_bsz=m, accumulate=a, max_steps=5, strategy="auto", **METHODS["lora"]) for name, (m, a) in SPLITS.items()]
    tasks += [told(place, "idle-auto", "few", micro_bsz=2, accumulate=3, max_steps=5, **METHODS["full"])]
    tasks += [told(place, "held-auto", eval_split=.3, eval_steps=5, **METHODS["lora"]), told(place, "chain", strategy="auto", stop=5, **METHODS["lora"])]
    return run_all(place, tasks, 1)


@pytest.fixture(scope="module")
def pair(place, alone):
    tasks = [told(place, f"lora-2-{s}", strategy=s, **METHODS["lora"]) for s in ["auto", *ZERO]]
    tasks += [told(place, f"{method}-2-{s}", strategy=s, **METHODS[method]) for method, s in (("full", "ddp"), ("full", "deepspeed_stage_3"), ("qlora", "deepspeed_stage_3"), ("state", "deepspeed_stage_2"))]
    tasks += [told(place, f"{name}-2-{s}", "few", micro_bsz=m, accumulate=a, max_steps=5, strategy=s, **METHODS["lora"]) for (name, (m, a)), s in product(SPLITS.items(), ("auto", "deepspeed_stage_3"))]
    tasks += [told(place, "idle-2-auto", "few", micro_bsz=2, accumulate=3, max_steps=5, **METHODS["full"])]
    tasks += [told(place, "held-2-auto", eval_split=.3, eval_steps=5, **METHODS["lora"]), told(place, "held-2-3", eval_split=.3, eval_steps=5, strategy="deepspeed_stage_3", sample_prompts=["1 +"], **METHODS["lora"])]
    tasks += [dict(name="chain", output=str(place), resume=dict(strategy=s), stop=stop) for s, stop in (("deepspeed_stage_3", 9), ("ddp", 13))]
    tasks += [told(place, "dying", save_steps=2, eval_split=0., die=[1, 5], **METHODS["lora"])]
    return run_all(place, tasks, 2)


def same(a, b): return len(a) == len(b) and all(abs(x - y) <= 1e-5 * abs(y) for x, y in zip(a, b))


@pytest.mark.parametrize("method", METHODS)
def test_one_process(alone, method):
    "20 steps of every strategy, in worker threads of one process; afterwards nothing of DeepSpeed is left in the model."
    plain = alone[f"{method}-auto"]
    assert len(set(plain["loss"])) == 20 and min(plain["norm"]) > 0
    for s in ZERO:
        found = alone[f"{method}-{s}"]
        assert same(found["loss"], plain["loss"]) and same(found["norm"], plain["norm"]) and found["rows"] == plain["rows"] and found["end"] == "done", s
        assert found["parameters"] and found["left"] == [] and found["whole"] == plain["whole"] and found["LOCAL_RANK"] is None, s


def test_two_processes(alone, pair):
    names = [n for n in pair if "-2-" in n and n.split("-")[0] in METHODS]
    assert len(names) == 10, pair["error"]
    for name in names:
        found, plain = pair[name], alone[f"{name.split('-')[0]}-auto"]
        assert found["world"] == 2 and same(found["loss"], plain["loss"]) and same(found["norm"], plain["norm"]) and found["tokens"] == plain["tokens"] and found["rows"] == plain["rows"], name


def test_splits_of_a_step(alone, pair):
    "The same four rows, with very different numbers of trained tokens, as 4x1, 2x2 and 1x4; with 4x1 the second rank is idle."
    plain = alone["4x1-auto"]
    assert same(alone["2x2-auto"]["loss"], plain["loss"]) and same(alone["1x4-auto"]["norm"], plain["norm"])
    assert same(pair["idle-2-auto"]["loss"], alone["idle-auto"]["loss"]) and same(pair["idle-2-auto"]["norm"], alone["idle-auto"]["norm"]), "three micro-batches on two ranks, all weights"
    for name in [n for n in pair if n.split("-")[0] in SPLITS]: assert same(pair[name]["loss"], plain["loss"]) and same(pair[name]["norm"], plain["norm"]), name


def test_held_out_loss_is_shared(alone, pair):
    "12 held-out rows in two batches of up to 8, one a rank; the numbers, and so the best step, are those of one process."
    for name in ("held-2-auto", "held-2-3"): assert len(pair[name]["eval"]) == 5 and same(pair[name]["eval"], alone["held-auto"]["eval"]) and same(pair[name]["loss"], alone["held-auto"]["loss"])


def test_only_rank_0_writes_and_speaks(place, pair):
    events = read_events(place / "held-2-3" / "events.jsonl")
    said = [e["message"] for e in read_events(place / "4x1-2-auto" / "events.jsonl") if e["event"] == "warning"]
    assert "2 processes share 1 micro-batch a step, so 1 of them have nothing to do" in " ".join(said)
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 21)) and sum(e["event"] == "start" for e in events) == 1
    assert len([e for e in events if e["event"] == "sample"]) == 5 and len(read_events(place / "held-2-3" / "samples.jsonl")) == 5
    assert not [p.name for p in (place / "held-2-3").rglob("*.part*")]


def test_quiet(alone, pair):
    for text in (alone["error"], alone["said"]): assert "laio" not in text and "Warning" not in text and "deepspeed" not in text.lower(), text
    assert "laio" not in pair["error"] and "FutureWarning" not in pair["error"]


def test_a_rank_that_dies_ends_the_run(place, pair, alone):
    "Its message is there, the last checkpoint stands, and the run goes on from it, on one process."
    assert pair["rc"] != 0 and "this rank dies" in pair["error"] and "dying" not in pair
    assert checkpoints(place / "dying") == [2, 4]
    run = Run.resume(place / "dying").fit()
    assert same(losses(run), alone["lora-auto"]["loss"]) and run.events[-1]["event"] == "done"


def test_resumed_with_other_strategies_on_other_ranks(place, alone, pair):
    "Plain to step 5; on two processes ZeRO-3 to 9 and DDP to 13; here ZeRO-1 to 16 and ZeRO-2 with offload to 20: the losses of one plain run."
    assert alone["chain"]["end"] == "stopped" and pair["chain"]["end"] == "stopped" and len(pair["chain"]["loss"]) == 13
    for s, stop in (("deepspeed_stage_1", 16), ("deepspeed_stage_2_offload", None)):
        run = Run.resume(place / "chain", strategy=s)
        for e in run.steps():
            if e["event"] == "step" and e["step"] == stop: run.stop()
    assert same(losses(run), alone["lora-auto"]["loss"]) and run.events[-1]["event"] == "done" and "LOCAL_RANK" not in os.environ
    assert "".join(run.model.generate("1 +", max_tokens=4)) is not None and type(run.model.blocks[0]._parameters) is dict


def test_a_checkpoint_holds_names_whatever_the_strategy(place, alone, pair):
    "The same tensors and moments, by parameter, from plain training, ZeRO-3 on one process and on two."
    (want, told), *others = [load_checkpoint(place / name) for name in ("lora-auto", "lora-deepspeed_stage_3", "lora-2-deepspeed_stage_3", "lora-2-deepspeed_stage_2_offload")]
    assert set(told["moments"]) == set(want) and set(next(iter(told["moments"].values()))) == {"step", "exp_avg", "exp_avg_sq"}
    for tensors, training in others:
        assert all(torch.allclose(tensors[n], x, rtol=1e-4, atol=1e-6) for n, x in want.items()) and set(tensors) == set(want)
        for n, kept in told["moments"].items(): assert all(torch.allclose(training["moments"][n][k], x, rtol=1e-3, atol=1e-7) and training["moments"][n][k].shape == x.shape for k, x in kept.items()), n
    assert len(others[1][1]["random"]) == 2


@pytest.mark.parametrize("settings, words", [(dict(optim="lorafa"), "optim: 'lorafa' looks at the A"), (dict(optim="adamw8bit"), "optim: 'adamw8bit' keeps scales"), (dict(optim="apollo", peft="none"), "optim: 'apollo' looks at whole matrices"),
                                             (dict(precision="fp16"), "precision: 'fp16'")])
def test_what_cannot_be_divided_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words): Config(model="rwkv7-tiny", data=ROWS, strategy="deepspeed_stage_2", **settings)
    if "optim" in settings: assert Config(model="rwkv7-tiny", data=ROWS, strategy="ddp", **settings).strategy == "ddp"


def test_refused_before_anything_is_written(place, tmp_path):
    with pytest.raises(Exception, match="LISA: strategy='deepspeed_stage_1'"): finetune(**told(place, "no", output=str(tmp_path)) | dict(peft="lisa", strategy="deepspeed_stage_1")).fit()
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="trains weights of float32, and .* is float64"):
        finetune(**told(place, "double", output=str(tmp_path)) | dict(model=load(place / "base.pth", device="cpu", dtype=torch.float64), strategy="deepspeed_stage_2")).fit()


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_broken_row_is_named_and_not_learnt(tmp_path, strategy):
    "An infinite weight: the step that meets it is refused before DeepSpeed updates, and the model is as the checkpoint has it."
    data = read_data(ROWS, Bytes())
    data[7].weights[-1] = math.inf
    run = finetune(model=tiny(), data=data, r=4, lr_init=1e-2, micro_bsz=2, accumulate=2, max_steps=10, save_steps=1, eval_split=0., strategy=strategy, output=str(tmp_path), name="bad")
    with pytest.raises(TrainingError, match="because of row 7.*nothing was updated"): run.fit()
    tensors, _ = load_checkpoint(run.folder)
    assert run.step == checkpoints(run.folder)[-1] > 0 and all(torch.equal(tensors[n], p) for n, p in run.trained.items()) and "LOCAL_RANK" not in os.environ
