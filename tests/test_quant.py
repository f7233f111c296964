"nf4, fp4 and int8 storages: bitsandbytes' bytes, exact products and gradients, sizes, files, and what is refused."
import builtins
import gc
import json
import os
import socket
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from rwkv_peft import RWKV, attach
from rwkv_peft.bench.memory import saved_bytes
from rwkv_peft.kernels.cross_entropy import linear_cross_entropy
from rwkv_peft.model.checkpoint import base_tensors, blank, fingerprint, official, save
from rwkv_peft.model.linear import Linear
from rwkv_peft.model.quant import CODES, FourBit, dynamic_map, four_bit_status, kind_of, pack4, quantize, rounded, storage_of, unpack4
from rwkv_peft.model.sample import Sampler
from rwkv_peft.model.step import fits_step, step
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.peft.parts import Train

SHAPES = [(96, 128), (7, 64), (33, 70), (5, 3), (3, 129), (1, 2), (1, 1)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
four = pytest.mark.parametrize("kind", ["nf4", "fp4"])
every = pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])


def tiny(dtype=torch.float32, **more): return RWKV.load("rwkv7-tiny", device="cpu", dtype=dtype, **more)


@four
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_and_numbers_are_those_of_bitsandbytes(kind, shape, dtype):
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
    torch.manual_seed(0)
    W = torch.randn(shape).to(dtype)
    if len(W) > 3: W[2] = 0
    packed, absmax = pack4(W, kind)
    theirs, state = quantize_4bit(W, quant_type=kind)
    assert torch.equal(packed, theirs.flatten()) and torch.equal(absmax, state.absmax) and torch.equal(torch.tensor(CODES[kind]), get_4bit_type(kind, "cpu"))
    W4 = FourBit(W, kind)
    assert W4.dtype == dtype and W4.dense().dtype == dtype and W4.shape == shape and len(W4) == shape[0]
    if shape[1] % 2 == 0 and len(packed) > 1: assert torch.equal(W4.dense(), dequantize_4bit(theirs, state))      # odd rows would be compiled there, which takes ten seconds
    assert torch.equal(W4.dense(), unpack4(packed, absmax, kind, shape).to(dtype)) and torch.equal(W4.dense(torch.float64), W4.dense(torch.float32).double())


@pytest.mark.parametrize("shape", [(64, 96), (2, 80), (7, 32), (3, 130), (128, 16)])
@four
def test_rows_that_cut_a_block_in_two(kind, shape):
    "bitsandbytes' CPU code takes the scales by rows, and is off by whole weights there; so it gets rows of one block each."
    torch.manual_seed(0)
    W = torch.randn(shape)
    packed, absmax = pack4(W, kind)
    assert torch.equal(FourBit(W, kind).dense(), unpack4(packed, absmax, kind, shape)) and (FourBit(W, kind).dense() - W).norm() < .2 * W.norm()


