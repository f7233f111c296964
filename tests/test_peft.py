"Methods on a model: LoRA against autograd and Hugging Face, state tuning and trained parts against what they must equal."
import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_peft.model.checkpoint import save
from rwkv_peft.model.linear import Linear
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.state import State, load_state, save_state
from rwkv_peft.peft.adapters import attach, detach, merge, trained_parameters
from rwkv_peft.peft.lora import LoRA, LoRAAdapter, LoRAProduct, dropout_mask, find_linears, linears
from rwkv_peft.peft.parts import Train
from rwkv_peft.peft.state_tuning import StateTuning
from small import SIZES, loss_of, new_model, rel, rows, steps, stir


# ---- LoRA


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
def test_product_equals_autograd_with_every_gradient(dropout, shape):
    torch.manual_seed(0)
    base, s = Linear(7, 6).double(), 1.7
    x, A, B = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in (shape, (3, 7), (6, 3)))
    inputs = x, A, B, base.weight
    torch.manual_seed(4)
    y = LoRAProduct.apply(x, A, B, base.weight, s, dropout, base)
    torch.manual_seed(4)
    mask = dropout_mask(x.reshape(-1, 7), dropout, int(torch.randint(2**31, ()))).view(shape)
    wanted = x @ base.weight.T + s * ((x * mask) @ A.T) @ B.T
    g = torch.randn_like(y)
    assert y.shape == wanted.shape and torch.allclose(y, wanted, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g)): assert torch.allclose(ours, theirs, atol=1e-12)
    if dropout: assert 0 < (mask == 0).sum() < mask.numel()


def test_product_gradcheck_and_no_gradient_where_none_is_wanted():
    base = Linear(5, 4).double()
    x, A, B = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5), (2, 5), (4, 2)))
    assert torch.autograd.gradcheck(lambda x, A, B, W: LoRAProduct.apply(x, A, B, W, 0.5, 0.0, base), (x, A, B, base.weight))
    frozen = base.weight.detach()
    y = LoRAProduct.apply(x.detach(), A, B, frozen, 0.5, 0.0, base)
    y.sum().backward()
    assert x.grad is None and base.weight.grad is None and A.grad is not None


def test_dropout_mask_is_fair_and_keeps_the_mean():
    mask = dropout_mask(torch.empty(1000, 200), 0.3, 11)
    assert abs((mask == 0).double().mean().item() - 0.3) < 0.005 and abs(mask.double().mean().item() - 1) < 0.01
    assert rel(mask.mean(0), torch.ones(200)) < 0.03 and not torch.equal(mask, dropout_mask(mask, 0.3, 12))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_x_is_kept_for_the_backward(dropout):
    base = Linear(64, 64).requires_grad_(False)
    base.adapter = LoRAAdapter(base, 4, 1.0, dropout)
    x, kept = torch.randn(50, 64, requires_grad=True), {}
    def pack(t):
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): base(x)
    assert kept == {t.data_ptr(): t.untyped_storage().nbytes() for t in (x, base.adapter.A, base.adapter.B)}


