"LoRA's relatives: other starts, other ranks, other optimisers, against Hugging Face peft, float64 autograd, and what they promise about the base."
import copy
import math

import pytest
import torch

from rwkv_peft import RWKV, Config
from rwkv_peft.bench.memory import saved_bytes
from rwkv_peft.model import quant
from rwkv_peft.model.linear import Linear
from rwkv_peft.model.quant import quantize
from rwkv_peft.model.rwkv import RWKVConfig
from rwkv_peft.peft.adapters import attach, detach, trained_parameters
from rwkv_peft.peft.inits import EVA, Directions, LoftQ, MiLoRA, OLoRA, PiSSA, StartedAdapter, alternate, balanced, input_directions, top_svd
from rwkv_peft.peft.lora import LoRA, LoRAAdapter, LoRAProduct, MethodError, dropout_mask, find_linears, linears
from rwkv_peft.train.config import ConfigError
from rwkv_peft.train.optim import default_lr, make_optimizer, method_of
from small import SIZES, loss_of, new_model, rel, rows, stir

REWRITING = [PiSSA, OLoRA, MiLoRA]


def weights(model): return {n: m.dense().clone() for n, m in linears(model).items()}


def decaying(o, i, power=-0.5, seed=0):
    "A matrix whose singular values are k ** power, and its exact triples."
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, min(o, i), generator=g, dtype=torch.float64))[0] for n in (o, i))
    S = torch.arange(1, min(o, i) + 1, dtype=torch.float64) ** power
    return U * S @ V.T, (U, S, V.T)


def rounded(W, kind):
    "A four-bit format of bitsandbytes, or int8 by rows: the matrix that a packed one stands for."
    if kind == "int8": return quant.Int8(W).dense()
    import bitsandbytes as bnb
    packed, state = bnb.functional.quantize_4bit(W.contiguous(), quant_type=kind)
    return bnb.functional.dequantize_4bit(packed, state)


@pytest.fixture
def packs(monkeypatch):
    "`model.quant.rounded`, here by bitsandbytes itself."
    monkeypatch.setattr(quant, "rounded", rounded, raising=False)


# ---- targets, ranks, scale


@pytest.mark.parametrize("targets, wanted", [
    ("blocks.1-2", lambda n: n.startswith(("blocks.1.", "blocks.2."))), ("blocks.0-1.att.key", lambda n: n in ("blocks.0.att.key", "blocks.1.att.key")),
    (r"att\.(key|value)$", lambda n: n.endswith(("att.key", "att.value"))), (r"^blocks\.[02]\.ffn", lambda n: n.startswith(("blocks.0.ffn", "blocks.2.ffn"))),
    (["head", "blocks.2-2.ffn"], lambda n: n == "head" or n.startswith("blocks.2.ffn")), ("key", lambda n: n.endswith(".key"))])
def test_targets_by_name_range_and_regular_expression(targets, wanted):
    model = new_model()
    assert list(find_linears(model, targets)) == [n for n in linears(model) if wanted(n)]


def test_a_range_is_of_numbers_and_not_of_letters():
    model = RWKV(RWKVConfig(**{**SIZES, "n_layer": 12}))
    assert list(find_linears(model, "blocks.9-11.att.key")) == [f"blocks.{i}.att.key" for i in (9, 10, 11)]
    assert len(find_linears(model, "blocks.1.att")) == 4 and len(find_linears(model, "blocks.1-1")) == 6


@pytest.mark.parametrize("targets, said", [("att.kye", "att.key"), ("blocks.1-7", "from 0 to 2"), ("blocks.2-1", "from 0 to 2"), ("blocks.5", "nearest"), ("att.(key", "regular expression"), (r"att\.nothing$", "nearest"), ("", "nearest"),
                                           ([], "empty"), ([3], "no name"), (7, "no name"), ("k", "nearest")])
def test_targets_that_fit_nothing_are_refused_and_nothing_changes(targets, said):
    model = new_model()
    with pytest.raises(MethodError, match=said): attach(model, LoRA(r=4), targets=targets)
    assert all(m.adapter is None for m in linears(model).values()) and all(p.requires_grad for p in model.parameters())