@four
def test_scales_rounded_twice_are_near_bitsandbytes(kind):
    from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit
    torch.manual_seed(0)
    W = torch.randn(640, 257 * 2)
    assert torch.equal(dynamic_map(), create_dynamic_map())
    ours, (theirs, state) = FourBit(W, kind, double=True), quantize_4bit(W, quant_type=kind, compress_statistics=True)
    assert torch.equal(ours.packed, theirs.flatten()) and torch.equal(ours.absmax, state.state2.absmax) and torch.equal(ours.offset, state.offset)
    steps = (ours.absmax8.int() - state.absmax.int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < .01                                # their search is off by one level now and then
    error = lambda near: ((near - W).norm() / W.norm()).item()
    assert error(ours.dense()) <= error(dequantize_4bit(theirs, state)) + 1e-5
    assert ours.nbytes / W.numel() < .517


def test_storages_take_the_bytes_of_their_format():
    W = torch.randn(192, 768)
    n = W.numel()
    for kind in CODES:
        assert storage_of(W, kind).nbytes == n * .5 + n / 64 * 4
        assert storage_of(W, kind, double=True).nbytes == n * .5 + n / 64 + 4 * n / 64 / 256 + 4
    assert storage_of(W, "int8").nbytes == n + 4 * len(W)
    for kind in ("nf4", "int8"):
        model = quantize(tiny(), kind)
        held = sum(x.nbytes for part in model.modules() if isinstance(part, Linear) and part.storage is not None for x in [*part.parameters(), *part.buffers()])
        size = sum(part.out_features * part.in_features for part in model.modules() if isinstance(part, Linear) and part.storage is not None)
        rows = sum(part.out_features for part in model.modules() if isinstance(part, Linear) and part.storage is not None)
        assert held == (size * .5625 if kind == "nf4" else size + 4 * rows) and not any(p.requires_grad for n, p in model.named_parameters() if ".storage." in n)


def test_relative_errors_are_those_of_the_formats():
    torch.manual_seed(0)
    W = torch.randn(512, 1024)
    error = lambda kind: ((rounded(W, kind) - W).norm() / W.norm()).item()
    assert error("nf4") == pytest.approx(.092, abs=.001) and error("fp4") == pytest.approx(.122, abs=.001) and error("int8") < .009     # bitsandbytes' own, on such numbers
    assert torch.equal(rounded(W, "none"), W) and rounded(W.bfloat16(), "nf4").dtype == torch.bfloat16


@every
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_products_rows_and_gradients_are_the_dense_ones(kind, dtype):
    torch.manual_seed(0)
    layer = Linear(70, 33)
    layer.pack(storage_of(layer.weight.detach(), kind))
    layer.to(dtype)
    assert layer.dtype == dtype and all(b.dtype == torch.float32 for b in layer.storage.buffers())
    W, x = layer.dense().detach(), torch.randn(2, 20, 70).to(dtype).requires_grad_()
    g, tight = torch.randn(2, 20, 33).to(dtype), dict(rtol=1e-5, atol=1e-5) if dtype in (torch.float32, torch.float64) else dict(rtol=2e-2, atol=2e-2)
    layer(x).backward(g)
    torch.testing.assert_close(layer(x), x @ W.T, **tight)
    torch.testing.assert_close(x.grad, g @ W, **tight)
    i = torch.tensor([4, 0, 32, 4])
    torch.testing.assert_close(layer.storage.rows(i), W[i].float(), rtol=1e-2 if dtype in FLOATS[1:] else 1e-6, atol=0)
    with torch.no_grad(): torch.testing.assert_close(layer(x[:, :1]), x[:, :1] @ W.T, **tight)


@every
def test_gradcheck_in_float64_alone_and_under_an_adapter(kind):
    torch.manual_seed(0)
    model = tiny(torch.float64)
    layer = model.blocks[1].att.key
    layer.adapter = None
    layer.pack(storage_of(layer.weight, kind))
    assert layer.dtype == torch.float64
    x = torch.randn(1, 192, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[..., :5], x, fast_mode=True)
    LoRA(r=2).attach(model, "att.key")
    torch.nn.init.normal_(layer.adapter.B)
    assert layer.adapter.A.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x, A, B: layer(x)[..., :5], (x, layer.adapter.A, layer.adapter.B), fast_mode=True)


@every
@pytest.mark.parametrize("adapter", [False, True])
def test_nothing_dequantised_outlives_a_product(kind, adapter):
    torch.manual_seed(0)
    layer, x = Linear(256, 192), torch.randn(40, 256, requires_grad=True)
    if adapter:
        model = torch.nn.ModuleDict({"att": layer})
        LoRA(r=4).attach(model, "att")
    layer.pack(storage_of(layer.weight.detach(), kind))
    made, dense = [], layer.storage.dense
    def watched(dtype=None):
        W = dense(dtype)
        made.append(weakref.ref(W.untyped_storage()))
        return W
    layer.storage.dense = watched
    own = [x] if not adapter else [x, layer.adapter.A, layer.adapter.B]
    assert saved_bytes(lambda: layer(x), own) == 0                                   # LoRA keeps x, A and B, which are there anyway
    y = layer(x)
    gc.collect()
    assert made and all(ref() is None for ref in made)
    y.sum().backward()
    gc.collect()
    assert len(made) >= 3 and all(ref() is None for ref in made)


