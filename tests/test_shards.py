"MiSS and Bone: against their formulas, Hugging Face peft and a LoRA, over dense and packed matrices, and what bad input gets."
import copy
import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_peft.bench.memory import saved_bytes
from rwkv_peft.model.linear import Linear
from rwkv_peft.model.quant import Int8, quantize
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.peft.adapters import attach, detach, trained_parameters
from rwkv_peft.peft.lora import LoRA, LoRAProduct, MethodError, find_linears, linears
from rwkv_peft.peft.parts import Train
from rwkv_peft.peft.shards import Bat, Bone, BoneAdapter, BoneProduct, MiSS, MiSSAdapter, MiSSProduct, add_to_shards, seed_method, shard_sum
from small import SIZES, loss_of, new_model, rel, rows, steps, stir

METHODS = [MiSS(r=8), MiSS(r=7), Bone(r=8)]
named = dict(ids=lambda m: f"{type(m).__name__}{m.r}" if isinstance(m, (MiSS, Bone)) else None)


def miss_matrix(W, D):
    "W', column by column."
    return torch.stack([W[:, c] + D[c % len(D)] for c in range(W.shape[1])], 1)


def bone_matrix(W, D, by="in"):
    "W', block by block: with D's block of the inputs, as ours, or of the outputs, as Hugging Face's 'bat'."
    r = D.shape[-1]
    def block(a, b):
        w, d = W[a * r:(a + 1) * r, b * r:(b + 1) * r], D[b if by == "in" else a]
        return w + w @ d + d
    return torch.cat([torch.cat([block(a, b) for b in range(W.shape[1] // r)], 1) for a in range(len(W) // r)], 0)


KINDS = {"miss": (MiSSProduct, miss_matrix, lambda i, o, r: (r, o)), "bone": (BoneProduct, bone_matrix, lambda i, o, r: (i // r, r, r))}


# ---- the products


@pytest.mark.parametrize("kind, i, o, r", [("miss", 12, 6, 4), ("miss", 7, 6, 3), ("miss", 7, 6, 7), ("miss", 7, 6, 1), ("miss", 9, 4, 8), ("bone", 12, 6, 3), ("bone", 6, 12, 6), ("bone", 8, 8, 1)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (0,)])
@pytest.mark.parametrize("wants_W", [False, True])
def test_products_equal_the_literal_formula_with_every_gradient(kind, i, o, r, shape, wants_W):
    torch.manual_seed(0)
    product, matrix, size = KINDS[kind]
    base = Linear(i, o).double().requires_grad_(wants_W)
    x, D = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((*shape, i), size(i, o, r)))
    y, wanted = product.apply(x, D, base.weight, base), x @ matrix(base.weight, D).T
    inputs, g = (x, D, base.weight)[:2 + wants_W], torch.randn_like(wanted)
    assert y.shape == wanted.shape and torch.allclose(y, wanted, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g)): assert torch.allclose(ours, theirs, atol=1e-12) and ours.shape == theirs.shape


@pytest.mark.parametrize("kind, i, o, r", [("miss", 8, 4, 4), ("miss", 7, 4, 3), ("bone", 6, 4, 2)])
def test_gradcheck_and_no_gradient_where_none_is_wanted(kind, i, o, r):
    torch.manual_seed(0)
    product, _, size = KINDS[kind]
    base = Linear(i, o).double()
    x, D = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, i), size(i, o, r)))
    assert torch.autograd.gradcheck(lambda x, D, W: product.apply(x, D, W, base), (x, D, base.weight))
    turned = torch.randn(3, 2, i, dtype=torch.float64, requires_grad=True)      # not contiguous
    assert torch.autograd.gradcheck(lambda x, D: product.apply(x.transpose(0, 1), D, base.weight.detach(), base), (turned, D))
    product.apply(x.detach(), D, base.weight.detach(), base).sum().backward()
    assert x.grad is None and base.weight.grad is None and D.grad is not None
    D.grad = None
    product.apply(x, D.detach(), base.weight.detach(), base).sum().backward()
    assert D.grad is None and x.grad is not None


def test_shards_of_any_width():
    x = torch.arange(14.).view(2, 7)
    assert shard_sum(x, 3).tolist() == [[0 + 3 + 6, 1 + 4, 2 + 5], [7 + 10 + 13, 8 + 11, 9 + 12]] and torch.equal(x, torch.arange(14.).view(2, 7))
    assert add_to_shards(torch.zeros(1, 7), torch.tensor([[1., 2, 3]])).tolist() == [[1, 2, 3, 1, 2, 3, 1]]


def test_what_is_kept_for_the_backward():
    n, i, o, r = 200, 96, 48, 8
    x = torch.randn(n, i, requires_grad=True)
    for packed in (False, True):
        for Adapter, units in (MiSSAdapter, r / i), (BoneAdapter, 1):
            layer = Linear(i, o).requires_grad_(False)
            if packed: layer.pack(Int8(layer.weight))
            layer.adapter = Adapter(layer, r)
            assert saved_bytes(lambda: layer(x), layer.parameters()) == units * x.nbytes
            half = copy.deepcopy(layer).bfloat16()
            half.adapter.float()
            assert saved_bytes(lambda: half(x.bfloat16()), half.parameters()) == units * x.nbytes / 2
    ragged = Linear(100, o).requires_grad_(False)
    ragged.adapter = MiSSAdapter(ragged, r)
    z = torch.randn(n, 100, requires_grad=True)
    assert saved_bytes(lambda: ragged(z), ragged.parameters()) == n * r * 4 <= z.nbytes * r / 100
    ragged.weight.requires_grad_()      # its gradient needs x itself, and then nothing else
    assert saved_bytes(lambda: ragged(z), ragged.parameters()) == z.nbytes


# ---- MiSS is a LoRA


@pytest.mark.parametrize("i, r", [(12, 4), (14, 4), (5, 5)])
def test_miss_is_a_lora_in_output_gradient_and_step(i, r):
    torch.manual_seed(0)
    base, o = Linear(i, 6).double().requires_grad_(False), 6
    base.adapter = MiSSAdapter(base, r)
    torch.nn.init.normal_(base.adapter.D)
    A, B = base.adapter.plain()
    assert A.shape == (r, i) and B.shape == (o, r) and set(A.unique().tolist()) <= {0., 1.} and torch.equal(A.sum(0), torch.ones(i, dtype=A.dtype))
    B.requires_grad_()
    x, goal = torch.randn(9, i, dtype=torch.float64), torch.randn(9, o, dtype=torch.float64)
    ways = [(base.adapter.D, lambda: base(x)), (B, lambda: LoRAProduct.apply(x, A, B, base.weight, 1.0, 0.0, base))]
    optimisers = [torch.optim.AdamW([p], lr=0.1, weight_decay=0.1) for p, _ in ways]
    for _ in range(4):
        assert torch.allclose(ways[0][1](), ways[1][1](), atol=1e-12)
        for (p, f), optimiser in zip(ways, optimisers):
            optimiser.zero_grad()
            (f() - goal).square().sum().backward()
            optimiser.step()
        assert torch.allclose(base.adapter.D.grad, B.grad.T, atol=1e-10) and torch.allclose(base.adapter.D, B.T, atol=1e-10)
    assert torch.allclose(base.adapter.delta(), B @ A, atol=1e-10)


def test_the_plain_pair_does_in_a_lora_adapter_what_miss_did():
    ours = stir(attach(new_model(), MiSS(r=7)))
    lora = attach(new_model(), LoRA(r=7))
    for n, m in find_linears(ours).items():
        A, B = m.adapter.plain()
        with torch.no_grad(): linears(lora)[n].adapter.A.copy_(A), linears(lora)[n].adapter.B.copy_(B)
    assert rel(lora(rows())[0], ours(rows())[0]) < 1e-6 and rel(new_model()(rows())[0], ours(rows())[0]) > 1e-2


# ---- Hugging Face


def hugging_faces(r, init=True, dtype=torch.float32, targets=None, **kwargs):
    import peft
    model = new_model(dtype=dtype)
    theirs = peft.get_peft_model(model, peft.MissConfig(r=r, init_weights=init, target_modules=targets or sorted(linears(model).keys() - {"head"})), **kwargs)
    return theirs, {n: m.miss_block["default"] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "miss_block")}


@pytest.mark.parametrize("r", [8, 7, 32])
def test_miss_equals_hugging_face_in_output_gradients_and_after_steps(r):
    x, ours, (theirs, blocks) = rows(), stir(attach(new_model(), MiSS(r=r))), hugging_faces(r)
    pairs = [(m.adapter.D, blocks[n]) for n, m in find_linears(ours).items()]
    assert len(pairs) == len(blocks) == 18
    with torch.no_grad():
        for a, b in pairs: b.copy_(a)
    assert rel(ours(x)[0], theirs(x)[0]) < 1e-6 and rel(new_model()(x)[0], theirs(x)[0]) > 1e-2
    loss_of(ours, x).backward()
    loss_of(theirs.base_model.model, x).backward()
    for a, b in pairs: assert rel(a.grad, b.grad) < 1e-5
    before = [a.detach().clone() for a, _ in pairs]
    for side in (0, 1): torch.optim.SGD([pair[side] for pair in pairs], lr=1e-2).step()
    for (a, b), old in zip(pairs, before): assert rel(a, b) < 1e-6 and not torch.equal(a, old)
    merged = {n: m.adapter.merged(m.weight) for n, m in find_linears(ours).items()}
    whole = theirs.merge_and_unload()
    for n, W in merged.items(): assert rel(whole.get_submodule(n).weight, W) < 1e-6


def test_miss_equals_hugging_face_in_bfloat16_within_rounding():
    torch.manual_seed(0)
    import peft
    model = torch.nn.Sequential(Linear(75, 48)).requires_grad_(False)
    W, x = model[0].weight.clone(), torch.randn(64, 75)
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(75, 48, bias=False)).bfloat16(), peft.MissConfig(r=8, target_modules=["0"]))
    layer, block = theirs.base_model.model[0], theirs.base_model.model[0].miss_block["default"]
    ours = model[0].bfloat16()
    ours.adapter = MiSSAdapter(ours, 8)
    with torch.no_grad():
        ours.adapter.D.normal_(std=0.1)
        block.copy_(ours.adapter.D), layer.base_layer.weight.copy_(W)
    found = []
    for f, p in (ours, ours.adapter.D), (theirs, block):
        z = x.bfloat16().requires_grad_()
        y = f(z)
        y.float().square().sum().backward()
        found.append((y.float(), z.grad.float(), p.grad.float()))
    assert y.dtype == torch.bfloat16 == z.grad.dtype and ours.adapter.D.dtype == torch.float32 == ours.adapter.D.grad.dtype
    for a, b in zip(*found): assert rel(a, b) < 1e-2


