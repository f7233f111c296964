"DoRA: against its formula, Hugging Face peft and finite differences, its lengths without a second matrix, and what bad input gets."
import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_peft.bench.memory import saved_bytes
from rwkv_peft.model.linear import Linear
from rwkv_peft.model.quant import Int8, quantize
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.peft.adapters import attach, detach, trained_parameters
from rwkv_peft.peft.lora import LoRA, MethodError, dropout_mask, find_linears, linears
from rwkv_peft.peft.magnitude import DoRA, DoRAAdapter, DoRAProduct, row_lengths
from rwkv_peft.peft.parts import Train
from small import SIZES, loss_of, new_model, rel, rows, steps, stir


def literal(x, W, A, B, m, s, mask=1.0):
    "The equation: W + sBA is built, its row lengths are held constant."
    length = torch.linalg.vector_norm(W + s * B @ A, dim=1).detach()
    return (m / length) * (x @ W.T + s * ((x * mask) @ A.T) @ B.T)


def layer_with(i=48, o=40, r=4, s=1.5, dropout=0.0, dtype=torch.float32, stirred=True):
    torch.manual_seed(0)
    layer = Linear(i, o, dtype=dtype).requires_grad_(False)
    layer.adapter = DoRAAdapter(layer, r, s, dropout)
    if stirred:
        with torch.no_grad(): layer.adapter.B.normal_(std=0.1), layer.adapter.m.mul_(1 + 0.3 * torch.rand(o))
    return layer


# ---- the product


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (0,)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("wants_W", [False, True])
def test_adapter_equals_autograd_of_the_literal_formula(shape, dropout, wants_W):
    layer = layer_with(7, 6, 3, dropout=dropout, dtype=torch.float64)
    layer.weight.requires_grad_(wants_W)
    a, x = layer.adapter, torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True)
    assert a.A.dtype == a.m.dtype == torch.float64
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    mask = dropout_mask(x.reshape(-1, 7), dropout, int(torch.randint(2**31, ()))).view(x.shape)
    wanted = literal(x, layer.weight, a.A, a.B, a.m, a.s, mask)
    inputs, g = (x, a.A, a.B, a.m, layer.weight)[:4 + wants_W], torch.randn_like(wanted)
    assert y.shape == wanted.shape and torch.allclose(y, wanted, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g)): assert torch.allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_with_the_length_held(dropout):
    torch.manual_seed(0)
    base = Linear(5, 4).double()
    x, A, B, m = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5), (2, 5), (4, 2), (4,)))
    m.data[1] = 0                                      # a row that is shut, and can still open
    length = torch.rand(4, dtype=torch.float64) + 0.5
    def f(*inputs):
        torch.manual_seed(3)
        return DoRAProduct.apply(*inputs[:4], length, inputs[4], 0.7, dropout, base)
    assert torch.autograd.gradcheck(f, (x, A, B, m, base.weight))
    turned = x.detach().transpose(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: f(x, A.detach(), B.detach(), m.detach(), base.weight.detach()), turned)


def test_no_gradient_where_none_is_wanted():
    layer, x = layer_with(), torch.randn(5, 48, requires_grad=True)
    layer.adapter.m.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.adapter.m.grad is None and layer.weight.grad is None and layer.adapter.square.grad is None and x.grad is not None and layer.adapter.A.grad is not None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("s, r", [(1.0, 4), (-2.5, 4), (1e-3, 1), (30.0, 16)])
def test_lengths_without_building_the_matrix(dtype, tolerance, s, r):
    torch.manual_seed(0)
    W, A, B = (torch.randn(*size, dtype=dtype) for size in ((60, 80), (r, 80), (60, r)))
    found, exact = row_lengths(W.square().sum(1), W @ A.T, A, B, s), (W.double() + s * B.double() @ A.double()).norm(dim=1)
    assert found.dtype == dtype and ((found - exact) / exact).abs().max() < tolerance
    gone = row_lengths(W.square().sum(1), W @ W[:4].T, W[:4], torch.cat([-torch.eye(4, dtype=dtype), torch.zeros(56, 4, dtype=dtype)]), 1.0)      # rows 0 to 3 are taken away
    assert all(g == torch.inf or 0 < g < 1e-2 for g in gone[:4]) and torch.allclose(gone[4:], W.norm(dim=1)[4:])