@every
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_packed_model_is_the_dense_model_of_its_floats(kind, dtype):
    tokens = torch.tensor([[0, *range(60, 90)], [0, *range(40, 70)]])
    packed, dense = attach(tiny(dtype), LoRA(r=4)), attach(tiny(dtype), LoRA(r=4))
    for model in (packed, dense):
        torch.manual_seed(1)
        for n, p in model.named_parameters():
            if n.endswith("adapter.B"): torch.nn.init.normal_(p, std=.02)
            if n.endswith("adapter.A"): torch.nn.init.normal_(p, std=.05)
    quantize(packed, kind, head=True)
    with torch.no_grad():
        for name, part in dense.named_modules():
            if isinstance(part, Linear): part.weight.copy_(packed.get_submodule(name).dense())
    results = []
    for model in (packed, dense):
        loss, _ = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])))
    (loss, grad), (loss0, grad0) = results
    bar = 1e-4 if dtype == torch.float32 else 3e-2
    assert abs(loss - loss0) < bar * loss0 and (grad - grad0).norm() < bar * grad0.norm()


@pytest.mark.parametrize("double", [False, True])
@every
def test_a_packed_model_is_saved_and_read_byte_for_byte(kind, double, tmp_path):
    if kind == "int8" and double: return
    model = quantize(tiny(torch.bfloat16), kind, double=double)
    saved = {n: x.contiguous() for n, x in model.state_dict().items()}
    save_file(saved, tmp_path / "packed.safetensors")
    tensors = load_file(tmp_path / "packed.safetensors")
    into = quantize(RWKV(model.config).bfloat16(), kind, double=double)
    assert into.load_state_dict(tensors, strict=True) and all(torch.equal(x.view(torch.uint8) if x.dim() else x, saved[n].view(torch.uint8) if x.dim() else saved[n]) for n, x in into.state_dict().items())
    empty = quantize(blank(model.config).bfloat16(), kind, double=double)                     # on no device, then filled
    empty.load_state_dict(tensors, strict=True, assign=True)
    tokens = torch.tensor([[0, 72, 101, 108]])
    with torch.no_grad(): assert torch.equal(empty(tokens)[0], model(tokens)[0]) and torch.equal(into(tokens)[0], model(tokens)[0])
    assert not any(p.requires_grad for n, p in empty.named_parameters() if ".storage." in n)


@every
def test_other_tensors_are_refused_before_anything_changes(kind):
    model = quantize(tiny(), kind)
    kept = {n: x.clone() for n, x in model.state_dict().items()}
    other = {"int8": "nf4", "nf4": "fp4", "fp4": "int8"}[kind]
    dense = {n: x + 1 for n, x in tiny().state_dict().items()}
    for tensors, what in ((dense, "blocks.0.att.receptance.weight"), (quantize(tiny(), other).state_dict(), "blocks.0.att.receptance.storage")):
        with pytest.raises(ValueError, match=f"load_state_dict: {what}.*packed as {kind}"): model.load_state_dict(tensors)
        assert all(torch.equal(x, kept[n]) for n, x in model.state_dict().items())
    with pytest.raises(ValueError, match="load_state_dict: blocks.0.att.receptance.storage.* belongs to a packed matrix"): tiny().load_state_dict(kept)
    model.load_state_dict(kept)