def test_bone_is_not_hugging_faces_bat():
    torch.manual_seed(0)
    theirs, blocks = hugging_faces(8, "bat", targets=["receptance"])
    ours = attach(new_model(), Bone(r=8), targets="receptance")
    for n, m in find_linears(ours, "receptance").items():
        with torch.no_grad(): blocks[n].copy_(m.adapter.D.normal_(std=0.2))
        assert blocks[n].shape == m.adapter.D.shape      # one shape, since the matrix is square
        z, theirs_module = torch.randn(5, 32), theirs.base_model.model.get_submodule(n)
        assert rel(theirs_module(z), z @ bone_matrix(m.weight, m.adapter.D, by="out").T) < 1e-5
        assert rel(m(z), z @ bone_matrix(m.weight, m.adapter.D).T) < 1e-5 and rel(m(z), theirs_module(z)) > 0.1
    assert rel(ours(rows())[0], theirs(rows())[0]) > 1e-3


# ---- on a model


@pytest.mark.parametrize("method", METHODS, **named)
def test_twenty_steps_learn_leave_the_base_alone_and_come_off_without_a_trace(method):
    model, before = attach(new_model(), method), {n: p.clone() for n, p in new_model().named_parameters()}
    assert torch.equal(model(rows())[0], new_model()(rows())[0])      # nothing learnt, nothing changed
    start = loss_of(model, rows(seed=0)).item()
    steps(model, 20)
    assert loss_of(model, rows(seed=0)).item() < 0.9 * start
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".adapter." not in n)
    assert trained_parameters(model).keys() == {f"{n}.adapter.D" for n in find_linears(model)} and not any(torch.equal(p, torch.zeros_like(p)) for p in trained_parameters(model).values())
    detach(model)
    assert {n for n, _ in model.named_parameters()} == before.keys() and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(rows())[0], new_model()(rows())[0])


