"The fused pieces: their formulas against plain arithmetic, the C++ against the formulas in float64."
import math

import pytest
import torch

from rwkv_peft.kernels import fused, native
from rwkv_peft.kernels.native import native_status

needs_cpp = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
PIECES = {"mix": (fused.mix, fused.mix_formula), "before": (fused.before_wkv7, fused.before_formula), "after": (fused.after_wkv7, fused.after_formula),
          "relu": (fused.relu_squared, lambda x: torch.relu(x) ** 2)}


def arguments(piece, B, T, H, N, first_layer=False, frozen=False):
    "(tensors in float32, those that need gradients, the rest)"
    g = torch.Generator().manual_seed(T * N)
    def normal(*shape): return torch.randn(*shape, generator=g)
    C, resets = H * N, torch.rand(B, T, generator=g) < .2
    tokens, channels = [normal(B, T, C) for _ in range(6)], [normal(1, 1, C) for _ in range(5)]
    if piece == "mix": data, parameters, rest = [tokens[0], normal(B, C)], [torch.rand(6, C, generator=g)], (resets,)
    if piece == "before": data, parameters, rest = tokens, channels, (N,)
    if piece == "before" and first_layer: data, parameters = [*tokens[:4], None, None], [*channels[:2], None, *channels[3:]]
    if piece == "after": data, parameters, rest = tokens[:5], [normal(H, N), channels[0].flatten(), channels[1].flatten()], (64e-5,)
    if piece == "relu": data, parameters, rest = tokens[:1], [], ()
    return [*data, *parameters], [x is not None for x in data] + [x is not None and not frozen for x in parameters], rest


def run(form, tensors, wanted, rest, dtype):
    xs = [None if x is None else x.to(dtype).requires_grad_(want) for x, want in zip(tensors, wanted)]
    out = form(*xs, *rest)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    g = torch.Generator().manual_seed(1)
    return [x.detach() for x in [*out, *torch.autograd.grad(out, [x for x, want in zip(xs, wanted) if want], [torch.randn(o.shape, generator=g).to(dtype) for o in out])]]


@needs_cpp
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("B, T, H, N", [(2, 100, 2, 64), (3, 1, 2, 16), (1, 33, 3, 24), (2, 7, 3, 5)])
@pytest.mark.parametrize("piece, first_layer", [("mix", False), ("before", False), ("before", True), ("after", False), ("relu", False)])
def test_cpp_equals_the_formula(piece, first_layer, B, T, H, N, frozen):
    tensors, wanted, rest = arguments(piece, B, T, H, N, first_layer, frozen)
    fast, exact = (run(form, tensors, wanted, rest, dtype) for form, dtype in zip(PIECES[piece], (torch.float32, torch.float64)))
    assert len(fast) == len(exact)
    for f, e in zip(fast, exact):
        assert f.shape == e.shape and (f.double() - e).norm() <= 5e-7 * e.norm()


def test_before_against_plain_arithmetic():
    tensors, _, (N,) = arguments("before", 1, 3, 2, 4)
    out = fused.before_formula(*(x.double() for x in tensors), N)
    decay, k, v, iclr, v_mix, v_first, w0, a0, v0, k_k, k_a = (x.double().view(-1, 8) for x in tensors)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    t, head = 2, slice(4, 8)
    for j in range(4, 8):
        rate = sigmoid(a0[0, j] + iclr[t, j])
        kk = (k[t, j] * k_k[0, j] / (k[t, head] * k_k[0, head]).norm()).item()
        expected = [-math.exp(-.5) * sigmoid(w0[0, j] + decay[t, j]), (k[t, j] * (1 + (rate - 1) * k_a[0, j])).item(),
                    (v[t, j] + (v_first[t, j] - v[t, j]) * sigmoid(v0[0, j] + v_mix[t, j])).item(), -kk, kk * rate]
        assert [x[0, t, j].item() for x in out] == pytest.approx(expected, rel=1e-12)