@every
def test_storage_moves_and_keeps_its_scales(kind):
    storage = storage_of(torch.randn(8, 64), kind)
    before = storage.dense()
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        storage.to(dtype)
        assert storage.dtype == dtype and storage.dense().dtype == dtype and all(b.dtype in (torch.float32, torch.uint8) for b in storage.buffers())
    assert torch.equal(storage.dense(), before) and storage.device == torch.device("cpu")
    assert storage.to("meta").device.type == "meta" and storage.dense().shape == (8, 64) and storage.product(torch.ones(2, 64, device="meta")).shape == (2, 8)


@every
def test_base_fingerprint_and_files_of_a_packed_model(kind, tmp_path):
    plain = fingerprint(tiny())
    model = tiny(quant=kind)
    assert fingerprint(model) == plain and model.quant == kind
    expected = {n: rounded(x, kind) if n.startswith("blocks") and tiny_linear(n) else x for n, x in base_tensors(tiny()).items()}
    assert all(torch.equal(x, expected[n]) for n, x in base_tensors(model).items())
    again = RWKV.load(save(model, tmp_path / "m.safetensors", torch.float32), device="cpu", dtype=torch.float32)
    assert all(torch.equal(x, official(model, torch.float32)[n]) for n, x in official(again, torch.float32).items())


def tiny_linear(name): return name.endswith((".receptance.weight", ".key.weight", ".value.weight", ".output.weight"))


@every
def test_generation_over_packed_matrices(kind):
    model, dense = tiny(quant=kind), tiny()
    with torch.no_grad():
        for name, part in dense.named_modules():
            if isinstance(part, Linear): part.weight.copy_(model.get_submodule(name).dense())
    prompt = "User: What is the sea?\n\nAssistant:"
    texts = ["".join(m.generate(prompt, max_tokens=24, sampler=Sampler(temperature=0))) for m in (model, dense)]
    assert texts[0] == texts[1] and texts[0]
    with torch.no_grad():
        tokens = torch.tensor([[72]])
        state = model(tokens)[1]
        if kind != "int8": assert not fits_step(model, tokens, state) and step(model, tokens, state) is None
        half = quantize(tiny(torch.bfloat16), kind, head=True)
        assert half(tokens)[0].isfinite().all()


@four
def test_a_packed_head_gives_the_loss_of_its_floats(kind):
    torch.manual_seed(0)
    for dtype, bar in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 3e-2)):
        head, targets, weights = storage_of(torch.randn(257, 64) / 8, kind).to(dtype), torch.randint(257, (9,)), torch.rand(9)
        x = torch.randn(9, 64).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        ours, theirs = linear_cross_entropy(x, head, targets, weights, chunk=4), linear_cross_entropy(y, head.dense(), targets, weights, chunk=4)
        ours.backward(), theirs.backward()
        assert abs(ours - theirs) < bar * theirs and (x.grad - y.grad).norm() < bar * y.grad.norm()


def test_words():
    with pytest.warns(UserWarning, match="nf4 here.*fp4 in RWKV-PEFT"): model = tiny(quant="4bit")
    assert model.quant == "nf4" and isinstance(model.blocks[0].att.key.storage, FourBit)
    assert kind_of(None) == kind_of("none") == "none" and quantize(model, "none") is model
    for wrong, near in (("nf-4", "nf4"), ("fp8", "fp4"), ("INT8", "int8"), ("int4", "int8")):
        with pytest.raises(ValueError, match=f"quant='{wrong}' is not known: did you mean '{near}'"): kind_of(wrong)
        with pytest.raises(ValueError, match="is not known"): quantize(tiny(), wrong)
    with pytest.raises(ValueError, match="is not known"): RWKV.load("a file that isn't there", quant="nf5")      # before anything is read


