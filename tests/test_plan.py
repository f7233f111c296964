"The plan of a step: what is counted, against PyTorch's own hooks, RWKV-PEFT's published tables and measured processes."
import json
import math
import os

import pytest
import torch
from seed_stack import live_peak, live_peaks

from rwkv_peft import finetune
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.bench.memory import saved_bytes
from rwkv_peft.bench.peaks import bench_plan
from rwkv_peft.model.checkpoint import blank
from rwkv_peft.model.quant import quantize
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.peft.adapters import attach
from rwkv_peft.train import plan
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.optim import methods_of
from rwkv_peft.train.plan import Live, cheapest, fits, plan_like, plan_memory, plan_step, replay, strategy_bytes, walk

GiB = 2**30


def settings(**said): return Config(model="rwkv7-tiny", data=[{"text": "x"}], **said)
def small(version="7", layers=3, C=128, V=384): return RWKVConfig(version, layers, C, vocab_size=V)


# ---------------------------------------------------------------- counting

def test_views_cost_nothing_and_what_is_dropped_is_given_back():
    with Live() as live:
        x = torch.empty(1000, 3, device="meta")
        y = x[1:].view(-1)[::7]
        held = live.now
        z = x + 1
        peak = live.now
        del x
        still = live.now
        del y, z
    assert held == math.ceil(12000 / 512) * 512 and peak == still == 2 * held and live.now == 0


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
@pytest.mark.parametrize("said", [{"peft": "lora"}, {"peft": "miss"}, {"peft": "lora", "grad_cp": True}, {"peft": "none"}, {"peft": "state", "quant": "nf4"}], ids=str)
def test_a_ghost_keeps_what_the_model_keeps(version, said):
    "What the forward leaves for the backward, by the hooks of autograd on a real model, and by the count without numbers."
    T, config, sizes = 300, settings(**said), small(version)
    model = RWKV(sizes)
    methods = methods_of(config)
    if methods: attach(model, *methods)
    quantize(model, config.quant)
    model.grad_cp = config.grad_cp is True
    tokens, weights = torch.randint(384, (1, T)), torch.ones(1, T)
    real = saved_bytes(lambda: model.train()(tokens, targets=tokens, weights=weights), [*model.parameters(), *model.buffers()])
    found = walk(config, sizes, T)
    kept = found["peaks"]["loss"] - found["logits"] - found["weights"] - found["optimiser"]
    assert abs(kept - real) < .05 * real + 2**19, (kept, real)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("said", [{"peft": "lora", "quant": "nf4"}, {"peft": "none", "optim": "adamw8bit"}, {"peft": ["lora", "state"], "grad_cp": True, "train_parts": ["ln"]}, {"peft": "pissa"}, {"peft": "dora", "quant": "int8"}], ids=str)
def test_the_line_through_two_and_four_layers_meets_all_of_them(device, said):
    line, whole = (replay(settings(**said), small(layers=7), 130, device, whole=w, accumulated=2)["peaks"] for w in (False, True))
    assert line.keys() == whole.keys()
    for phase in whole: assert line[phase] == pytest.approx(whole[phase], rel=.01), phase


def test_pieces_of_long_rows():
    "Seven pieces walked through, and from three with the states that each further one keeps."
    config = settings(peft="lora", train_type="infctx", chunk_ctx=64)
    short, long = replay(config, small(), 7 * 64 - 5), walk(config, small(), 7 * 64 - 5)
    assert max(short["peaks"].values()) == pytest.approx(max(long["peaks"].values()), rel=.02)


def test_chunk_ctx_is_enough_by_itself():
    "As in a run: pieces are planned where chunk_ctx is said, whatever train_type says; rows no longer than a piece are whole."
    peak = lambda length, **said: max(replay(settings(peft="lora", **said), small(), length)["peaks"].values())
    assert peak(512, chunk_ctx=64) == peak(512, chunk_ctx=64, train_type="infctx") < .7 * peak(512)
    assert peak(64, chunk_ctx=64) == peak(64)


