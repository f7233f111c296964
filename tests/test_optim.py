"Every optimiser and every schedule of the settings: against PyTorch's and the authors' own, trained, stopped and resumed."
import math
import re
from typing import get_args

import pytest
import torch
from small import new_model, rel
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR

import rwkv_peft.train.config as config_module
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.peft.adapters import attach, trained_parameters
from rwkv_peft.peft.lisa import LISA
from rwkv_peft.peft.parts import Train
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.events import timeline
from rwkv_peft.train.folder import load_checkpoint
from rwkv_peft.train.loop import Run, finetune
from rwkv_peft.train.optim import Apollo, apollo_groups, lr_at, make_optimizer, moment_bytes, narrow, optimizer_groups

torch.set_num_threads(1)
OPTIMS = get_args(Config.model_fields["optim"].annotation)
SCHEDULES = get_args(Config.model_fields["lr_schedule"].annotation)
ROWS = [{"prompt": f"{i} + {i % 7} =", "completion": f" {i + i % 7}{'!' * (i % 5)}"} for i in range(24)]


def tiny():
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(n_layer=2, n_embd=32, head_size=16, dim_ffn=160, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))      # 32 x 160 has more than 4096 numbers
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    return model


def make(folder, **settings):
    return finetune(**({"model": tiny(), "data": ROWS, "lr_init": 1e-2, "micro_bsz": 4, "accumulate": 2, "max_steps": 6, "eval_split": 0., "save_steps": 3, "output": str(folder), "name": "run"} | settings))


def of(run, kind): return [e for e in timeline(run.events) if e["event"] == kind]


def half_way(folder, **settings):
    "The run, stopped after step 3 and taken up by another Run, as after a restart."
    first = make(folder, **settings)
    for event in first.steps():
        if event["event"] == "step" and event["step"] == 3: first.stop()
    again = Run.resume(first.folder, model=tiny())
    list(again.steps())
    return again


# --- optimisers ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optim", OPTIMS)
def test_every_optimiser_trains_stops_and_goes_on(tmp_path, optim):
    "Six steps in one go and three plus three: the same losses and weights, to the last bit; and the loss falls."
    peft = {"peft": "lora", "r": 4} if optim in ("loraplus", "lorafa") else {"peft": "none"}
    run, again = make(tmp_path / "a", optim=optim, weight_decay=.01, **peft), half_way(tmp_path / "b", optim=optim, weight_decay=.01, **peft)
    list(run.steps())
    losses = [e["loss"] for e in of(run, "step")]
    assert [e["loss"] for e in of(again, "step")] == losses and losses[-1] < .98 * losses[0]
    assert all(torch.equal(p, again.trained[n]) for n, p in run.trained.items())
    dtypes = {x.dtype for state in run.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)}
    assert (torch.uint8 in dtypes) == optim.endswith("8bit")
    said = " ".join(e["message"] for e in of(run, "warning"))
    assert ("on cpu 'paged_adamw8bit' is 'adamw8bit'" in said) == (optim == "paged_adamw8bit")


def test_a_checkpoint_of_eight_bits_is_read_without_unpickling(tmp_path):
    run = make(tmp_path, optim="adamw8bit", peft="none", max_steps=1, save_steps=1)
    list(run.steps())
    _, training = load_checkpoint(run.folder)                            # weights_only
    kept = [x for state in training["moments"].values() for x in state["__bnb_optimizer_quant_state__"].values() if x.dtype == torch.uint8]
    assert sum(x.numel() for x in kept) == 2 * sum(p.numel() for p in run.trained.values() if p.numel() >= 4096) > 0