def test_no_second_matrix_is_built():
    layer, x, biggest = layer_with(256, 256, 4), torch.randn(8, 256, requires_grad=True), 0
    from torch.utils._python_dispatch import TorchDispatchMode
    class Biggest(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal biggest
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr(): biggest = max(biggest, out.numel())
            return out
    with Biggest(): layer(x).sum().backward()
    assert 8 * 256 <= biggest < 256 * 256 / 4


def test_what_is_kept_for_the_backward():
    for i, o in (256, 256), (256, 64), (64, 256):
        for dropout in (0.0, 0.3):
            layer, x = layer_with(i, o, 4, dropout=dropout), torch.randn(100, i, requires_grad=True)
            inside = [*layer.parameters(), layer.adapter.length(layer)]
            lengths = 4 * o
            assert saved_bytes(lambda: layer(x), inside) - lengths == x.nbytes * (1 + o / i)
            assert saved_bytes(lambda: layer(x).sigmoid() * 2, inside) - lengths == x.nbytes * (1 + 2 * o / i)
            assert saved_bytes(lambda: layer(x) * torch.ones(o, requires_grad=True), inside) - lengths - 4 * o == x.nbytes * (1 + o / i)      # the next operation's copy is the same one
    layer.pack(Int8(layer.weight))
    assert saved_bytes(lambda: layer(x), layer.parameters()) - lengths == x.nbytes * (1 + o / i)


def test_dropout_under_checkpointing_gives_the_same_gradients():
    layer, x, found = layer_with(dropout=0.4), torch.randn(9, 48, requires_grad=True), []
    for f in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(f(x).square().sum(), [x, layer.adapter.A, layer.adapter.B, layer.adapter.m]))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---- lengths that are kept without gradients


def test_kept_lengths_follow_every_write():
    layer, x = layer_with(), torch.randn(3, 48)
    a, fresh = layer.adapter, lambda: literal(x, layer.dense(), layer.adapter.A, layer.adapter.B, layer.adapter.m, layer.adapter.s)
    def check(grad):
        with torch.set_grad_enabled(grad): assert torch.allclose(layer(x), fresh(), atol=1e-5)
    check(False), check(False)
    first = a.kept[1]
    with torch.no_grad(): layer(x)
    assert a.kept[1] is first                                                         # nothing was written: nothing is computed again
    optimiser = torch.optim.SGD([a.A, a.B, a.m], lr=0.1)
    layer(x).square().sum().backward(), optimiser.step(), check(False), check(True), check(False)
    with torch.no_grad(): a.B.mul_(3)
    check(False)
    a.load_state_dict({"A": a.A * 2, "B": a.B + 1, "m": a.m}), check(False)
    a.B = torch.nn.Parameter(torch.randn_like(a.B))
    check(False)
    layer.pack(Int8(layer.weight)), check(False), check(True)
    twin = copy.deepcopy(layer)
    with torch.no_grad(): twin.adapter.A.mul_(2)
    check(False)
    with torch.no_grad(): assert not torch.allclose(twin(x), layer(x))
    with torch.inference_mode(): assert torch.allclose(layer(x), fresh(), atol=1e-5)


def test_lengths_survive_double_and_a_move():
    layer, x = layer_with(), torch.randn(3, 48)
    layer(x)
    layer.double()
    assert rel(layer(x.double()), literal(x.double(), layer.weight, layer.adapter.A, layer.adapter.B, layer.adapter.m, layer.adapter.s)) < 1e-6
    assert "square" not in layer.adapter.state_dict() and set(layer.adapter.state_dict()) == {"A", "B", "m"}