def test_dropout_under_checkpointing_gives_the_same_gradients():
    base = Linear(16, 16).requires_grad_(False)
    base.adapter = LoRAAdapter(base, 4, 1.0, 0.4)
    torch.nn.init.normal_(base.adapter.B)
    x, found = torch.randn(9, 16, requires_grad=True), []
    for f in (base, lambda x: checkpoint(base, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(f(x).square().sum(), [x, base.adapter.A, base.adapter.B]))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_masters_stay_fp32_over_a_bfloat16_base():
    torch.manual_seed(0)
    full = Linear(48, 40).requires_grad_(False)
    full.adapter = LoRAAdapter(full, 4, 2.0)
    torch.nn.init.normal_(full.adapter.B)
    half = copy.deepcopy(full)
    half.weight.data = half.weight.data.bfloat16()
    x = torch.randn(30, 48)
    y, z = full(x), half(x.bfloat16())
    for out in (y, z): out.float().square().sum().backward()
    assert z.dtype == torch.bfloat16 and half.adapter.A.grad.dtype == torch.float32 == half.adapter.B.dtype
    assert rel(z.float(), y) < 2e-2 and rel(half.adapter.A.grad, full.adapter.A.grad) < 2e-2 and rel(half.adapter.B.grad, full.adapter.B.grad) < 2e-2


def test_lora_equals_hugging_face_in_output_gradients_and_after_steps():
    import peft
    x, ours = rows(), attach(new_model(), LoRA(r=4, alpha=6))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=sorted(linears(ours).keys() - {"head"}))
    theirs = peft.get_peft_model(new_model(), config)
    stir(ours)
    adapters = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapters.keys() == find_linears(ours).keys()
    with torch.no_grad():
        for n, m in find_linears(ours).items():
            adapters[n].lora_A["default"].weight.copy_(m.adapter.A)
            adapters[n].lora_B["default"].weight.copy_(m.adapter.B)
    pairs = [(getattr(m.adapter, side), getattr(adapters[n], f"lora_{side}")["default"].weight) for n, m in find_linears(ours).items() for side in "AB"]
    assert rel(ours(x)[0], theirs(x)[0]) < 1e-6
    loss_of(ours, x).backward()
    loss_of(theirs.base_model.model, x).backward()
    for a, b in pairs: assert rel(a.grad, b.grad) < 1e-5
    before = [a.detach().clone() for a, _ in pairs]
    for side in (0, 1): torch.optim.SGD([pair[side] for pair in pairs], lr=1e-2).step()
    for (a, b), old in zip(pairs, before): assert rel(a, b) < 1e-6 and not torch.equal(a, old)


def test_dropout_acts_in_training_only():
    x, model = rows(), attach(new_model().eval(), LoRA(r=4, dropout=0.5))
    stir(model)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_weight_and_adapter_can_train_together():
    x, model = rows(), attach(new_model(), LoRA(r=4), Train(r"att\.key\.weight"), targets="att.key")
    stir(model)
    m, dense = model.blocks[1].att.key, copy.deepcopy(model)
    for part in linears(dense).values():     # the oracle: W + s B A by plain autograd, without the adapter's own backward
        if part.adapter is None: continue
        adapter, part.adapter = part.adapter, None
        part.A, part.B = adapter.A, adapter.B
        part.forward = lambda h, part=part: h @ (part.weight + part.B @ part.A).T
    loss_of(model, x).backward()
    loss_of(dense, x).backward()
    d = dense.blocks[1].att.key
    assert rel(m.weight.grad, d.weight.grad) < 1e-5 and rel(m.adapter.A.grad, d.A.grad) < 1e-5 and rel(m.adapter.B.grad, d.B.grad) < 1e-5


# ---- attach, detach, merge