def test_ranks_the_last_entry_that_fits_counts():
    model = attach(new_model(), LoRA(r=8, alpha=4, ranks={"att": 4, "blocks.1-2": 6, "blocks.2.att.key": 2}))
    expected = lambda n: 2 if n == "blocks.2.att.key" else 6 if n.startswith(("blocks.1", "blocks.2")) else 4 if ".att." in n else 8
    for name, m in find_linears(model).items(): assert (len(m.adapter.A), m.adapter.B.shape[1], m.adapter.s) == (expected(name), expected(name), 4 / expected(name))
    assert [LoRA(ranks={"att": 4}).scale_of(r) for r in (4, 16)] == [1, 1]


@pytest.mark.parametrize("method, said", [
    (dict(r=0), "r=0"), (dict(r=-1), "r=-1"), (dict(r=True), "r=True"), (dict(r=2.5), "r=2.5"), (dict(ranks={"att": 0}), "ranks"), (dict(ranks=["att"]), "ranks"), (dict(alpha=0), "alpha"), (dict(dropout=1), "dropout"),
    (dict(rslora="yes"), "rslora"), (dict(r=33), "above 32"), (dict(r=4, ranks={"ffn": 40}), "above 32"), (dict(r=4, ranks={"att.kye": 2}), "att.key"), (dict(r=4, ranks={"head": 2}), "ranks"), (dict(r=4, ranks={3: 2}), "ranks")])
@pytest.mark.parametrize("kind", [LoRA, PiSSA, OLoRA, MiLoRA])
def test_bad_values_are_refused_before_anything_changes(kind, method, said):
    model = new_model()
    before = weights(model)
    with pytest.raises(MethodError, match=said) as caught: attach(model, kind(**method))
    assert "\n" not in str(caught.value) and all(torch.equal(w, before[n]) for n, w in weights(model).items())
    assert all(m.adapter is None for m in linears(model).values()) and not hasattr(model, "attached")


@pytest.mark.parametrize("make, said", [(lambda: PiSSA(rounds=2), "kind"), (lambda: PiSSA(rounds=-1), "rounds"), (lambda: LoftQ(rounds=0), "rounds"), (lambda: LoftQ(kind="nf5"), "nf5"), (lambda: LoftQ(kind=None), "kind"),
                                        (lambda: EVA(rho=0.5), "rho"), (lambda: EVA(rho=math.inf), "rho"), (lambda: EVA(r=0), "EVA: r=0"), (lambda: attach(new_model(), EVA(r=4)), "batches"), (lambda: attach(new_model(), EVA(r=4, batches=[])), "0 positions"),
                                        (lambda: attach(new_model(), EVA(r=8, batches=[rows(1, 9)])), "9 positions"),
                                        (lambda: PiSSA(r=4).attach(quantize(new_model(), "int8")), "packed")])
def test_bad_values_of_the_starts(make, said):
    with pytest.raises(MethodError, match=said): make()


def test_a_weight_that_is_not_finite_is_named():
    model = new_model()
    model.blocks[1].ffn.key.weight.data[0, 0] = math.nan
    before = weights(model)
    for method in (PiSSA(r=4), MiLoRA(r=4), OLoRA(r=4)):
        with pytest.raises(MethodError, match=r"blocks\.1\.ffn\.key"): attach(model, method)
    assert all(torch.equal(w.nan_to_num(), before[n].nan_to_num()) for n, w in weights(model).items())


# ---- a frozen A


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("free", ["xB", "B", "x", "xBW", "xAB", "AW"])
def test_every_set_of_wanted_gradients_equals_autograd(free, dropout):
    torch.manual_seed(0)
    base, s = Linear(7, 6).double(), 1.7
    inputs = {n: torch.randn(*size, dtype=torch.float64, requires_grad=n in free) for n, size in (("x", (2, 5, 7)), ("A", (3, 7)), ("B", (6, 3)))}
    base.weight.requires_grad_("W" in free)
    wanted = [t for n, t in {**inputs, "W": base.weight}.items() if n in free]
    torch.manual_seed(4)
    y = LoRAProduct.apply(*inputs.values(), base.weight, s, dropout, base)
    torch.manual_seed(4)
    x, A, B = inputs.values()
    mask = dropout_mask(x.reshape(-1, 7), dropout, int(torch.randint(2**31, ()))).view_as(x) if dropout else 1
    z = x @ base.weight.T + s * ((x * mask) @ A.T) @ B.T
    g = torch.randn_like(y)
    assert torch.allclose(y, z, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(z, wanted, g)): assert torch.allclose(ours, theirs, atol=1e-12)