def test_what_cant_be_is_refused_and_leaves_the_model():
    def untouched(model, match, *args, **more):
        with pytest.raises(ValueError, match=match): quantize(model, *args, **more)
        assert all(part.storage is None for part in model.modules() if isinstance(part, Linear)) and getattr(model, "quant", "none") == "none"
    trained = attach(tiny(), LoRA(r=2), Train(r"blocks\.5\.ffn\.value\.weight"), targets="att.key")
    untouched(trained, "blocks.5.ffn.value trains, and nf4 is for matrices that don't", "nf4")
    broken = tiny()
    with torch.no_grad(): broken.blocks[3].ffn.key.weight[4, 5] = float("nan")
    for kind in ("int8", "nf4"): untouched(broken, "blocks.3.ffn.key holds NaN", kind)
    untouched(tiny(), "int8_matmul='fast' is the product of int8 matrices, and these are nf4", "nf4", int8_matmul="fast")
    untouched(tiny(), "double", "int8", double=True)
    packed = quantize(tiny(), "nf4")
    bytes_before = packed.blocks[0].att.key.storage.packed
    with pytest.raises(ValueError, match="blocks.0.att.receptance is packed as nf4, and int8 would round it a second time"): quantize(packed, "int8")
    assert quantize(packed, "nf4").blocks[0].att.key.storage.packed is bytes_before
    for W in (torch.ones(3), torch.ones(2, 2, dtype=torch.int32), torch.full((2, 2), float("inf")), torch.ones(0, 4)):
        with pytest.raises(ValueError, match="nf4: "): storage_of(W, "nf4")
    with pytest.raises(ValueError, match="keep the matrix as it is"): storage_of(torch.ones(2, 2), "none")


def test_without_bitsandbytes_pytorch_gives_the_same_numbers_and_says_so(monkeypatch):
    W, x = torch.randn(8, 64), torch.randn(3, 64)
    fast = FourBit(W).product(x)
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name.split(".")[0] == "bitsandbytes": raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    four_bit_status.cache_clear()
    try:
        with pytest.warns(UserWarning, match="nf4: bitsandbytes is not installed.*the same numbers"): quantize(tiny(), "nf4")
        assert four_bit_status() == (False, "bitsandbytes is not installed") and torch.equal(FourBit(W).product(x), fast)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize(tiny(), "int8")
    finally: four_bit_status.cache_clear()
    monkeypatch.undo()
    assert four_bit_status()[0] and not four_bit_status("mps")[0]


@every
def test_a_frozen_packed_base_does_not_change_by_a_bit_in_twenty_steps(kind):
    model = quantize(attach(tiny(), LoRA(r=4)), kind)
    kept = {n: x.clone() for n, x in model.state_dict().items() if ".adapter." not in n}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    tokens, losses = torch.tensor([[0, *range(60, 92)]]), []
    for _ in range(20):
        loss, _ = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < .5 * losses[0] and all(torch.equal(x, kept[n]) for n, x in model.state_dict().items() if ".adapter." not in n)


def test_zero3_partitions_packed_matrices_and_trains_the_same():
    if sys.platform != "linux": pytest.skip("DeepSpeed is for Linux")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run([sys.executable, "-W", "ignore", Path(__file__).parent / "zero3_packed.py"], capture_output=True, text=True, timeout=300, env={**os.environ, "MASTER_PORT": str(port)})
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["parts"] == 36 and told["left"] == 0                   # each process holds its share only, before and after
    assert told["exact"] and told["losses"] == pytest.approx(told["expected"], rel=1e-5) and told["losses"][-1] < told["losses"][0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")
@every
def test_a_card_packs_and_multiplies_the_same(kind):
    torch.manual_seed(0)
    W, x = torch.randn(96, 128), torch.randn(5, 128)
    here, there = storage_of(W, kind), storage_of(W.cuda(), kind)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.state_dict().values(), there.state_dict().values()))
    for dtype in FLOATS: torch.testing.assert_close(there.dense(dtype).cpu(), here.dense(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(here.cuda().product(x.cuda()).cpu(), x @ there.dense().cpu().T, rtol=1e-4, atol=1e-4)
    if kind != "int8": assert four_bit_status("cuda")[0]