def test_after_against_plain_arithmetic():
    tensors, _, (eps,) = arguments("after", 1, 3, 2, 4)
    out = fused.after_formula(*(x.double() for x in tensors), eps)[0, 1, 4:]
    y, r, k, v, g, r_k, weight, bias = (x.double().reshape(-1, 8) for x in tensors)
    (y, r, k, v, g), (r_k, weight, bias) = (x[1, 4:] for x in (y, r, k, v, g)), (x[0, 4:] for x in (r_k, weight, bias))
    normed = (y - y.mean()) / ((y - y.mean()).square().mean() + eps).sqrt() * weight + bias
    torch.testing.assert_close(out, (normed + (r * k * r_k).sum() * v) * g)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=needs_cpp)])
def test_a_reset_hides_the_token_before_and_blocks_its_gradient(dtype):
    x = torch.randn(1, 4, 3, dtype=dtype, requires_grad=True)
    last = torch.randn(1, 3, dtype=dtype, requires_grad=True)
    resets = torch.tensor([[True, False, True, False]])
    mixed, = fused.mix(x, last, torch.ones(1, 3, dtype=dtype), resets)          # mu = 1: only the token before
    torch.testing.assert_close(mixed[0], torch.stack([torch.zeros(3, dtype=dtype), x[0, 0], torch.zeros(3, dtype=dtype), x[0, 2]]))
    mixed.sum().backward()
    assert x.grad[0].tolist() == [[1] * 3, [0] * 3, [1] * 3, [0] * 3] and last.grad.abs().sum() == 0


def test_relu_squared_keeps_its_output_alone_and_lets_nan_through():
    x, kept = torch.randn(3, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): y = fused.relu_squared(x * 1)
    assert not native_status()[0] or [t.data_ptr() for t in kept if t.numel() == 15] == [y.data_ptr()]
    assert fused.relu_squared(torch.tensor([float("nan"), -1., 2.])).isnan().tolist() == [True, False, False]


def test_key_of_zeros():
    tensors, _, rest = arguments("before", 1, 2, 1, 4)
    tensors[1] = tensors[1].clone()
    tensors[1][0, 0] = 0
    out = fused.before_wkv7(*tensors, *rest)
    assert all(x.isfinite().all() for x in out) and out[3][0, 0].abs().sum() == 0


@needs_cpp
def test_frozen_parameters_cost_nothing(monkeypatch):
    asked, real = [], native.call
    monkeypatch.setattr(fused, "call", lambda name, *rest: (asked.append((name, rest[-1] is None)), real(name, *rest))[1])
    for piece in ("mix", "before", "after"):
        for frozen in (True, False): run(PIECES[piece][0], *arguments(piece, 1, 9, 2, 8, frozen=frozen), torch.float32)
    assert [no_sums for name, no_sums in asked if name.endswith("backward")] == [True, False] * 3


@needs_cpp
def test_opcheck():
    for piece, op in (("mix", fused.mix_op), ("before", fused.before_op), ("after", fused.after_op)):
        for frozen in (False, True):
            tensors, wanted, rest = arguments(piece, 1, 5, 2, 4, frozen=frozen)
            xs = [x.flatten().requires_grad_(want) if piece == "before" and i > 5 else x.requires_grad_(want) for i, (x, want) in enumerate(zip(tensors, wanted))]
            torch.library.opcheck(op, (*xs, *rest))


@pytest.mark.parametrize("piece", PIECES)
def test_meta_and_half_precision_take_the_formula(piece):
    tensors, _, rest = arguments(piece, 2, 5, 2, 8)
    rest = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in rest)
    out = PIECES[piece][0](*(x.to("meta") for x in tensors), *rest)
    assert all(x.is_meta for x in ([out] if piece in ("after", "relu") else out))
    out = PIECES[piece][0](*(x.bfloat16() for x in tensors), *arguments(piece, 2, 5, 2, 8)[2])
    out = [out] if piece in ("after", "relu") else out
    assert all(x.dtype == torch.bfloat16 for x in out[1:]) and out[0].dtype == (torch.float32 if piece == "before" else torch.bfloat16)


@needs_cpp
def test_same_threads_same_bits():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        tensors, wanted, rest = arguments("before", 2, 150, 2, 16)
        a, b = (run(fused.before_wkv7, tensors, wanted, rest, torch.float32) for _ in range(2))
    finally: torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