@pytest.mark.parametrize("optim", ["adamw8bit", "apollo", "apollo_mini"])
def test_blocks_in_turns(tmp_path, optim):
    "LISA's turns: what was kept of the frozen blocks is freed, the groups are those of the optimiser, and a resumed run is the same."
    settings = {"peft": LISA(layers=1, every=2), "optim": optim, "weight_decay": .01}
    run, again = make(tmp_path / "a", **settings), half_way(tmp_path / "b", **settings)
    for event in run.steps():
        if event["event"] != "step" or event["step"] == 6: continue      # after the last step the draw is for a step that does not come
        live = trained_parameters(run.model)
        assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in live.values()} and {id(p) for p in run.optimizer.state} <= {id(p) for p in live.values()}
        assert ("rank" in run.optimizer.param_groups[0]) == optim.startswith("apollo")
    assert [e["loss"] for e in of(again, "step")] == [e["loss"] for e in of(run, "step")]
    assert all(torch.equal(p, again.trained[n]) for n, p in run.trained.items())


def test_eight_bits_come_near_adamw():
    "The steps of both, over gradients of all sizes."
    moved = {}
    for optim in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(70, 90))
        optimizer, start = make_optimizer([("blocks.0.att.key.weight", p)], 1e-3, .1, optim), p.detach().clone()
        for _ in range(20):
            p.grad = p.detach() + torch.randn(70, 90) * torch.logspace(-3, 0, 90)
            optimizer.step()
        moved[optim] = p.detach() - start
    assert 1e-4 < rel(moved["adamw8bit"], moved["adamw"]) < .1


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 32), (9, 50)])
@pytest.mark.parametrize("mini", [False, True])
def test_apollo_is_the_authors(monkeypatch, shape, mini):
    "The package apollo-torch, handed our random matrices; 12 steps over three projections, with decay, a vector beside the matrix, and a jump that the limiter must catch."
    apollo_torch = pytest.importorskip("apollo_torch")
    from apollo_torch import random_projector
    def same_matrix(self, weights, rank, type, seed):
        short = min(weights.shape)
        P = narrow(torch.eye(short), rank, seed)                         # (short, rank)
        return P.T if type == "right" else P
    monkeypatch.setattr(random_projector.GradientProjector, "get_orthogonal_matrix", same_matrix)
    monkeypatch.setattr(random_projector, "next_seed", lambda seed: seed + 1_000_003)
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(x.clone()) for x in xs] for xs in [[torch.randn(shape), torch.randn(7)]] * 2)
    rank = 1 if mini else min(shape) // 4
    way = {"rank": rank, "scale": 128. if mini else 1.}
    a = Apollo([{"params": ours[:1], "weight_decay": .1, "tensorwise": mini, **way}, {"params": ours[1:], "weight_decay": 0.}], lr=1e-2, every=4)
    b = apollo_torch.APOLLOAdamW([{"params": theirs[:1], "weight_decay": .1, "scale_type": "tensor" if mini else "channel", "proj": "random", "proj_type": "std", "update_proj_gap": 4, **way}, {"params": theirs[1:]}], lr=1e-2, betas=(.9, .99), eps=1e-8)
    b.state[theirs[0]]["seed"] = 0                                       # ours counts from 0
    for i in range(12):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn(x.shape) * (100 if i == 7 else 1)
            y.grad = x.grad.clone()
        a.step(), b.step()
        assert all(torch.allclose(x, y, atol=2e-6, rtol=1e-5) for x, y in zip(ours, theirs)), i


def test_what_apollo_does_not_project_is_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(5, 6))
    a, b = Apollo([{"params": [ours]}], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2, betas=(.9, .99), eps=1e-8, weight_decay=0.)
    for _ in range(9):
        ours.grad = torch.randn(5, 6)
        theirs.grad = ours.grad.clone()
        a.step(lambda: 0.), b.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_projection_keeps_sizes_and_is_drawn_again():
    torch.manual_seed(0)
    g = torch.randn(3000, 64)
    sizes = narrow(g, 16, 5).norm(dim=1) / g.norm(dim=1)
    assert abs((sizes ** 2).mean() - 1) < .1 and abs(sizes.std() - 1 / math.sqrt(2 * 16)) < .03      # a chi distribution's, with 16 degrees of freedom
    assert torch.equal(narrow(g.T, 16, 5), narrow(g, 16, 5)) and not torch.equal(narrow(g, 16, 5), narrow(g, 16, 6))