def test_attach_trains_what_the_methods_name_and_nothing_else():
    model = attach(new_model(), LoRA(r=4), StateTuning())
    names, C, F, L = list(trained_parameters(model)), 32, 80, 3
    assert all(".adapter." in n or n.endswith("time_state") for n in names)
    assert sum(p.numel() for p in trained_parameters(model).values()) == L * (4 * (4 * 2 * C + 2 * (C + F)) + C * 8)
    assert {n.split(".adapter.")[0] for n in names if "adapter" in n} == {f"blocks.{i}.{m}" for i in range(L) for m in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")}
    assert all(p.dtype == torch.float32 for p in trained_parameters(model).values())


@pytest.mark.parametrize("methods", [(LoRA(r=4),), (StateTuning(),), (LoRA(r=2, dropout=0.1), StateTuning()), (Train("time"),), (LoRA(r=4), Train(["ln", "emb"]))])
def test_frozen_tensors_do_not_move_by_a_bit_and_trained_ones_do(methods):
    model = attach(new_model(), *methods)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = set(trained_parameters(model))
    steps(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


def test_attaching_changes_nothing_and_detaching_restores_every_bit():
    x, model = rows(), new_model()
    before, flags = model(x)[0], {n: p.requires_grad for n, p in model.named_parameters()}
    attach(model, LoRA(r=4), StateTuning())
    assert torch.equal(model(x)[0], before)
    steps(model)
    assert not torch.allclose(model(x)[0], before, atol=1e-3)
    detach(model)
    assert torch.equal(model(x)[0], before) and {n: p.requires_grad for n, p in model.named_parameters()} == flags
    attach(model, LoRA(r=4))     # bare again


def test_detach_reads_trained_weights_from_their_file_or_says_that_it_cannot(tmp_path):
    x, path = rows(), save(new_model(), tmp_path / "base.safetensors")
    model = RWKV.load(path, dtype=torch.float32, device="cpu")
    before = model(x)[0]
    attach(model, Train(["ln", "time"]), LoRA(r=2))
    steps(model)
    assert torch.equal(detach(model)(x)[0], before)
    attach(model, Train("head"))
    steps(model)
    save(new_model(seed=7), path)
    with pytest.raises(ValueError, match="not the base it started from"): detach(model)
    lost = attach(new_model(), Train("emb"))
    with pytest.raises(ValueError, match="emb.weight was trained itself and this model came from no file"): detach(lost)


def test_merged_equals_attached_and_keeps_the_state():
    x, model = rows(), attach(new_model(), LoRA(r=4, alpha=9), StateTuning(), Train("ln"))
    stir(model)
    attached, before = model(x)[0].detach(), {n: m.weight.clone() for n, m in linears(model).items()}
    deltas = {n: m.adapter.s * m.adapter.B.double() @ m.adapter.A.double() for n, m in find_linears(model).items()}
    merge(model)
    assert rel(model(x)[0], attached) < 1e-5
    assert all(rel(m.weight.double(), before[n].double() + deltas[n]) < 1e-6 for n, m in find_linears(model).items()) and torch.equal(model.head.weight, before["head"])
    assert all(m.adapter is None for m in linears(model).values()) and all(b.att.time_state.abs().sum() > 0 for b in model.blocks)
    attach(model, LoRA(r=2))
    assert not model.blocks[0].att.time_state.requires_grad
    detach(model)
    assert model.blocks[0].att.time_state is not None


@pytest.mark.parametrize("call, says", [
    (lambda m: attach(m), "needs a method"),
    (lambda m: attach(m, LoRA), r"write LoRA\(\)"),
    (lambda m: attach(m, "lora"), "'lora' is no method"),
    (lambda m: attach(m, LoRA(r=4), targets="att.kye"), "'att.kye'; the nearest is 'att.key'"),
    (lambda m: attach(m, LoRA(r=4), targets=[]), "targets is empty"),
    (lambda m: attach(m, LoRA(r=4), targets="att.w1"), "no matrix of this model is called 'att.w1'"),
    (lambda m: attach(m, LoRA(r=33)), r"blocks.0.att.receptance: LoRA rank r=33 is above 32"),
    (lambda m: attach(m, LoRA(r=4), LoRA(r=4)), "has an adapter already"),
    (lambda m: attach(m, StateTuning(), targets="att.key"), "none of the methods makes one"),
    (lambda m: attach(m, LoRA(r=4), Train("tmie")), "'tmie' fits no tensor of this model; the nearest name is 'time'"),
    (lambda m: attach(m, LoRA(r=4), StateTuning("nowhere.pth")), "nowhere.pth"),
    (lambda m: attach(m, StateTuning("keep")), "no time_state to keep"),
    (lambda m: attach(m, StateTuning(State.zeros(m.config, batch=2))), "2 rows"),
    (lambda m: attach(m, StateTuning({"blocks.0.att.time_state": torch.zeros(4, 8, 8)})), "1 layers"),
    (lambda m: attach(m.bfloat16(), Train("ln")), "load the model with dtype=torch.float32"),
    (lambda m: detach(m), "nothing is attached"),
    (lambda m: merge(m), "nothing is attached"),
])
def test_a_refusal_is_one_sentence_and_leaves_the_model_alone(call, says):
    model = new_model()
    with pytest.raises(ValueError, match=says) as e: call(model)
    assert "\n" not in str(e.value)
    assert all(m.adapter is None for m in linears(model).values()) and all(p.requires_grad for p in model.parameters())
    assert all(b.att.time_state is None for b in model.blocks) and getattr(model, "attached", None) is None


@pytest.mark.parametrize("make", [lambda: LoRA(r=0), lambda: LoRA(r=2.5), lambda: LoRA(dropout=1.0), lambda: Train([]), lambda: Train(3)])
def test_settings_that_cannot_be_are_refused_at_once(make):
    with pytest.raises(ValueError): make()


def test_attaching_twice_is_refused():
    model = attach(new_model(), LoRA(r=4))
    with pytest.raises(ValueError, match="detach"): attach(model, StateTuning())
    assert model.blocks[0].att.time_state is None and model.blocks[0].att.key.adapter is not None


# ---- state tuning and parts


def test_trained_state_goes_through_the_official_file(tmp_path):
    x, model = rows(), attach(new_model(), StateTuning())
    steps(model, lr=0.1)
    states = load_state(save_state(model, tmp_path / "state.pth"), model.config)
    assert list(states) == [f"blocks.{i}.att.time_state" for i in range(3)] and all(s.shape == (4, 8, 8) for s in states.values())
    again = attach(new_model(), StateTuning(tmp_path / "state.pth"))
    assert torch.equal(again(x)[0], model(x)[0])
    handed = State.zeros(model.config, batch=2)
    for i, s in enumerate(states.values()): handed.wkv[i] = s
    assert torch.equal(new_model()(x, handed)[0], model(x)[0])


def test_a_state_read_from_a_prompt_starts_where_the_prompt_ended():
    model = new_model()
    _, state = model(rows(batch=1))
    attach(model, StateTuning(state.detach()))
    assert all(torch.equal(b.att.time_state, state.wkv[i, 0]) for i, b in enumerate(model.blocks))


def test_state_gradient_sums_over_packed_documents():
    model = attach(new_model(dtype=torch.float64), StateTuning())
    stir(model, 0.3)
    a, b = rows(1, 9, seed=3), rows(1, 6, seed=4)
    def gradient(x, targets, **kwargs):
        loss = model(x, targets=targets, **kwargs)[0]
        return torch.autograd.grad(loss, list(trained_parameters(model).values()))
    apart = [p + q for p, q in zip(gradient(a[:, :-1], a[:, 1:]), gradient(b[:, :-1], b[:, 1:]))]
    resets = torch.zeros(1, 13, dtype=torch.bool)
    resets[0, [0, 8]] = True
    packed = gradient(torch.cat([a[:, :-1], b[:, :-1]], 1), torch.cat([a[:, 1:], b[:, 1:]], 1), resets=resets)
    for p, q in zip(packed, apart): assert rel(p, q) < 1e-9


def test_groups_of_parts_are_disjoint_and_cover_the_model():
    model = new_model()
    groups = [set(Train(word).names(model)) for word in ("emb", "head", "ln", "time")] + [set(find_linears(model))]
    groups[-1] = {f"{n}.weight" for n in groups[-1]}
    every = {n for n, _ in model.named_parameters()}
    assert set().union(*groups) == every == set(Train("all").names(model)) and sum(map(len, groups)) == len(every)
    assert {"blocks.1.att.w0", "blocks.1.att.x_r", "blocks.2.att.r_k", "blocks.0.ffn.x_k", "blocks.1.att.v2", "blocks.0.att.k_a"} <= groups[3]
    attach(model, LoRA(r=2), StateTuning(), Train("all"))
    assert set(Train("all").names(model)) == every


def test_full_training_equals_plain_training():
    ours, plain = attach(new_model(), Train("all")), new_model()
    for model in (ours, plain): steps(model)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters()))