# ---- Hugging Face


def hugging_faces(r, alpha, targets=None, dtype=torch.float32):
    import peft
    model = new_model(dtype=dtype)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, use_dora=True, target_modules=targets or sorted(linears(model).keys() - {"head"})))
    return theirs, {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("r, alpha", [(4, 6), (1, 1), (16, -8)])
def test_dora_equals_hugging_face_in_output_gradients_and_after_steps(r, alpha):
    x, ours, (theirs, adapters) = rows(), attach(new_model(), DoRA(r=r, alpha=alpha)), hugging_faces(r, alpha)
    three = lambda m: (m.lora_A["default"].weight, m.lora_B["default"].weight, m.lora_magnitude_vector["default"].weight)
    for n, m in find_linears(ours).items(): assert rel(m.adapter.m, three(adapters[n])[2]) < 1e-6      # the same start
    stir(ours)
    pairs = [pair for n, m in find_linears(ours).items() for pair in zip((m.adapter.A, m.adapter.B, m.adapter.m), three(adapters[n]))]
    assert len(pairs) == 3 * len(adapters) == 54
    with torch.no_grad():
        for a, b in pairs: b.copy_(a)
    assert rel(ours(x)[0], theirs(x)[0]) < 1e-5 and rel(new_model()(x)[0], theirs(x)[0]) > 1e-2
    loss_of(ours, x).backward()
    loss_of(theirs.base_model.model, x).backward()
    for a, b in pairs: assert rel(a.grad, b.grad) < 1e-4
    before = [a.detach().clone() for a, _ in pairs]
    for side in (0, 1): torch.optim.SGD([pair[side] for pair in pairs], lr=1e-2).step()
    for (a, b), old in zip(pairs, before): assert rel(a, b) < 1e-5 and not torch.equal(a, old)
    merged, whole = {n: m.adapter.merged(m.weight) for n, m in find_linears(ours).items()}, theirs.merge_and_unload()
    for n, W in merged.items(): assert rel(whole.get_submodule(n).weight, W) < 1e-5


def test_dora_equals_hugging_face_in_bfloat16_within_rounding():
    import peft
    ours, x = layer_with(75, 48, 4, 1.0), torch.randn(64, 75)
    ours.weight.data = ours.weight.data.bfloat16()
    net = torch.nn.Sequential(torch.nn.Linear(75, 48, bias=False)).bfloat16()
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    three = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
    a = ours.adapter
    with torch.no_grad():
        layer.base_layer.weight.copy_(ours.weight)
        for p, q in zip(three, (a.A, a.B, a.m)): p.copy_(q)
    found = []
    for f, parameters in (ours, (a.A, a.B, a.m)), (theirs, three):
        z = x.bfloat16().requires_grad_()
        y = f(z)
        y.float().square().sum().backward()
        found.append((y, z.grad, *(p.grad for p in parameters)))
    assert y.dtype == torch.bfloat16 == found[0][0].dtype and {p.dtype for p in (a.A, a.m, a.m.grad, a.B.grad)} == {torch.float32}
    for ours, theirs in zip(*found): assert rel(ours.float(), theirs.float()) < 1e-2


# ---- on a model


def test_twenty_steps_learn_leave_the_base_alone_and_come_off_without_a_trace():
    model, before = attach(new_model(), DoRA(r=4)), {n: p.clone() for n, p in new_model().named_parameters()}
    assert rel(model(rows())[0], new_model()(rows())[0]) < 1e-6
    start, m = loss_of(model, rows(seed=0)).item(), model.blocks[1].att.key.adapter.m.detach().clone()
    steps(model, 20)
    assert loss_of(model, rows(seed=0)).item() < 0.9 * start and not torch.equal(m, model.blocks[1].att.key.adapter.m)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".adapter." not in n)
    assert trained_parameters(model).keys() == {f"{n}.adapter.{p}" for n in find_linears(model) for p in "ABm"}
    detach(model)
    assert {n for n, _ in model.named_parameters()} == before.keys() and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(rows())[0], new_model()(rows())[0]) and model.state_dict().keys() == new_model().state_dict().keys()