def test_gradcheck_with_a_frozen_A_and_over_a_started_pair():
    torch.manual_seed(0)
    base = Linear(6, 5).double().requires_grad_(False)
    StartedAdapter(base, *balanced(*top_svd(base.weight, 2), -0.5), -0.5).place(base)
    a, x = base.adapter, torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: LoRAProduct.apply(x, A, B, base.weight, a.s, 0.0, base), (x, a.A, a.B))
    assert torch.autograd.gradcheck(lambda x, B: LoRAProduct.apply(x, a.A.detach(), B, base.weight, a.s, 0.0, base), (x, a.B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saved_bytes_are_one_unit_and_with_a_frozen_A_a_thin_one(dropout, packed, dtype):
    base = Linear(64, 64, dtype=dtype).requires_grad_(False)
    StartedAdapter(base, *balanced(*top_svd(base.weight, 4), 1.0), 1.0, dropout).place(base)
    if packed: base.pack(quant.Int8(base.weight))
    x, there = torch.randn(50, 64, dtype=dtype, requires_grad=True), [*base.parameters(), *base.adapter.parameters()]
    assert saved_bytes(lambda: base(x), there) == x.nbytes
    base.adapter.A.requires_grad_(False)
    assert saved_bytes(lambda: base(x), there) == x.nbytes * 4 // 64


# ---- the SVD


@pytest.mark.parametrize("o, i, r, power", [(500, 400, 8, -0.5), (400, 900, 16, -0.5), (600, 400, 4, -1.0), (40, 30, 30, -0.3), (64, 48, 1, 0.2)])
def test_top_svd_finds_the_known_directions(o, i, r, power):
    W, (U, S, V) = decaying(o, i, power)
    if power > 0: U, S, V = (x.flip(d) for x, d in ((U, 1), (S, 0), (V, 0)))
    u, s, v = top_svd(W, r)
    assert rel(s, S[:r]) < 1e-9 and rel(u * s @ v, U[:, :r] * S[:r] @ V[:r]) < 1e-6
    assert torch.allclose(u.T @ u, torch.eye(r).double(), atol=1e-10) and torch.allclose(v @ v.T, torch.eye(r).double(), atol=1e-10)


def test_top_svd_is_repeatable_and_leaves_the_random_numbers_alone():
    W, _ = decaying(600, 500)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = top_svd(W.float(), 8)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(first, top_svd(W.float(), 8)))


# ---- the start


@pytest.mark.parametrize("alpha, rslora", [(None, False), (12.0, False), (-3.0, False), (6.0, True)])
@pytest.mark.parametrize("kind", REWRITING)
def test_the_start_equals_the_base(kind, alpha, rslora):
    base, x = new_model(), rows()
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        plain, model = (copy.deepcopy(base).to(dtype) for _ in range(2))
        attach(model, kind(r=4, alpha=alpha, rslora=rslora))
        assert all(rel(m.adapter.merged(m.weight), plain.get_submodule(n).weight) < bound for n, m in find_linears(model).items())
        assert rel(model(x)[0], plain(x)[0]) < bound and not torch.equal(model.blocks[0].att.key.weight, plain.blocks[0].att.key.weight)
        assert all(m.adapter.rewrites and m.adapter.A.dtype == dtype for m in find_linears(model).values())


def test_the_start_over_bfloat16_costs_one_rounding_of_what_is_left():
    W, _ = decaying(300, 300)
    base = Linear(300, 300, dtype=torch.bfloat16)
    base.weight.data.copy_(W)
    W = base.weight.detach().double()
    StartedAdapter(base, *balanced(*top_svd(base.weight, 16), 1.0), 1.0).place(base)
    a, b = (p.detach().to(torch.bfloat16).double() for p in (base.adapter.A, base.adapter.B))
    error, half_a_step = base.weight.double() + b @ a - W, 2.0 ** -8 * base.weight.double().abs()
    assert (error.abs() <= half_a_step * 1.01 + 1e-9).all() and base.adapter.A.dtype == torch.float32      # nothing but the rounding of W itself
    assert torch.equal(base.adapter.A, base.adapter.A0) and torch.equal(a.float(), base.adapter.A0)


@pytest.mark.parametrize("kind", REWRITING)
def test_the_pair_is_the_one_that_the_paper_names(kind):
    model, before = new_model(), weights(new_model())
    attach(model, kind(r=3, alpha=6))
    for name, m in find_linears(model).items():
        W, A, B = before[name].double(), m.adapter.A.double(), m.adapter.B.double()
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        kept = {PiSSA: slice(None, 3), MiLoRA: slice(-3, None)}.get(kind)
        if kept:
            assert rel(2 * B @ A, U[:, kept] * S[kept] @ V[kept]) < 1e-5
            assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-5) and torch.allclose(A.norm(dim=1) ** 2, S[kept] / 2, rtol=1e-4)
        else: assert rel(B.T @ B, torch.eye(3)) < 1e-5 and rel(B @ A[:, :3], W[:, :3]) < 1e-5 and rel(A, B.T @ W) < 1e-5