def test_apollo_takes_the_blocks_matrices():
    model = new_model().requires_grad_(True)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = apollo_groups(model.named_parameters(), weight_decay=.1)
    ranked = sorted(names[id(p)] for g in groups if "rank" in g for p in g["params"])
    assert ranked == sorted(n for n in names.values() if re.fullmatch(r"blocks\.\d\.(att\.(receptance|key|value|output)|ffn\.(key|value))\.weight", n))
    assert sorted(names.values()) == sorted(names[id(p)] for g in groups for p in g["params"])


@pytest.mark.parametrize("optim", [o for o in OPTIMS if o not in ("loraplus", "lorafa")])
def test_bytes_of_moments_are_those_kept(optim):
    model = tiny().requires_grad_(True)
    optimizer = make_optimizer(model.named_parameters(), 1e-3, optim=optim)
    tokens = torch.randint(257, (1, 9))
    model(tokens, targets=tokens)[0].backward()
    optimizer.step()
    kept = sum(x.nbytes for state in optimizer.state.values() for k, x in state.items() if k in ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"))
    assert kept == moment_bytes(model.named_parameters(), optim)


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_layerwise_rates(version):
    "Twice for the decay's offset, once for everything else; with layerwise_lr = False once for all."
    model = RWKV(RWKVConfig(version, n_layer=2, n_embd=32, head_size=16, vocab_size=31))
    names = {id(p): n for n, p in model.named_parameters()}
    for optim in ("adamw", "apollo"):
        rates = {names[id(p)]: g["lr_scale"] for g in optimizer_groups(model.named_parameters(), optim=optim) for p in g["params"]}
        assert {n for n, s in rates.items() if s == 2} == {f"blocks.{i}.att.{'w0' if version == '7' else 'time_decay'}" for i in range(2)} and set(rates.values()) == {1, 2}
        assert {g["lr_scale"] for g in optimizer_groups(model.named_parameters(), optim=optim, layerwise_lr=False)} == {1}


def test_layerwise_lr_in_a_run(tmp_path):
    "It moves w0 by another length, and nothing else in the first step; 0 and 1 are words of the seed's flags."
    moved = {}
    for on in (1, 0):
        run = make(tmp_path / str(on), peft="none", layerwise_lr=on, max_steps=1, grad_clip=0.)
        list(run.steps())
        moved[on] = {n: p.detach() - tiny().get_parameter(n) for n, p in run.trained.items()}
    ratio = {n: (moved[1][n].norm() / moved[0][n].norm()).item() for n in moved[1] if moved[0][n].norm() > 0}
    assert all(abs(r - (2 if n.endswith("att.w0") else 1)) < 1e-3 for n, r in ratio.items()) and len(ratio) > 40


@pytest.mark.parametrize("settings, said", [
    ({"optim": "apollo"}, "'lora' trains none of them"), ({"optim": "apollo_mini", "peft": ["miss", "state"]}, "'miss' and 'state' trains none"), ({"optim": "apollo", "train_type": "state"}, "'state' trains none")])
def test_apollo_without_matrices_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said): Config(model="rwkv7-tiny", data=ROWS, **settings)


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="none of them trains here"): make_optimizer(trained_parameters(attach(new_model(), Train("ln"))).items(), 1e-3, optim="apollo")
    with pytest.raises(ConfigError, match="'adam' is not known.*'apollo_mini'"): make_optimizer(new_model().named_parameters(), 1e-3, optim="adam")
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    for optim in ("adamw8bit", "paged_adamw8bit"):
        with pytest.raises(ConfigError, match=f"{optim}' needs bitsandbytes, which is not installed"): Config(model="rwkv7-tiny", data=ROWS, optim=optim)