@pytest.mark.parametrize("method", METHODS, **named)
@pytest.mark.parametrize("packed", [False, True])
def test_merged_equals_attached(method, packed):
    model = attach(new_model(), method)
    if packed: quantize(model, "int8")
    stir(model)
    bare = new_model()
    for n, m in find_linears(model).items():
        W = m.adapter.merged(m.dense())
        assert W.shape == (m.out_features, m.in_features) and W.dtype == torch.float32 and not W.requires_grad
        linears(bare)[n].weight.data = W
    assert rel(bare(rows())[0], model(rows())[0]) < 1e-5 and rel(new_model()(rows())[0], model(rows())[0]) > 1e-2


@pytest.mark.parametrize("method", METHODS, **named)
def test_over_int8_it_trains_as_over_the_floats_that_the_bytes_stand_for(method):
    packed, floats = quantize(attach(new_model(), method), "int8"), attach(new_model(), method)
    with torch.no_grad():
        for n, m in find_linears(packed).items(): linears(floats)[n].weight.copy_(m.dense())
    bytes_before = {n: m.storage.q.clone() for n, m in find_linears(packed).items()}
    for model in (stir(packed), stir(floats)): loss_of(model, rows()).backward()
    for n, p in trained_parameters(packed).items(): assert rel(p.grad, trained_parameters(floats)[n].grad) < 1e-4
    steps(packed, 20)
    assert all(torch.equal(m.storage.q, bytes_before[n]) for n, m in find_linears(packed).items())