@pytest.mark.parametrize("kind", [LoRA, *REWRITING])
def test_merged_equals_attached_and_the_plain_pair_says_the_same_on_the_untouched_base(kind):
    model, plain = new_model(), new_model()
    attach(model, kind(r=3, alpha=5, rslora=True))
    stir(model)
    merged, exported = copy.deepcopy(plain), copy.deepcopy(plain)
    with torch.no_grad():
        for name, m in find_linears(model).items():
            A, B = m.adapter.plain()
            assert len(A) == B.shape[1] == (3 if kind is LoRA else 6) and not A.requires_grad
            merged.get_submodule(name).weight.copy_(m.adapter.merged(m.weight))
            exported.get_submodule(name).weight.add_(m.adapter.s * B @ A)
    x, y = rows(), model(rows())[0]
    assert rel(merged(x)[0], y) < 3e-6 and rel(exported(x)[0], y) < 3e-6 and rel(plain(x)[0], y) > 1e-3


# ---- Hugging Face


def theirs(model, r, alpha, **kwargs):
    import peft
    names = sorted(find_linears(model))
    return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, **kwargs))


def pairs_of(wrapped): return {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


@pytest.mark.parametrize("method, init", [(PiSSA(r=4), "pissa"), (PiSSA(r=4, alpha=8), "pissa"), (OLoRA(r=4), "olora"), (OLoRA(r=4, alpha=6), "olora")], ids=["pissa", "pissa-alpha8", "olora", "olora-alpha6"])
def test_starts_equal_hugging_face_in_output_and_gradients(method, init):
    x, ours = rows(), attach(new_model(), method)
    hf = theirs(new_model(), 4, method.alpha or 4, init_lora_weights=init)
    found = pairs_of(hf)
    loss_of(ours, x).backward()
    loss_of(hf.base_model.model, x).backward()
    assert rel(ours(x)[0], hf(x)[0]) < 3e-6
    for name, m in find_linears(ours).items():
        (A, B), a = found[name], m.adapter
        signs = (a.A * A).sum(1).sign()                      # a pair of singular vectors may change its sign together
        assert rel(signs[:, None] * a.A, A) < 2e-4 and rel(signs * a.B, B) < 2e-4
        assert rel(signs[:, None] * a.A.grad, A.grad) < 2e-4 and rel(signs * a.B.grad, B.grad) < 2e-4
        assert rel(m.weight, hf.base_model.model.get_submodule(name).base_layer.weight) < 1e-5


@pytest.mark.parametrize("kind, init", [(LoRA, True), (PiSSA, "pissa"), (OLoRA, "olora")])
def test_one_matrix_in_bfloat16_equals_hugging_face_within_rounding(kind, init):
    import peft
    W = new_model().blocks[1].ffn.key.weight.detach().bfloat16()
    base, their = Linear(32, 80, dtype=torch.bfloat16), torch.nn.Linear(32, 80, bias=False, dtype=torch.bfloat16)
    for m in (base, their): m.weight.data.copy_(W)
    ours, hf = torch.nn.ModuleDict({"m": base}), torch.nn.ModuleDict({"m": their})
    kind(r=4, alpha=4).attach(ours, "m")
    hf = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["m"], init_lora_weights=init)).base_model.model["m"]
    pair, g = (hf.lora_A["default"].weight, hf.lora_B["default"].weight), torch.randn(50, 80).bfloat16()
    with torch.no_grad():
        if kind is LoRA: base.adapter.B.normal_()
        for p, q in zip((base.adapter.A, base.adapter.B), pair): q.copy_(p)
        hf.base_layer.weight.copy_(base.weight)
    x, z = (torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_() for _ in range(2))
    mine, other = base(x), hf(z)
    mine.backward(g); other.backward(g)
    assert rel(mine, other) < 5e-3 and rel(x.grad, z.grad) < 5e-3
    for p, q in zip((base.adapter.A, base.adapter.B), pair): assert q.dtype == p.dtype == torch.float32 and rel(p.grad, q.grad) < 5e-3


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5)])
def test_rslora_and_ranks_equal_hugging_face(dtype, bound):
    x, ours = rows(), attach(new_model(dtype=dtype), LoRA(r=4, alpha=6, rslora=True, ranks={"ffn.key": 8}))
    stir(ours)
    hf = theirs(new_model(dtype=dtype), 4, 6, use_rslora=True, rank_pattern={"ffn.key": 8})
    found = pairs_of(hf)
    with torch.no_grad():
        for name, m in find_linears(ours).items():
            for mine, other in zip((m.adapter.A, m.adapter.B), found[name]): other.copy_(mine)
    loss_of(ours, x).backward()
    loss_of(hf.base_model.model, x).backward()
    assert rel(ours(x)[0], hf(x)[0]) < bound
    for name, m in find_linears(ours).items():
        for mine, other in zip((m.adapter.A, m.adapter.B), found[name]): assert rel(mine.grad, other.grad) < 3 * bound


