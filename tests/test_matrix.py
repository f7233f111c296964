"Every method over every storage: it learns, what it should not touch stays bit for bit, and taken off it leaves the base."
import copy
import hashlib
from functools import cache

import pytest
import torch

from rwkv_peft import RWKV, LoRA, StateTuning, Train, attach, detach, read_data
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.data.batches import collate
from rwkv_peft.data.records import Dataset
from rwkv_peft.model.quant import quantize
from rwkv_peft.peft.adapters import trained_parameters
from rwkv_peft.peft.inits import EVA, LoftQ, MiLoRA, OLoRA, PiSSA
from rwkv_peft.peft.lisa import LISA, refit
from rwkv_peft.peft.magnitude import DoRA
from rwkv_peft.peft.shards import Bone, MiSS
from rwkv_peft.train.evaluate import evaluate
from rwkv_peft.train.loss import accumulate
from rwkv_peft.train.optim import make_optimizer, parameter_groups

# name -> (method, over a storage and with batches to look at; learning rate; steps of 8 rows)
METHODS = {
    "lora": (lambda quant, rows: LoRA(), 1e-2, 4), "rslora": (lambda quant, rows: LoRA(rslora=True), 5e-3, 4), "pissa": (lambda quant, rows: PiSSA(), 5e-3, 4), "olora": (lambda quant, rows: OLoRA(), 2e-3, 4),
    "milora": (lambda quant, rows: MiLoRA(), 1e-2, 4), "eva": (lambda quant, rows: EVA(batches=rows), 1e-2, 4), "loftq": (lambda quant, rows: LoftQ(rounds=1, kind="nf4" if quant == "none" else quant), 1e-2, 4),
    "dora": (lambda quant, rows: DoRA(), 1e-2, 4), "bone": (lambda quant, rows: Bone(r=16), 5e-3, 4), "miss": (lambda quant, rows: MiSS(r=16), 1e-2, 4), "lisa": (lambda quant, rows: LISA(layers=2, every=3), 3e-3, 6),
    "state": (lambda quant, rows: StateTuning(), 20.0, 6), "ln": (lambda quant, rows: Train("ln"), 2e-2, 5), "full": (lambda quant, rows: Train("all"), 2e-3, 4),
}
REFUSED = {      # method -> what quantize says: these train the matrices themselves
    "lisa": r"quant: blocks\.\d\.att\.receptance trains, and {} is for matrices that don't; leave it out of train_parts, or leave quant out",
    "full": r"quant: blocks\.0\.att\.receptance trains, and {} is for matrices that don't; leave it out of train_parts, or leave quant out",
}
QUANTS = ["none", "int8", "nf4", "fp4"]
PAIRS = [(name, quant) for name in METHODS for quant in QUANTS]
trained = pytest.mark.parametrize("name, quant", [pair for pair in PAIRS if pair[1] == "none" or pair[0] not in REFUSED])
refused = pytest.mark.parametrize("name, quant", [pair for pair in PAIRS if pair[1] != "none" and pair[0] in REFUSED])


def load(): return RWKV.load("rwkv7-tiny", device="cpu", dtype=torch.float32)


def prints(model, names=None) -> dict[str, bytes]:
    "A hash of each tensor of the model (or of those called `names`), buffers and packed bytes among them."
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: hashlib.blake2b(t.detach().contiguous().view(-1).view(torch.uint8).numpy()).digest() for n, t in held.items() if names is None or n in names}


@cache
def rows() -> tuple[list, Dataset]:
    "Six batches of 8 short rows, and 16 held-out ones."
    train, held_out = read_data(demo_rows(), load().tokenizer).split(0.15)
    short = sorted(range(len(train)), key=lambda i: len(train[i].tokens))[:48]
    order = [short[i] for i in torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()]
    judges = sorted(held_out, key=lambda e: len(e.tokens))[:16]
    return [collate([train[i] for i in order[k:k + 8]], order[k:k + 8]) for k in range(0, 48, 8)], Dataset(judges, train.tokenizer)


@cache
def before(quant: str) -> tuple[float, dict[str, bytes]]:
    "Held-out loss of the base in this storage, and the hashes of its tensors."
    model = quantize(load().requires_grad_(False), quant)
    return evaluate(model, rows()[1], 16)["loss"], prints(model)


@cache
def started(name: str):
    "The base with a method whose start doesn't depend on the storage."
    torch.manual_seed(0)
    return attach(load(), METHODS[name][0]("none", rows()[0][:2]))


def put(name: str, quant: str):
    "A fresh model with the method on it, packed."
    torch.manual_seed(0)
    model = attach(load(), METHODS["loftq"][0](quant, None)) if name == "loftq" else copy.deepcopy(started(name))
    return quantize(model, quant)


def learn(model, lr: float, steps: int):
    method, optimizer = model.attached.methods[0], make_optimizer(trained_parameters(model).items(), lr)
    for step in range(steps):
        if hasattr(method, "redraw") and method.redraw(model, step): refit(optimizer, [{**g, "lr": lr} for g in parameter_groups(trained_parameters(model).items())])
        accumulate(model, rows()[0][step:step + 1])
        torch.nn.utils.clip_grad_norm_(trained_parameters(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@trained
def test_pair_learns_keeps_what_is_frozen_and_comes_off(name, quant):
    model, (_, lr, steps) = put(name, quant), METHODS[name]
    evaluate(model, rows()[1][:1])      # DoRA refreshes the lengths of packed rows when it first sees them
    assert all(block.att.key.storage is None if quant == "none" else block.ffn.value.storage is not None for block in model.blocks)
    whole = prints(model)
    learn(model, lr, steps)
    own = {*trained_parameters(model), *model.attached.weights}      # with LISA: every block that has had its turn
    after, now = evaluate(model, rows()[1], 16)["loss"], prints(model)
    base = min(before("none")[0], before(quant)[0])
    print(f"{name:8} {quant:5} {base:.3f} -> {after:.3f} ({after / base - 1:+.0%})")
    assert after < 0.92 * base
    assert set(now) == set(whole) and {n for n in now if now[n] != whole[n]} == own
    detach(model)
    assert prints(model) == before(quant)[1]


@refused
def test_pair_is_refused_with_its_reason_and_nothing_is_packed(name, quant):
    model = copy.deepcopy(started(name))
    whole = prints(model)
    with pytest.raises(ValueError, match=REFUSED[name].format(quant)): quantize(model, quant)
    assert prints(model) == whole and getattr(model, "quant", "none") == "none"


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_what_rewrites_or_trains_matrices_is_refused_over_a_packed_base(quant):
    for name, says in {"lisa": "is packed, and LISA trains the weights themselves", "pissa": "is packed, and PiSSA changes the matrix itself", "loftq": "is packed, and LoftQ changes the matrix itself"}.items():
        model = quantize(load().requires_grad_(False), quant)
        with pytest.raises(ValueError, match=says): attach(model, METHODS[name][0](quant, None))
        assert prints(model) == before(quant)[1] and getattr(model, "attached", None) is None


def test_every_pair_is_here():
    assert len(PAIRS) == 14 * 4 and set(REFUSED) == {"lisa", "full"}