@pytest.mark.parametrize("packed", ["no", "after attach", "before"])
def test_merged_equals_attached(packed):
    model = new_model()
    if packed == "before": quantize(model, "int8")
    attach(model, DoRA(r=4, alpha=8))
    if packed == "after attach": quantize(model, "int8")
    stir(model)
    bare = new_model()
    for n, m in find_linears(model).items():
        W = m.adapter.merged(m.dense())
        assert W.shape == (m.out_features, m.in_features) and W.dtype == torch.float32 and not W.requires_grad
        assert torch.allclose(W.norm(dim=1), m.adapter.m, rtol=1e-5)      # the length of each row is the number that was learnt for it
        linears(bare)[n].weight.data = W
    assert rel(bare(rows())[0], model(rows())[0]) < 1e-5 and rel(new_model()(rows())[0], model(rows())[0]) > 1e-2


def test_over_int8_it_trains_as_over_the_floats_that_the_bytes_stand_for():
    packed, floats = quantize(attach(new_model(), DoRA(r=4)), "int8"), attach(new_model(), DoRA(r=4))
    with torch.no_grad():
        for n, m in find_linears(packed).items():
            linears(floats)[n].weight.copy_(m.dense())
            linears(floats)[n].adapter.square.copy_(m.dense().square().sum(1))
    bytes_before = {n: m.storage.q.clone() for n, m in find_linears(packed).items()}
    for model in (stir(packed), stir(floats)): loss_of(model, rows()).backward()
    for n, p in trained_parameters(packed).items(): assert rel(p.grad, trained_parameters(floats)[n].grad) < 1e-4
    steps(packed, 20)
    assert all(torch.equal(m.storage.q, bytes_before[n]) for n, m in find_linears(packed).items())


def test_packing_after_attach_gives_the_rows_their_length_back():
    torch.manual_seed(0)
    layer = Linear(64, 48).requires_grad_(False)
    before = layer.weight.norm(dim=1)
    layer.adapter = DoRAAdapter(layer, 4, 1.0)
    layer.pack(Int8(layer.weight))
    assert torch.allclose(layer.adapter.merged(layer.dense()).norm(dim=1), before, rtol=1e-6) and not torch.allclose(layer.dense().norm(dim=1), before, rtol=1e-6)


def test_weight_and_adapter_can_train_together():
    x, model = rows(), stir(attach(new_model(dtype=torch.float64), DoRA(r=4), Train(r"att\.key\.weight"), targets="att.key"))      # stir moves W too: the lengths must follow
    loss_of(model, x).backward()
    m = model.blocks[1].att.key
    ours = m.adapter.A.grad, m.adapter.B.grad, m.adapter.m.grad, m.weight.grad
    spelled = copy.deepcopy(model)
    for part in linears(spelled).values():
        if part.adapter is None: continue
        adapter, part.adapter = part.adapter, None
        part.A, part.B, part.m = adapter.A, adapter.B, adapter.m
        part.forward = lambda z, part=part, s=adapter.s: literal(z, part.weight, part.A, part.B, part.m, s)
    for p in spelled.parameters(): p.grad = None
    loss_of(spelled, x).backward()
    part = spelled.blocks[1].att.key
    for a, b in zip(ours, (part.A.grad, part.B.grad, part.m.grad, part.weight.grad)): assert rel(a, b) < 1e-9


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_every_version_and_the_head_take_it(version):
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(version, n_layer=2, n_embd=32, head_size=16, vocab_size=256, dim_ffn=96)).double()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    stir(attach(model, DoRA(r=4), targets=["att", "ffn", "head"]))
    spelled = copy.deepcopy(model)
    for part in find_linears(spelled, ["att", "ffn", "head"]).values(): part.adapter.forward = lambda z, base, a=part.adapter: literal(z, base.weight, a.A, a.B, a.m, a.s)
    found = []
    for m in (model, spelled):
        loss = loss_of(m, rows())
        found.append([loss, *torch.autograd.grad(loss, list(trained_parameters(m).values()))])
    assert len(found[0]) == 1 + 3 * len(find_linears(model, ["att", "ffn", "head"]))
    for a, b in zip(*found): assert rel(a, b) < 1e-8
    model.eval()
    with torch.no_grad():
        whole, state = model(rows())[0], None
        for t in range(17):
            y, state = model(rows()[:, t:t + 1], state)      # one token at a time, as in generation, with the lengths kept
            assert rel(y[:, 0], whole[:, t]) < 1e-8