@pytest.mark.parametrize("method", METHODS, **named)
def test_weight_and_adapter_can_train_together(method):
    x, model = rows(), stir(attach(new_model(dtype=torch.float64), method, Train(r"att\.key\.weight"), targets="att.key"))
    m, matrix = model.blocks[1].att.key, miss_matrix if isinstance(method, MiSS) else bone_matrix
    loss_of(model, x).backward()
    ours = m.adapter.D.grad, m.weight.grad
    literal = copy.deepcopy(model)
    for part in linears(literal).values():
        if part.adapter is None: continue
        adapter, part.adapter = part.adapter, None
        part.D = adapter.D
        part.forward = lambda z, part=part: z @ matrix(part.weight, part.D).T
    for p in literal.parameters(): p.grad = None
    loss_of(literal, x).backward()
    theirs = literal.blocks[1].att.key
    for a, b in zip(ours, (theirs.D.grad, theirs.weight.grad)): assert rel(a, b) < 1e-9


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
@pytest.mark.parametrize("method", METHODS, **named)
def test_every_version_and_the_head_take_it(version, method):
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(version, n_layer=2, n_embd=32, head_size=16, vocab_size=256, dim_ffn=96)).double()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    stir(attach(model, method, targets=["att", "ffn", "head"]))
    literal, matrix = copy.deepcopy(model), miss_matrix if isinstance(method, MiSS) else bone_matrix
    for part in find_linears(literal, ["att", "ffn", "head"]).values(): part.adapter.forward = lambda z, base, a=part.adapter: z @ matrix(base.weight, a.D).T
    found = []
    for m in (model, literal):
        loss = loss_of(m, rows())
        found.append([loss, *torch.autograd.grad(loss, list(trained_parameters(m).values()))])
    assert len(found[0]) == 1 + len(find_linears(model, ["att", "ffn", "head"]))
    for a, b in zip(*found): assert rel(a, b) < 1e-8
    model.eval()
    with torch.no_grad():
        whole, state = model(rows())[0], None
        for t in range(17):
            y, state = model(rows()[:, t:t + 1], state)      # one token at a time, as in generation
            assert rel(y[:, 0], whole[:, t]) < 1e-8


@pytest.mark.parametrize("method", METHODS, **named)
def test_checkpointing_a_bias_and_a_copy(method):
    torch.manual_seed(0)
    layer = Linear(32, 40, bias=True).requires_grad_(False)
    layer.adapter = (MiSSAdapter if isinstance(method, MiSS) else BoneAdapter)(layer, method.r)
    assert torch.allclose(layer(x := torch.randn(9, 32, requires_grad=True)), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    torch.nn.init.normal_(layer.adapter.D)
    plain, again, twin = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, lambda x: checkpoint(layer, x, use_reentrant=False), copy.deepcopy(layer)))
    assert torch.equal(plain, again) and torch.equal(plain, twin)


@pytest.mark.parametrize("method", METHODS, **named)
def test_masters_stay_fp32_over_a_bfloat16_base(method):
    layer = Linear(48, 40).requires_grad_(False)
    layer.adapter = (MiSSAdapter if isinstance(method, MiSS) else BoneAdapter)(layer, method.r)
    torch.nn.init.normal_(layer.adapter.D, std=0.1)
    half, x = copy.deepcopy(layer), torch.randn(30, 48)
    half.weight.data = half.weight.data.bfloat16()
    y, z = layer(x), half(x.bfloat16())
    for out in (y, z): out.float().square().sum().backward()
    assert z.dtype == torch.bfloat16 and half.adapter.D.grad.dtype == torch.float32
    assert rel(z.float(), y) < 2e-2 and rel(half.adapter.D.grad, layer.adapter.D.grad) < 2e-2