class Tokens(dict):
    "A batch as Hugging Face's EVA takes it."


def test_eva_equals_hugging_face_in_directions_ranks_and_output():
    import peft
    x, batches = rows(), [rows(6, 40, seed=s) for s in range(3)]
    ours = attach(new_model(), EVA(r=4, alpha=8, batches=batches))
    hf = theirs(new_model(), 4, 8, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.0))
    chosen = find_linears(bare := new_model())
    state = {f"base_model.model.{n}": d.V.float() for n, d in input_directions(bare, chosen, batches, dict.fromkeys(chosen, 8)).items()}
    ranks = {n: len(m.adapter.A) if m.adapter is not None else 0 for n, m in find_linears(ours).items()}
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    peft.initialize_lora_eva_weights(hf, eva_state_dict={n: V[:ranks[n.removeprefix("base_model.model.")]] for n, V in state.items()})
    found = pairs_of(hf)
    assert {n: len(A) for n, (A, _) in found.items()} == {n: r for n, r in ranks.items() if r}
    loss_of(ours, x).backward()
    loss_of(hf.base_model.model, x).backward()
    for name, (A, B) in found.items():
        a = ours.get_submodule(name).adapter
        assert rel(a.A, A) < 1e-6 and rel(a.B.grad, B.grad) < 1e-5 and a.s == hf.base_model.model.get_submodule(name).scaling["default"] == 2
    assert torch.equal(ours(x)[0], ours(x)[0]) and rel(ours(x)[0], new_model()(x)[0]) < 1e-6