# --- schedules ----------------------------------------------------------------------------------------------------------------

def pytorchs(schedule, steps, lr_init, lr_final, warmup):
    "The rates of `steps` updates by PyTorch's schedulers."
    optimizer, n = SGD([nn.Parameter(torch.zeros(1))], lr=lr_init), steps - 1 - warmup
    main = {"cos": lambda: CosineAnnealingLR(optimizer, max(1, n), lr_final), "linear": lambda: LinearLR(optimizer, 1., lr_final / lr_init, total_iters=max(1, n)), "exp": lambda: ExponentialLR(optimizer, (lr_final / lr_init) ** (1 / max(1, n))), "constant": lambda: ConstantLR(optimizer, 1.)}
    scheduler, rates = main[schedule](), []
    for _ in range(n + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    climb = SGD([nn.Parameter(torch.zeros(1))], lr=lr_init)
    scheduler, first = LinearLR(climb, 1 / (warmup + 1), total_iters=warmup) if warmup else None, []
    for _ in range(warmup):
        first.append(climb.param_groups[0]["lr"])
        climb.step()
        scheduler.step()
    return first + rates


def wsd(steps, lr_init, lr_final, warmup):
    "Steady for 80 % of the way, then a straight line to the last step."
    first, last = warmup + .8 * (steps - 1 - warmup), steps - 1
    return [lr_init * (i + 1) / (warmup + 1) if i < warmup else lr_init if i <= first else lr_init + (lr_final - lr_init) * (i - first) / (last - first) for i in range(steps)]


def expected(schedule, *args): return wsd(*args) if schedule == "wsd" else pytorchs(schedule, *args)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(2, 0), (7, 0), (23, 3), (101, 20)])
def test_schedules_are_pytorchs(schedule, steps, warmup):
    for lr_init, lr_final in ((1e-3, 1e-4), (1e-4, 1e-3), (1e-2, 1e-2)):
        if schedule == "linear" and lr_final > lr_init: continue           # PyTorch's only falls
        assert [lr_at(i, steps, lr_init, lr_final, schedule, warmup) for i in range(steps)] == pytest.approx(expected(schedule, steps, lr_init, lr_final, warmup), rel=1e-6)


def test_the_seeds_meanings():
    "Its exponential decay, which is linear when one end is 0; its cosine between lr_init and lr_final."
    for s in range(11):
        p = s / 10
        assert lr_at(s, 11, 6e-4, 1e-5, "exp") == pytest.approx(6e-4 * (1e-5 / 6e-4) ** p)
        assert lr_at(s, 11, 6e-4, 0., "exp") == pytest.approx(6e-4 * (1 - p)) and lr_at(s, 11, 0., 6e-4, "exp") == pytest.approx(6e-4 * p)
        assert lr_at(s, 11, 6e-4, 1e-5, "cos") == pytest.approx(1e-5 + .5 * (6e-4 - 1e-5) * (1 + math.cos(math.pi * p)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_and_counts_optimiser_steps(tmp_path, schedule):
    "Rates of the events, and of the optimiser's groups, are those of six optimiser steps, not of their twelve passes."
    run, groups = make(tmp_path, peft="none", lr_schedule=schedule, warmup_steps=1, lr_final=2e-3), []
    for event in run.steps():
        if event["event"] == "step": groups.append({(g["lr_scale"], g["lr"]) for g in run.optimizer.param_groups})
    steps = of(run, "step")
    rates = expected(schedule, 6, 1e-2, 2e-3, 1)
    assert [e["lr"] for e in steps] == pytest.approx(rates, rel=1e-6) and steps[-1]["loss"] < steps[0]["loss"]
    assert all({s for s, _ in g} == {1, 2} and all(r == pytest.approx(s * rate) for s, r in g) for g, rate in zip(groups, rates))