def test_targets_and_numbers():
    model = attach(new_model(), Bat(r=16), targets=["att.key", "ffn"])
    assert Bat is Bone and sum(p.numel() for p in trained_parameters(model).values()) == 3 * 16 * (32 + 32 + 80)
    model = attach(new_model(), MiSS(r=5), targets=["att.key", "ffn", "head"])
    assert sum(p.numel() for p in trained_parameters(model).values()) == 3 * 5 * (32 + 80 + 32) + 5 * 31 and MiSS().r == Bone().r == 16


# ---- bad input


@pytest.mark.parametrize("make", [MiSS, Bone])
@pytest.mark.parametrize("r", [0, -1, 1.5, True, "8", None])
def test_r_must_be_a_whole_number(make, r):
    with pytest.raises(MethodError, match=f"{make.__name__}: r="): make(r)


@pytest.mark.parametrize("method, targets, says", [
    (Bone(r=24), None, r"blocks.0.att.receptance: Bone r=24 must divide both sides of this matrix, 32 and 32; the nearest that fits every matrix targeted here is r=16"),
    (Bone(r=32), None, r"blocks.0.ffn.key: .* 80 and 32; .* r=16"), (Bone(r=64), "ffn.value", r"blocks.0.ffn.value: .* 32 and 80; .* r=16"),
    (Bone(r=8), ["att", "head"], r"head: .* 31 and 32; .* r=1 "), (MiSS(r=33), None, "blocks.0.att.receptance: MiSS r=33 is above 32"), (MiSS(r=81), "ffn.value", "above 80"),
    (MiSS(r=4), "att.kye", "nearest is 'att.key'"), (Bone(r=4), "att.kye", "nearest is 'att.key'"), (Bone(r=4), [], "targets is empty"),
])
def test_what_does_not_fit_is_told_and_the_model_is_left_alone(method, targets, says):
    model = new_model()
    with pytest.raises(MethodError, match=says) as e: attach(model, method, targets=targets)
    assert "\n" not in str(e.value) and all(m.adapter is None for m in linears(model).values()) and all(p.requires_grad for p in model.parameters()) and not hasattr(model, "attached")


def test_one_matrix_takes_one_adapter():
    model = new_model()
    with pytest.raises(MethodError, match="has an adapter already"): attach(model, LoRA(r=4), MiSS(r=4))
    assert all(m.adapter is None for m in linears(model).values())


# ---- flags of the scripts


@pytest.mark.parametrize("flags, method, says", [
    ({"peft": "bone", "bone_config": '{"bone_load":"","bone_r":64}'}, Bone(64), "first scripts"),
    ({"bone_config": {"bone_mode": "bone", "bone_load": "", "bone_r": 32}}, MiSS(32), "two-dimensional"),
    ({"bone_config": {"bone_mode": "bat", "bone_r": 32}}, Bone(32), "block affine"),
    ({"bone_config": {"bone_r": 32}, "bone_mode": "bone"}, MiSS(32), "two-dimensional"),
    ({"peft": "disha", "disha_config": '{"mode":"bone","load":"","r":64}'}, MiSS(64), "two-dimensional"),
    ({"peft": "disha", "disha_config": {"mode": "bat", "load": "a.pth", "r": 8}}, Bone(8), "'a.pth' is an adapter"),
    ({"peft": "disha", "disha_config": {"mode": "mode", "load": "", "r": 64}}, MiSS(64), "no matrix an adapter"),
    ({"peft": "bone"}, Bone(64), "block affine"), ({"peft": "disha"}, MiSS(64), "no matrix an adapter"), ({"peft": "disha", "bone_config": {"bone_r": 4}}, MiSS(64), "disha_config"),
])
def test_flags_map_to_the_method_that_they_meant(flags, method, says):
    before = json.dumps(flags)
    found, sentence = seed_method(flags)
    assert found == method and says in sentence and repr(found) in sentence and "\n" not in sentence and json.dumps(flags) == before


@pytest.mark.parametrize("flags, says", [
    ({"bone_config": "{bone_r:64}"}, "is no JSON"), ({"bone_config": "[1]"}, "is no table"), ({"bone_config": {"bone_rank": 4}}, "'bone_rank' is not known"),
    ({"disha_config": {"mode": "row"}}, "mode 'row' is not known"), ({"bone_config": {"bone_r": 0}}, "r=0"), ({"disha_config": {"mode": "bone", "r": "x"}}, "r='x'"), ({"disha_config": {"mode": [1]}}, "is not known"),
])
def test_flags_that_meant_nothing(flags, says):
    with pytest.raises(MethodError, match=says): seed_method(flags)