def test_directions_equal_hugging_faces_incremental_pca_and_the_whole():
    from peft.utils import incremental_pca as pca
    torch.manual_seed(0)
    X = torch.randn(300, 40).double() * 0.8 ** torch.arange(40) + torch.linspace(0, 4, 300)[:, None] * torch.randn(40)
    ours, hf = Directions(5), pca.IncrementalPCA(n_components=5)
    for part in X.split(60):
        ours.see(part)
        hf.partial_fit(part)
    _, S, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert (ours.V * V[:5]).sum(1).abs().min() > 0.9999 and rel(ours.share, S[:5] ** 2 / (S ** 2).sum()) < 1e-3
    assert (ours.V * hf.components_).sum(1).abs().min() > 0.99 and rel(ours.share, hf.explained_variance_ratio_) < 1e-2


def test_eva_sees_resets_weights_and_packed_bases():
    model, x = new_model(), rows(4, 30)
    chosen, whole = find_linears(model, "att.key"), torch.ones(4, 30)
    see = lambda *batch: input_directions(model, chosen, [batch], dict.fromkeys(chosen, 4))["blocks.1.att.key"]
    resets = torch.zeros(4, 30, dtype=torch.bool)
    resets[:, 15] = True
    assert torch.equal(see(x).V, see(x, None, whole).V) and rel(see(x, resets).V, see(x).V) > 1e-3
    left = whole.clone()
    left[:, 20:] = 0
    assert see(x, None, left).n == 80 and torch.allclose(see(x, None, left).V, see(x[:, :20]).V, atol=1e-6)      # a causal model: what comes later changes nothing
    quantize(model, "int8")
    attach(model, EVA(r=4, batches=[x]))
    assert sum(len(m.adapter.A) for m in find_linears(model).values() if m.adapter is not None) == 4 * 18 and model.training


def test_an_error_while_looking_leaves_the_model_as_it_was():
    model = new_model()
    with pytest.raises(ValueError): attach(model, EVA(r=4, batches=[rows(), torch.full((1, 9), 99)]))
    assert all(m.adapter is None for m in linears(model).values()) and model.training and all(p.requires_grad for p in model.parameters())


# ---- packed bases


def nuclear(x): return torch.linalg.matrix_norm(x.double(), "nuc").item()


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_equals_the_papers_loop(packs, rounds):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": Linear(128, 64), "b": Linear(64, 192)}).requires_grad_(False)      # bitsandbytes' CPU kernels err where a row is no multiple of its block of 64
    before = weights(model)
    LoftQ(r=4, rounds=rounds, kind="nf4").attach(model, ["a", "b"])
    for name, m in find_linears(model, ["a", "b"]).items():
        W, rest = before[name], before[name]
        for _ in range(rounds):                              # Hugging Face's loftq_init, which runs on a GPU only
            Q = rounded(rest, "nf4")
            U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
            move = U[:, :4] * S[:4] @ V[:4]
            rest = W - move
        assert rel(m.adapter.delta(), move) < 1e-4 and rel(rounded(m.weight.data, "nf4"), Q) < 1e-6
        assert nuclear(W - rounded(m.weight.data, "nf4") - m.adapter.delta()) < 0.95 * nuclear(W - rounded(W, "nf4"))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_every_start_loses_less_to_packing_than_lora(packs, kind):
    W, _ = decaying(128, 192)
    W = W.float()
    pack = lambda M: rounded(M.float(), kind)
    lost = lambda pair, Q=None: nuclear(W - (pack(W - (pair[1] @ pair[0]).float()) if Q is None else Q) - pair[1] @ pair[0])
    zero, top = (torch.zeros(16, 192), torch.zeros(128, 16)), balanced(*top_svd(W, 16), 1.0)
    plain, pissa = lost(zero), lost(top)
    assert pissa < 0.9 * plain and lost(alternate(W.double(), top, 16, 1.0, 5, pack)) < 1.001 * pissa
    A, B, Q = alternate(W.double(), None, 16, 1.0, 5, pack)
    assert lost((A, B), Q) < plain