def test_weights_gradients_and_moments_by_hand():
    "Full training in fp32: four bytes of each, and twice that for AdamW."
    sizes = small()
    n = sum(p.numel() for p in blank(sizes).parameters())
    plan = plan_step(settings(peft="none"), sizes, 64)
    for key, times in (("weights", 4), ("gradients", 4), ("optimiser", 8)): assert plan[key] == pytest.approx(times * n, rel=.05), key
    assert plan["peak"] == plan["weights"] + plan["gradients"] + plan["optimiser"] + plan["activations"] and plan["trained"] == n


# ---------------------------------------------------------------- RWKV-PEFT's tables

SHAPES = {"1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)}
TABLE = {"lora": (dict(rank=64, time=True), (7.4, 12.1, 23.7)), "qlora": (dict(rank=64, time=True, packed="nf4"), (5.6, 8.2, 14.9)),
         "state": (dict(state=True), (6.4, 9.4, 18.1)), "state, bf16": (dict(state=True), (6.1, 9.1, 17.8)),
         "state, int8": (dict(state=True, packed="int8"), (4.7, 6.5, 11.9)), "state, nf4": (dict(state=True, packed="nf4"), (4.1, 5.2, 8.5))}      # GB of a GPU, as its README says


@pytest.fixture(scope="module")
def seed():
    "Live bytes of every row and size, as GiB."
    distinct = {json.dumps(how): how for how, _ in TABLE.values()}
    return {(key, size): live_peak(layers, C, **how) / GiB for key, how in distinct.items() for size, (layers, C) in SHAPES.items()}


def test_all_cells_of_the_tables(seed):
    "One constant for what is beside tensors; 18 cells."
    cells = [(seed[json.dumps(how), size], there) for how, row in TABLE.values() for size, there in zip(SHAPES, row)]
    worst = lambda c: max(abs(live + c - there) / there for live, there in cells)
    constant = min((c / 100 for c in range(400)), key=worst)
    assert len(cells) == 18 and worst(constant) < .10, (constant, [(round(live + constant, 2), there) for live, there in cells])


def test_the_stack_grows_in_a_line():
    assert live_peak(7, 256, rank=8, time=True, T=256, V=1024) == pytest.approx(max(live_peaks(7, 256, rank=8, time=True, T=256, V=1024).values()), rel=1e-3)


def test_seven_billion_in_much_less(seed):
    "The same method, length and trained parts; packed, sliced and with moments in 8 bits."
    ours = plan_step(settings(peft="lora", r=64, train_parts=["time", "ln"], quant="nf4", optim="adamw8bit"), RWKVConfig.preset("RWKV6-7B"), 1024, "cuda")
    assert ours["peak"] / GiB < seed[json.dumps(TABLE["lora"][0]), "7B"] - 4, ours["peak"] / GiB


# ---------------------------------------------------------------- several devices, and what fits

def test_strategies():
    "ZeRO-1 on one device: fp32 weight, gradient, its flat copy, the master and two moments, and a bucket; over N ranks what is split adds up to the whole."
    P, frozen = 10**6, 10**9
    one = strategy_bytes("deepspeed_stage_1", P, 8 * P, frozen, 0)
    assert one["weights"] - frozen + one["gradients"] + one["optimiser"] == (4 + 4 + 4 + 4 + 8) * P + 4 * P
    three = strategy_bytes("deepspeed_stage_3", P, 8 * P, frozen, 0, ranks=4, bucket=0)
    assert 4 * sum(three[k] for k in ("weights", "gradients", "optimiser")) == frozen + 20 * P
    off = strategy_bytes("deepspeed_stage_3_offload", P, 8 * P, frozen, 0, ranks=4)
    assert off["weights"] == off["optimiser"] == 0 and 4 * off["ram"] == frozen + 20 * P
    assert [strategy_bytes(s, P, 8 * P, frozen, 0, 2)["ram"] > 0 for s in ("auto", "ddp", "deepspeed_stage_2", "deepspeed_stage_2_offload")] == [False, False, False, True]
    with pytest.raises(ConfigError, match="strategy: 'zero' is not known"): strategy_bytes("zero", 1, 1, 1, 1)


def test_what_fits():
    plan = {"peak": 5, "loading": 7, "outside": (1, 3)}
    assert [fits(plan, n) for n in (7, 8, 9, 10, None)] == [False, None, None, True, None]


def test_the_cheapest_change_is_the_first_that_fits(monkeypatch):
    "On a machine on which it is known to the byte what lies beside the tensors."
    monkeypatch.setitem(plan.OUTSIDE, "cpu", (2**20, 2**20))
    config, sizes = settings(peft="lora", r=32), small(layers=6, C=256)
    peaks = {k: plan_step(config.changed(**({k: v} if k else {})), sizes, 512)["peak"] for k, v in (("", None), ("optim", "adamw8bit"), ("quant", "int8"))}
    assert peaks[""] > peaks["optim"] > peaks["quant"]
    near, far = ((peaks[k] + 2**20 + 2**12) for k in ("optim", "quant"))
    assert cheapest(config, sizes, 512, "cpu", near)["change"] == {"optim": "adamw8bit"}
    assert cheapest(config, sizes, 512, "cpu", far) == {"change": {"quant": "int8"}, "peak": peaks["quant"]}
    assert cheapest(config, sizes, 512, "cpu", 2**20) is None
    full = plan_memory(config, sizes, 512, "cpu", near)
    assert full["fits"] is False and full["cheapest"]["change"] == {"optim": "adamw8bit"} and "cheapest" not in plan_memory(config, sizes, 512, "cpu", 2**40)


def test_a_run_says_its_memory_and_compares(tmp_path, monkeypatch):
    "A small model's run says it only when asked."
    small = finetune(model="rwkv7-tiny", data=demo_rows()[:12], peft="lora", r=4, max_steps=1, accumulate=1, output=str(tmp_path), name="small", eval_split=0.)
    events = list(small.steps())
    assert events[0]["plan"]["memory"] is None and events[-1]["memory"]["planned"] is None and small.plan()["memory"]["peak"] > 0
    monkeypatch.setattr("rwkv_peft.train.plan.SMALL", 0)
    run = finetune(model="rwkv7-tiny", data=demo_rows()[:12], peft="lora", r=4, max_steps=11, accumulate=1, output=str(tmp_path), name="a", eval_split=0.)
    assert run.plan()["time"].startswith("unknown")
    events = list(run.steps())
    start, done = events[0], events[-1]
    memory = start["plan"]["memory"]
    longest = max(len(e.tokens) for e in run.data) - 1
    assert memory["length"] == longest and memory["weights"] >= 4 * start["plan"]["parameters"] and memory["fits"] in (True, None)
    assert done["memory"]["planned"] == memory["peak"] + memory["outside"][0] and done["memory"]["measured"] > memory["peak"]
    assert run.plan()["time"] == "0 minutes for the steps left"


def test_plan_without_weights():
    nf4, dense = (plan_like("rwkv7-7.2b", {"peft": "lora", "quant": q}, there=12 * GiB) for q in ("nf4", "none"))
    n = sum(p.numel() for p in blank(RWKVConfig.preset("RWKV7-7.2B")).parameters())
    assert dense["loading"] == 2 * n and dense["weights"] > 2 * n and dense["fits"] is False and nf4["peak"] < dense["peak"] / 2
    with pytest.raises(ValueError, match="no released size"): plan_like("rwkv9-1b", {})
    with pytest.raises(ConfigError, match="nope: there is no such setting"): plan_like("rwkv7-0.1b", {"nope": 1})


@pytest.mark.parametrize("said", [{"peft": w} for w in ("olora", "milora", "eva", "bone", "lisa")] + [{"peft": "loftq", "quant": "nf4"}, {"peft": "none", "optim": "apollo"}, {"peft": "lora", "optim": "lorafa"}, {"peft": "lora", "dropout": .1}], ids=str)
def test_every_method_and_optimiser_can_be_planned(said): assert plan_step(settings(**said), small(), 48)["peak"] > 0


# ---------------------------------------------------------------- processes

@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read from Linux")
def test_the_peaks_of_six_processes():
    found = bench_plan()
    rows = [r for r in found["rows"] if r["name"] != "fit"]
    assert len(rows) == 6 and all(r["measured"] > GiB and abs(r["off"]) < .10 for r in rows), found
