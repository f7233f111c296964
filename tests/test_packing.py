"""Documents behind one another in a row must not see each other: same losses, and same gradients of everything, as each document alone."""
import pytest
import torch
from rwkv_peft import LoRA, StateTuning, attach
from rwkv_peft.kernels.wkv import backends
from rwkv_peft.model.rwkv import RWKV, RWKVConfig

torch.set_num_threads(1)
RANKS = {"5.2": {}, "6": {"mix_rank": 6, "decay_rank": 10}, "7": {"w_rank": 8, "a_rank": 12, "v_rank": 4, "g_rank": 20}}
CUTS = [0, 1, 2, 33, 40, 71], [0, 38, 39, 70, 71]      # where documents begin, row by row, and the end: some of one token, some over a chunk's border


def tiny(version, dtype):
    torch.manual_seed(1)
    model = RWKV(RWKVConfig(version, n_layer=2, n_embd=32, head_size=16, vocab_size=97, **RANKS[version]))
    with torch.no_grad():
        for p in model.parameters(): p += .2 * torch.randn_like(p)
    model = model.to(dtype)
    for block in model.blocks: block.att.time_state = torch.nn.Parameter(.5 * torch.randn(2, 16, 16).to(dtype))
    return model


def rows():
    torch.manual_seed(2)
    tokens, targets, weights, resets = torch.randint(97, (2, 71)), torch.randint(97, (2, 71)), torch.rand(2, 71), torch.zeros(2, 71, dtype=torch.bool)
    for row, cuts in enumerate(CUTS): resets[row, cuts[:-1]] = True
    return tokens, targets, weights, resets


def both(model, tokens, targets, weights, resets, cuts):
    "The loss of the documents in their rows, and the sum of each one's alone."
    packed, _ = model(tokens, targets=targets, weights=weights, resets=resets)
    return packed, sum(model(tokens[i:i + 1, a:b], targets=targets[i:i + 1, a:b], weights=weights[i:i + 1, a:b])[0] for i, row in enumerate(cuts) for a, b in zip(row, row[1:]))


def distance(model, tokens, targets, weights, resets, cuts):
    "How far packed documents are from separate ones: relative, in the loss and in the gradient of every tensor."
    named = dict(model.named_parameters())
    packed, alone = both(model, tokens, targets, weights, resets, cuts)
    ours, theirs = gradients(packed, named), gradients(alone, named)
    return max((abs(packed - alone) / alone).item(), *(((ours[n] - theirs[n]).norm() / (theirs[n].norm() + 1e-9)).item() for n in named))


def gradients(loss, named): return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@pytest.mark.parametrize("version", RANKS)
@pytest.mark.parametrize("backend", ["loop", "chunk", "cpu"])
@pytest.mark.parametrize("method", ["all", "lora"])
def test_packed_is_separate(version, backend, method):
    usable, reason = backends().get(backend, (False, "not built"))
    if not usable: pytest.skip(reason)
    dtype, bar = (torch.float32, 2e-4) if backend == "cpu" else (torch.float64, 1e-9)
    model = tiny(version, dtype)
    if method == "lora":
        for block in model.blocks: block.att.time_state = None
        attach(model, LoRA(r=4), StateTuning())
        with torch.no_grad():
            for p in model.parameters(): p += .1 * torch.randn_like(p) * p.requires_grad
    model.backend, named = backend, {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.endswith("time_state") for n in named)
    tokens, targets, weights, resets = rows()
    packed, alone = both(model, tokens, targets, weights.to(dtype), resets, CUTS)
    assert abs(packed - alone) < bar * alone
    ours, theirs = gradients(packed, named), gradients(alone, named)
    for name in named: assert (ours[name] - theirs[name]).norm() <= bar * theirs[name].norm() + 1e-9, name
    leaky, _ = model(tokens, targets=targets, weights=weights.to(dtype))
    leaks = gradients(leaky, {n: p for n, p in named.items() if n.endswith("time_state")})
    assert all((g - theirs[n]).norm() > .05 * theirs[n].norm() for n, g in leaks.items())      # without resets the documents would see each other


@pytest.mark.parametrize("version", RANKS)
@torch.no_grad()
def test_a_reset_forgets_what_was_carried(version):
    model, (tokens, *_) = tiny(version, torch.float64), rows()
    _, state = model(tokens[:, :9])
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[:, 0] = True
    assert torch.allclose(model(tokens[:, 9:29], state, resets=resets)[0], model(tokens[:, 9:29])[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(tokens[:, 9:29], state)[0], model(tokens[:, 9:29])[0], atol=1e-3)


@pytest.mark.parametrize("version", RANKS)
def test_gradients_cross_pieces_through_the_state(version):
    model, (tokens, targets, _, resets) = tiny(version, torch.float64), rows()
    whole, _ = model(tokens, targets=targets, resets=resets)
    first, state = model(tokens[:, :20], targets=targets[:, :20], resets=resets[:, :20])
    second, _ = model(tokens[:, 20:], state, targets=targets[:, 20:], resets=resets[:, 20:])
    named = dict(model.named_parameters())
    ours, theirs = gradients(first + second, named), gradients(whole, named)
    for name in named: assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-9), name
