"int8 storage and its products, against whole-number arithmetic, bitsandbytes and the dequantised model."
import pytest
import torch
from rwkv_peft.kernels.int8 import int8_linear, int8_linear_back, int8_op, int8_status, quantise_rows
from rwkv_peft.model.quant import quantize
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.peft.adapters import attach
from rwkv_peft.peft.lora import LoRA

vnni = pytest.mark.skipif(int8_status() == (False, "this processor has no AVX-512 VNNI"), reason="the products need VNNI; without it quantize() takes 'dequant'")
SIZES = [(1, 1, 1), (1, 17, 65), (3, 65, 17), (17, 3, 129), (65, 130, 64), (7, 33, 4100), (50, 5000, 33)]
BARS = {"fast": 2e-2, "exact": 5e-7}


def off(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_rows_are_rounded_as_bitsandbytes_does():
    from bitsandbytes.functional import int8_vectorwise_quant
    torch.manual_seed(0)
    W = torch.randn(33, 70)
    q, scale = quantise_rows(W)
    theirs, most, _ = int8_vectorwise_quant(W.half())
    ours, top = quantise_rows(W.half().float())
    assert torch.equal(most.float().flatten(), W.half().float().abs().amax(1)) and (ours.int() - theirs.int()).abs().max() <= 1 and (ours == theirs).float().mean() > .99
    assert torch.equal(q, torch.round(W * (127 / W.abs().amax(1, keepdim=True))).to(torch.int8)) and torch.equal(scale, W.abs().amax(1) / 127)
    q, scale = quantise_rows(torch.zeros(2, 3))
    assert not q.any() and not scale.any()
    with pytest.raises(ValueError, match="row 1"): quantise_rows(torch.tensor([[1.], [float("nan")]]))


@vnni
@pytest.mark.parametrize("M,out,inner", SIZES)
def test_products_are_whole_number_products(M, out, inner):
    torch.manual_seed(M)
    q, scale = torch.randint(-127, 128, (out, inner)).to(torch.int8), torch.rand(out) + .1
    ones = torch.ones(out)
    whole, back = torch.randint(-127, 128, (M, inner)).float(), torch.randint(-127, 128, (M, out)).float()
    whole[:, 0], back[:, 0] = 127, -127                  # the largest value is 127: rounding changes nothing
    for mode in BARS:
        exact = (whole.long() @ q.long().T).float()
        assert torch.equal(int8_linear(whole, q, ones, mode), exact) or off(int8_linear(whole, q, ones, mode), exact) < 2e-7
        assert off(int8_linear_back(back, q, ones, mode), back.long() @ q.long() + 1e-30) < 2e-7
        x, g, W = torch.randn(M, inner), torch.randn(M, out), q.double() * scale.double()[:, None]
        assert off(int8_linear(x, q, scale, mode), x.double() @ W.T) < BARS[mode] * 3
        assert off(int8_linear_back(g, q, scale, mode), g.double() @ W) < BARS[mode] * 3


@vnni
def test_extremes_threads_layouts_and_registration():
    torch.manual_seed(0)
    q, scale, x = torch.full((70, 200), -127, dtype=torch.int8), torch.ones(70), torch.full((9, 200), 1.)
    assert torch.equal(int8_linear(x, q, scale), torch.full((9, 70), -127. * 200))
    q = torch.randint(-127, 128, (300, 200)).to(torch.int8)
    scale, x = torch.rand(300), torch.randn(200, 90).T
    x[3, 5], x[4, 0], x[5, 0], x[6] = 1e4, float("nan"), float("inf"), 0
    y = int8_linear(x, q, scale, "exact")
    assert y[4:6].isnan().all() and not y[6].any() and not y[[0, 1, 2, 3]].isnan().any()
    assert off(y[3], x[3].double() @ (q.double() * scale.double()[:, None]).T) < 1e-6
    try:
        torch.set_num_threads(2)
        assert torch.equal(int8_linear(x, q, scale, "exact")[:4], y[:4])
    finally: torch.set_num_threads(1)
    torch.library.opcheck(int8_op, (torch.randn(3, 200, requires_grad=True), q, scale, 1, False), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    assert int8_linear(x.to("meta"), q.to("meta"), scale.to("meta")).shape == (90, 300)
    z = torch.randn(3, 200, requires_grad=True)
    int8_linear(z, q, scale, "exact").sum().backward()
    assert off(z.grad, torch.ones(3, 300) @ (q * scale[:, None])) < 1e-6
    for wrong in (lambda: int8_linear(x, q, scale, "slow"), lambda: int8_linear(x[:, 1:], q, scale), lambda: int8_linear(x, q.float(), scale), lambda: int8_linear(x, q, scale[1:])):
        with pytest.raises(ValueError, match="int8 product"): wrong()


def lora(matmul=None, dense=False):
    torch.manual_seed(0)
    model = attach(RWKV.load("rwkv7-tiny", dtype=torch.float32), LoRA(r=8))
    for name, p in model.named_parameters():
        if name.endswith("adapter.B"): torch.nn.init.normal_(p, std=.02)
    if matmul: quantize(model, "int8", int8_matmul=matmul, head=True)
    for part in model.modules() if dense else ():
        if getattr(part, "storage", None) is not None: part.weight, part.storage = torch.nn.Parameter(part.storage.dense(), requires_grad=False), None
    return model


def measured(model):
    tokens = torch.tensor([[0, *model.tokenizer.encode("User: What is the capital of France?\n\nAssistant: Paris is the capital, and the cat sat on the mat.")]])
    loss, _ = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return model(tokens)[0].detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@vnni
def test_exact_is_the_dequantised_model_and_fast_is_near():
    floats, dense = measured(lora()), measured(lora("exact", dense=True))
    for matmul in ("dequant", "exact"):
        logits, grads = measured(lora(matmul))
        assert off(logits, dense[0]) < 1e-4 and off(grads, dense[1]) < 1e-4
    logits, grads = measured(lora("fast"))
    assert torch.cosine_similarity(grads, floats[1], 0) > .995 and torch.cosine_similarity(grads, dense[1], 0) > .995


def test_storage_is_saved_moved_and_refused():
    model = lora("dequant")
    saved = {name: x.clone() for name, x in model.state_dict().items()}
    assert saved["blocks.0.att.key.storage.q"].dtype == torch.int8
    again = lora("dequant")
    for x in again.state_dict().values(): x.zero_()
    again.load_state_dict(saved)
    assert all(torch.equal(x, saved[name]) for name, x in again.state_dict().items())
    assert model.bfloat16().blocks[0].att.key.storage.scale.dtype == torch.float32
    with pytest.raises(ValueError, match="int8_matmul"): quantize(model, "int8", int8_matmul="quick")
    with pytest.raises(ValueError, match="packed as int8, and nf4"): quantize(model, "nf4")
    model = lora()
    model.blocks[0].att.key.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="blocks.0.att.key trains"): quantize(model)