def test_rows_of_zeros_stay_finite():
    layer = Linear(16, 8).requires_grad_(False)
    layer.weight[2:5] = 0
    layer.adapter = DoRAAdapter(layer, 2, 1.0)
    x = torch.randn(6, 16, requires_grad=True)
    optimiser = torch.optim.Adam(layer.adapter.parameters(), lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        layer(x).square().sum().backward()
        optimiser.step()
    assert all(torch.isfinite(t).all() for t in (layer(x), x.grad, layer.adapter.merged(layer.weight), *layer.adapter.parameters())) and layer(x)[:, 2:5].abs().max() < 1e-20
    assert layer.adapter.merged(layer.weight)[2:5].abs().max() < 1e-20 and layer.adapter.m[2:5].abs().max() == 0 and layer.adapter.m[[0, 1, 5, 6, 7]].min() > 0.1


def test_a_fresh_model_whose_outputs_start_at_zero():
    torch.manual_seed(0)
    model = attach(RWKV(RWKVConfig(**SIZES)), DoRA(r=4))
    steps(model, 3)
    assert torch.isfinite(loss_of(model, rows())) and all(torch.isfinite(p).all() for p in trained_parameters(model).values())


def test_a_bias_is_added_unscaled():
    torch.manual_seed(0)
    layer = Linear(16, 8, bias=True).requires_grad_(False)
    layer.adapter = DoRAAdapter(layer, 2, 1.0)
    with torch.no_grad(): layer.adapter.m.mul_(2)
    x = torch.randn(5, 16)
    assert torch.allclose(layer(x), 2 * (x @ layer.weight.T) + layer.bias, atol=1e-5)


# ---- bad input


@pytest.mark.parametrize("settings, says", [
    (dict(r=0), "DoRA: r=0"), (dict(r=True), "DoRA: r=True"), (dict(r=2.5), "DoRA: r=2.5"), (dict(alpha=0), "DoRA: alpha=0"), (dict(alpha=float("nan")), "alpha=nan"), (dict(alpha="8"), "alpha='8'"),
    (dict(dropout=1), "dropout=1"), (dict(dropout=-0.1), "dropout=-0.1"), (dict(dropout=None), "dropout=None"),
])
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(MethodError, match=says): DoRA(**settings)


@pytest.mark.parametrize("method, targets, says", [(DoRA(r=33), None, "blocks.0.att.receptance: DoRA rank r=33 is above 32"), (DoRA(r=4), "att.kye", "nearest is 'att.key'"), (DoRA(r=4), [], "targets is empty")])
def test_what_does_not_fit_is_told_and_the_model_is_left_alone(method, targets, says):
    model = new_model()
    with pytest.raises(MethodError, match=says) as e: attach(model, method, targets=targets)
    assert "\n" not in str(e.value) and all(m.adapter is None for m in linears(model).values()) and all(p.requires_grad for p in model.parameters()) and not hasattr(model, "attached")
    with pytest.raises(MethodError, match="has an adapter already"): attach(model, LoRA(r=4), DoRA(r=4))
    assert DoRA().scale == 1 and DoRA(r=4, alpha=8).scale == 2