@pytest.mark.parametrize("method", [LoRA(r=4), PiSSA(r=4), PiSSA(r=4, rounds=2, kind="int8"), LoftQ(r=4, kind="int8"), OLoRA(r=4), MiLoRA(r=4), LoRA(r=4, rslora=True)], ids=["lora", "pissa", "qpissa", "loftq", "olora", "milora", "rslora"])
def test_training_over_int8_equals_autograd_over_the_dense_matrix(packs, method):
    model, x = attach(new_model(), method), rows()
    stir(model)
    dense = copy.deepcopy(model)
    quantize(model, "int8")
    for name, m in find_linears(dense).items(): m.weight.data.copy_(model.get_submodule(name).dense())
    for m in (model, dense): loss_of(m, x).backward()
    for name, m in find_linears(model).items():
        other = dense.get_submodule(name).adapter
        assert m.adapter.A.dtype == torch.float32 and rel(m.adapter.A.grad, other.A.grad) < 1e-5 and rel(m.adapter.B.grad, other.B.grad) < 1e-5
        assert rel(m.adapter.merged(m.dense()), m.dense() + m.adapter.s * (other.B @ other.A)) < 1e-6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("optim", ["adamw", "loraplus", "lorafa"])
@pytest.mark.parametrize("kind", [LoRA, PiSSA])
def test_frozen_values_do_not_change_by_a_bit_in_20_steps(kind, optim, packed):
    model = attach(new_model(), kind(r=4))
    if packed: quantize(model, "int8")
    named = trained_parameters(model)
    optimizer = make_optimizer(named.items(), 1e-2, optim=optim, model=model)
    trained = {n for n, p in named.items() if p.requires_grad}
    assert all(n.endswith(".B") for n in trained) if optim == "lorafa" else trained == set(named)
    before, first = {n: x.clone() for n, x in model.state_dict().items()}, loss_of(model, rows()).item()
    for _ in range(20):
        loss_of(model, rows()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == trained and loss_of(model, rows()).item() < first


def test_detach_of_a_method_that_leaves_W_alone_gives_the_base_back():
    model, before = new_model(), weights(new_model())
    attach(model, EVA(r=4, batches=[rows(4, 40)]))
    stir(model)
    detach(model)
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


# ---- optimisers


def both(method_alpha=8, rank_pattern=None):
    "Our model and Hugging Face's with the same pairs, B not zero."
    ours = attach(new_model(), LoRA(r=4, alpha=method_alpha, ranks=rank_pattern))
    stir(ours)
    hf = theirs(new_model(), 4, method_alpha, rank_pattern=rank_pattern or {})
    with torch.no_grad():
        for name, pair in pairs_of(hf).items():
            for mine, other in zip((ours.get_submodule(name).adapter.A, ours.get_submodule(name).adapter.B), pair): other.copy_(mine)
    return ours, hf


def compare_steps(ours, hf, mine, other, n=6, bound=1e-6):
    for step in range(n):
        for model, optimizer in ((ours, mine), (hf.base_model.model, other)):
            optimizer.zero_grad()
            loss_of(model, rows(seed=step)).backward()
        for name, pair in pairs_of(hf).items():                                # the same gradients, so that the optimisers alone are compared
            for p, q in zip((ours.get_submodule(name).adapter.A, ours.get_submodule(name).adapter.B), pair): q.grad = None if q.grad is None else p.grad.clone()
        mine.step()
        other.step()
        for name, pair in pairs_of(hf).items():
            for p, q in zip((ours.get_submodule(name).adapter.A, ours.get_submodule(name).adapter.B), pair): assert rel(p, q) < bound


def test_loraplus_equals_hugging_face():
    ours, hf = both()
    from peft.optimizers import create_loraplus_optimizer
    other = create_loraplus_optimizer(hf, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    mine = make_optimizer(trained_parameters(ours).items(), 1e-3, 0.1, optim="loraplus", loraplus_lr_ratio=16.0)
    from rwkv_peft.train.optim import set_lr
    set_lr(mine, 1e-3)
    compare_steps(ours, hf, mine, other)


@pytest.mark.parametrize("alpha, ranks", [(8, None), (2, {"ffn.key": 8})])
def test_lorafa_equals_hugging_face(monkeypatch, alpha, ranks):
    ours, hf = both(alpha, ranks)
    from peft.optimizers import create_lorafa_optimizer, lorafa
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)        # else it rounds the gradient to bfloat16
    other = create_lorafa_optimizer(hf, r=4, lora_alpha=alpha, lr=1e-3)
    mine = make_optimizer(trained_parameters(ours).items(), 1e-3, optim="lorafa", model=ours)
    for group in other.param_groups: group["eps"] = 1e-30
    for group in mine.param_groups: group.update(betas=(0.9, 0.999), eps=1e-30)      # Hugging Face adds its eps in another place, as transformers' old AdamW did
    compare_steps(ours, hf, mine, other)
    for name in pairs_of(hf):                                                          # the moments have the size of the gradient, 1 / s² with it
        assert rel(mine.state[ours.get_submodule(name).adapter.B]["exp_avg"], other.state[f"base_model.model.{name}.lora"]["exp_avg_B"]) < 1e-5


@pytest.mark.parametrize("optim", ["loraplus", "lorafa"])
def test_a_resumed_optimiser_goes_on_bit_for_bit(optim):
    def steps(model, optimizer, which):
        for i in which:
            optimizer.zero_grad()
            loss_of(model, rows(seed=i)).backward()
            optimizer.step()
    def begin(): return (model := attach(new_model(), LoRA(r=4, alpha=2))), make_optimizer(trained_parameters(model).items(), 1e-3, optim=optim, model=model)
    torch.manual_seed(0)
    model, optimizer = begin()
    steps(model, optimizer, range(3))
    held, kept = copy.deepcopy(optimizer.state_dict()), {n: x.clone() for n, x in model.state_dict().items()}
    steps(model, optimizer, range(3, 6))
    again, resumed = begin()
    again.load_state_dict(kept)
    resumed.load_state_dict(held)
    steps(again, resumed, range(3, 6))
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    assert resumed.param_groups[0].get("scales") == optimizer.param_groups[0].get("scales")


def test_lorafa_holds_half_the_moments():
    held = {}
    for optim in ("adamw", "lorafa"):
        model = attach(new_model(), LoRA(r=4), targets="att")
        optimizer = make_optimizer(trained_parameters(model).items(), 1e-3, optim=optim, model=model)
        loss_of(model, rows()).backward()
        optimizer.step()
        held[optim] = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.dim())
    assert held["lorafa"] * 2 == held["adamw"] == 2 * sum(p.numel() for p in trained_parameters(attach(new_model(), LoRA(r=4), targets="att")).values())


