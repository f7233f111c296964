"RWKV-6's and RWKV-5's engines against a float64 loop: outputs, states, every gradient, at any decay."
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_peft.kernels.chunk6 import wkv6_chunk
from rwkv_peft.kernels.loop import wkv6_loop
from rwkv_peft.kernels.native import native_status
from rwkv_peft.kernels.native6 import wkv6_cpu, wkv6_op
from rwkv_peft.kernels.wkv import wkv5, wkv6

ROOT = Path(__file__).parents[1]
BARS = {"cpu": 5e-7, "chunk": 5e-6}
NAMES = "y last dr dw dk dv du dstate dinitial".split()
engines = ["chunk", pytest.param("cpu", marks=pytest.mark.skipif(not native_status()[0], reason=native_status()[1]))]


def example(B, T, H, N, decay="mild", seed=0):
    g = torch.Generator().manual_seed(seed + T * N)
    def normal(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    w = {"mild": lambda: -torch.exp(normal(B, T, H, N)), "strong": lambda: -torch.exp(4 * normal(B, T, H, N)), "none": lambda: torch.full((B, T, H, N), -1e-4).double(),
         "all": lambda: torch.full((B, T, H, N), -1e4).double(), "mixed": lambda: torch.where(torch.rand(B, T, H, N, generator=g) < .2, -1e4, -1e-3).double()}[decay]()
    inputs = [normal(B, T, H, N), w, normal(B, T, H, N), normal(B, T, H, N), normal(H, N), normal(B, H, N, N), normal(H, N, N)]
    inputs = [x.float().double() for x in inputs]
    resets = torch.rand(B, T, generator=g) < 3 / T
    if T > 4: resets[0, [0, 3, 4]] = True
    return inputs, resets, normal(B, T, H, N).float(), normal(B, H, N, N).float()


def everything(form, inputs, resets, dy, dlast, dtype):
    xs = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    y, last = form(*xs, resets)
    wanted = [x for x in xs if x is not None]
    return [y, last, *torch.autograd.grad([y, last], wanted, [dy.to(y.dtype), dlast.to(last.dtype)], allow_unused=True, materialize_grads=True)]


def one(engine, form=wkv6):
    return lambda r, w, k, v, u, state, initial, resets: form(r, w, k, v, u, state, initial=initial, resets=resets, backend=engine)


def distance(got, truth):
    return {name: float((x.detach().double() - t.detach()).norm() / t.detach().norm().clamp_min(1e-30)) for name, x, t in zip(NAMES, got, truth)}


@functools.cache
def truth_of(T, N, decay, begin):
    inputs, resets, dy, dlast = example(2, T, 2, N, decay)
    if begin == "state only": inputs[6], resets = None, None
    if begin == "initial only": inputs[5] = None
    if begin == "zero at resets": inputs[6] = None
    return inputs, resets, dy, dlast, everything(wkv6_loop, inputs, resets, dy, dlast, torch.float64)


@pytest.mark.parametrize("decay", ["mild", "strong"])
@pytest.mark.parametrize("N", [16, 64])
@pytest.mark.parametrize("T", [1, 5, 16, 63, 257])
@pytest.mark.parametrize("engine", engines)
def test_every_gradient(engine, T, N, decay):
    inputs, resets, dy, dlast, truth = truth_of(T, N, decay, "both")
    far = distance(everything(one(engine), inputs, resets, dy, dlast, torch.float32), truth)
    assert max(far.values()) < BARS[engine], far


@pytest.mark.parametrize("decay", ["none", "all", "mixed"])
@pytest.mark.parametrize("engine", engines)
def test_decays_at_the_ends(engine, decay):
    inputs, resets, dy, dlast, truth = truth_of(63, 16, decay, "both")
    got = everything(one(engine), inputs, resets, dy, dlast, torch.float32)
    assert all(x.isfinite().all() for x in got)
    far = distance(got, truth)
    if decay == "all": assert got[3].abs().max() < 1e-30 and far.pop("dw") >= 0       # e^-10000 is no number at all: neither is its gradient
    assert max(far.values()) < BARS[engine], far


@pytest.mark.parametrize("engine", engines)
def test_infinite_decay_is_forgetting(engine):
    inputs, resets, *_ = example(1, 20, 1, 16)
    xs = [x.float() for x in inputs]
    xs[1][0, 7] = -torch.inf
    y, last = one(engine)(*xs, None)
    again, other = one(engine)(*(x[:, 8:] for x in xs[:4]), xs[4], xs[3][:, 7, :, :, None] * xs[2][:, 7, :, None, :], None, None)
    torch.testing.assert_close((y[:, 8:], last), (again, other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("begin", ["state only", "initial only", "zero at resets"])
@pytest.mark.parametrize("N", [13, 48])
@pytest.mark.parametrize("engine", engines)
def test_odd_head_sizes_and_other_beginnings(engine, N, begin):
    inputs, resets, dy, dlast, truth = truth_of(70, N, "mild", begin)
    far = distance(everything(one(engine), inputs, resets, dy, dlast, torch.float32), truth)
    assert max(far.values()) < BARS[engine], far


@pytest.mark.parametrize("decay", ["mild", "none", "mixed"])
@pytest.mark.parametrize("T", [1, 40, 257])
@pytest.mark.parametrize("engine", engines)
def test_version_5_is_one_decay_for_all_tokens(engine, T, decay):
    inputs, resets, dy, dlast = example(2, T, 2, 16, decay)
    inputs[1] = inputs[1][0, 0].clone()
    truth = everything(one("loop", wkv5), inputs, resets, dy, dlast, torch.float64)
    far = distance(everything(one(engine, wkv5), inputs, resets, dy, dlast, torch.float32), truth)
    assert truth[3].shape == (2, 16) and max(far.values()) < BARS[engine], far


def test_loop_against_plain_arithmetic():
    (r, w, k, v, u, state, _), *_ = example(1, 6, 1, 3)
    y, last = wkv6_loop(r, w, k, v, u, state)
    S = state[0, 0].tolist()
    for t in range(6):
        rt, wt, kt, vt = (x[0, t, 0].tolist() for x in (r, w, k, v))
        own = sum(u[0, j].item() * kt[j] * rt[j] for j in range(3))
        expected = [sum(S[i][j] * rt[j] for j in range(3)) + own * vt[i] for i in range(3)]
        torch.testing.assert_close(y[0, t, 0], torch.tensor(expected, dtype=torch.float64))
        S = [[S[i][j] * 2.718281828459045 ** wt[j] + vt[i] * kt[j] for j in range(3)] for i in range(3)]
    torch.testing.assert_close(last[0, 0], torch.tensor(S, dtype=torch.float64))


@pytest.mark.parametrize("form", [wkv6_loop, wkv6_chunk])
def test_gradcheck(form):
    inputs, *_ = example(2, 19, 1, 3)
    resets = torch.zeros(2, 19, dtype=torch.bool)
    resets[0, [3, 4, 17]] = resets[1, [0, 16]] = True
    xs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *xs: form(*xs, resets), xs)
    assert torch.autograd.gradcheck(lambda *xs: form(*xs[:5], None, xs[6], None), xs)


@pytest.mark.parametrize("engine", ["loop", *engines])
def test_packed_documents_equal_separate_ones(engine):
    inputs, *_ = example(1, 30, 2, 16)
    *sequences, u, _, initial = [x.float() for x in inputs]
    resets = torch.zeros(1, 30, dtype=torch.bool)
    resets[0, [0, 11, 12]] = True
    packed, _ = one(engine)(*sequences, u, None, initial, resets)
    alone = [one(engine)(*(x[:, i:j] for x in sequences), u, None, initial, None)[0] for i, j in ((0, 11), (11, 12), (12, 30))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["loop", *engines])
def test_pieces_equal_the_whole(engine):
    inputs, resets, *_ = example(2, 600 if engine == "chunk" else 50, 1, 16)
    *sequences, u, state, initial = [x.float() for x in inputs]
    whole, last = one(engine)(*sequences, u, state, initial, resets)
    parts = []
    for piece in (slice(0, 1), slice(1, 20), slice(20, None)):
        y, state = one(engine)(*(x[:, piece] for x in sequences), u, state, initial, resets[:, piece])
        parts.append(y)
    torch.testing.assert_close((torch.cat(parts, 1), state), (whole, last), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["loop", *engines])
def test_mixed_types(engine):
    inputs, resets, *_ = example(2, 20, 2, 16)
    half = [x.to(torch.bfloat16) if i not in (1, 5, 6) else x.float() for i, x in enumerate(inputs)]
    y, last = one(engine)(*half, resets)
    exact, _ = wkv6_loop(*(x.double() for x in half), resets)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32 and (y.double() - exact).norm() / exact.norm() < 4e-3
    half[4].requires_grad_()
    one(engine)(*half, resets)[0].float().sum().backward()
    assert half[4].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("engine", ["auto", "loop", *engines])
def test_meta(engine):
    inputs, resets, *_ = example(2, 37, 2, 16)
    xs = [x.float().to("meta").requires_grad_() for x in inputs]
    y, last = one(engine)(*xs, resets.to("meta"))
    (y.sum() + last.sum()).backward()
    assert y.shape == (2, 37, 2, 16) and all(x.grad.shape == x.shape for x in xs)


def test_float64_stays_float64():
    inputs, resets, *_ = example(1, 40, 2, 8)
    y, last = wkv6(*inputs[:6], initial=inputs[6], resets=resets)
    assert y.dtype == last.dtype == torch.float64
    torch.testing.assert_close(y, wkv6_loop(*inputs, resets)[0])
    with pytest.raises(ValueError, match="float64"): wkv6_cpu(*inputs)


@pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
def test_operator_and_threads():
    inputs, resets, dy, dlast = example(2, 40, 3, 16)
    xs = [x.float().requires_grad_() for x in inputs]
    torch.library.opcheck(wkv6_op, (*xs, resets, True))
    torch.library.opcheck(wkv6_op, (*xs[:5], None, None, None, True))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(everything(one("cpu"), inputs, resets, dy, dlast, torch.float32))
    finally: torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


@pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
@pytest.mark.parametrize("capability, library", [("avx2", "avx2"), ("default", "base")])
def test_smaller_instruction_sets(capability, library):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import torch; torch.set_num_threads(1); import test_wkv6 as t; assert t.native_status()[1].endswith({library!r}), t.native_status(); " \
           "[t.test_every_gradient('cpu', T, N, 'strong') for T in (5, 63) for N in (16, 64)]; t.test_odd_head_sizes_and_other_beginnings('cpu', 13, 'initial only')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form, change, message", [
    (wkv6, dict(u=torch.zeros(9)), "wkv6: u is"), (wkv6, dict(w=torch.zeros(1, 8)), "wkv6: w is"), (wkv5, dict(w=torch.zeros(2, 4, 1, 8)), "wkv5: w is"), (wkv6, dict(r=torch.zeros(2, 4, 8)), "split the channels"),
    (wkv6, dict(resets=torch.zeros(2, 4)), "must be bool"), (wkv5, dict(u=torch.zeros(1, 8, device="meta")), "is on meta"), (wkv6, dict(backend="gpu"), "choose auto, loop, chunk, cpu, fla, cuda")])
def test_wrong_arguments_are_one_sentence(form, change, message):
    right = dict(r=torch.zeros(2, 4, 1, 8), w=torch.zeros(1, 8) if form is wkv5 else torch.zeros(2, 4, 1, 8), k=torch.zeros(2, 4, 1, 8), v=torch.zeros(2, 4, 1, 8), u=torch.zeros(1, 8))
    with pytest.raises(ValueError, match=message) as caught: form(**{**right, **change})
    assert "\n" not in str(caught.value)