@pytest.mark.parametrize("optim, said", [("loraplus", "no(ne|) "), ("lorafa", "none"), ("adam", "not known")])
def test_optimisers_without_a_pair_are_refused(optim, said):
    from rwkv_peft.peft.parts import Train
    model = attach(new_model(), Train("ln"))
    with pytest.raises(ConfigError, match=said): make_optimizer(trained_parameters(model).items(), 1e-3, optim=optim, model=model)


# ---- words


def test_words_become_methods():
    config = Config(model="rwkv7-tiny", data=[{"text": "a"}], r=8, alpha=4.0)
    assert [method_of(w, config) for w in ("lora", "rslora", "pissa", "olora", "milora")] == [LoRA(8, 4), LoRA(8, 4, rslora=True), PiSSA(8, 4), OLoRA(8, 4), MiLoRA(8, 4)]
    assert method_of({"method": "pissa", "r": 2}, config) == PiSSA(2) and method_of({"method": "loftq", "kind": "fp4"}, config) == LoftQ(kind="fp4")
    assert method_of("loftq", config.changed(quant="int8")) == LoftQ(8, 4, kind="int8") and method_of("eva", config).batches is None
    with pytest.raises(ConfigError, match="quant"): method_of("loftq", config)
    with pytest.raises(ConfigError, match="rank"): method_of({"method": "pissa", "rank": 2}, config)
    assert [default_lr([m]) for m in (LoRA(), PiSSA(), OLoRA(), MiLoRA(), EVA(), LoftQ())] == [2e-4, 5e-5, 5e-5, 2e-4, 2e-4, 2e-4]
