"The recurrence's engines against a float64 loop: outputs, states, every gradient; and what happens where an engine is missing."
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_peft.kernels import native, wkv
from rwkv_peft.kernels.chunk import wkv7_chunk
from rwkv_peft.kernels.loop import wkv7_loop
from rwkv_peft.kernels.native import native_status, wkv7_cpu, wkv7_op
from rwkv_peft.kernels.wkv import backends, wkv7

ROOT = Path(__file__).parents[1]
BARS = {"cpu": 5e-7, "chunk": 5e-6}
NAMES = "y last dr dw dk dv da db dstate dinitial".split()
needs_cpp = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
engines = ["chunk", pytest.param("cpu", marks=needs_cpp)]


def example(B, T, H, N, decay="random", seed=0):
    g = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    key = torch.nn.functional.normalize(normal(B, T, H, N), dim=-1)
    w = torch.full((B, T, H, N), -0.60653066, dtype=torch.float64) if decay == "floor" else -0.60653066 * torch.sigmoid(2 * normal(B, T, H, N))
    inputs = [normal(B, T, H, N), w, normal(B, T, H, N), normal(B, T, H, N), -key, key * torch.sigmoid(normal(B, T, H, N)), normal(B, H, N, N), normal(H, N, N)]
    inputs = [x.float().double() for x in inputs]           # the same numbers in both precisions
    resets = torch.rand(B, T, generator=g) < 3 / T
    return inputs, resets, normal(B, T, H, N).float(), normal(B, H, N, N).float()


def everything(form, inputs, resets, dy, dlast, dtype):
    xs = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    y, last = form(*xs, resets)
    wanted = [x for x in xs if x is not None]
    return [y, last, *torch.autograd.grad([y, last], wanted, [dy.to(y.dtype), dlast.to(last.dtype)], allow_unused=True, materialize_grads=True)]


def one(engine):
    return lambda r, w, k, v, a, b, state, initial, resets: wkv7(r, w, k, v, a, b, state, initial=initial, resets=resets, backend=engine)


def distance(got, truth):
    return {name: float((x.detach().double() - t.detach()).norm() / t.detach().norm().clamp_min(1e-30)) for name, x, t in zip(NAMES, got, truth)}


@functools.cache
def truth_of(T, N, decay, begin):
    inputs, resets, dy, dlast = example(2, T, 2, N, decay)
    if begin == "state only": inputs[7], resets = None, None
    if begin == "initial only": inputs[6] = None
    if begin == "zero at resets": inputs[7] = None
    return inputs, resets, dy, dlast, everything(wkv7_loop, inputs, resets, dy, dlast, torch.float64)


@pytest.mark.parametrize("decay", ["random", "floor"])
@pytest.mark.parametrize("N", [16, 64])
@pytest.mark.parametrize("T", [1, 5, 16, 63, 257])
@pytest.mark.parametrize("engine", engines)
def test_every_gradient(engine, T, N, decay):
    inputs, resets, dy, dlast, truth = truth_of(T, N, decay, "both")
    far = distance(everything(one(engine), inputs, resets, dy, dlast, torch.float32), truth)
    assert max(far.values()) < BARS[engine], far


@pytest.mark.parametrize("begin", ["state only", "initial only", "zero at resets"])
@pytest.mark.parametrize("N", [13, 24, 48])
@pytest.mark.parametrize("engine", engines)
def test_odd_head_sizes_and_other_beginnings(engine, N, begin):
    inputs, resets, dy, dlast, truth = truth_of(70, N, "random", begin)
    far = distance(everything(one(engine), inputs, resets, dy, dlast, torch.float32), truth)
    assert max(far.values()) < BARS[engine], far


def test_loop_against_plain_arithmetic():
    (r, w, k, v, a, b, state, _), *_ = example(1, 6, 1, 3)
    y, last = wkv7_loop(r, w, k, v, a, b, state)
    S = state[0, 0].tolist()
    for t in range(6):
        rt, wt, kt, vt, at, bt = (x[0, t, 0].tolist() for x in (r, w, k, v, a, b))
        held = [sum(S[i][j] * at[j] for j in range(3)) for i in range(3)]
        S = [[S[i][j] * 2.718281828459045 ** wt[j] + held[i] * bt[j] + vt[i] * kt[j] for j in range(3)] for i in range(3)]
        expected = [sum(S[i][j] * rt[j] for j in range(3)) for i in range(3)]
        torch.testing.assert_close(y[0, t, 0], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(last[0, 0], torch.tensor(S, dtype=torch.float64))


@pytest.mark.parametrize("form", [wkv7_loop, wkv7_chunk])
def test_gradcheck(form, monkeypatch):
    monkeypatch.setattr("rwkv_peft.kernels.chunk.chunk_length", lambda w, longest=32: 4)      # several chunks, the last one short
    inputs, *_ = example(2, 9, 1, 3)
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, [3, 4]] = resets[1, [0, 8]] = True
    xs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *xs: form(*xs, resets), xs)
    assert torch.autograd.gradcheck(lambda *xs: form(*xs[:6], None, xs[7], None), xs)


def test_float64_stays_float64():
    inputs, resets, *_ = example(1, 40, 2, 8)
    (y, last), (y2, last2) = wkv7_loop(*inputs, resets), wkv7(*inputs[:7], initial=inputs[7], resets=resets)
    assert y2.dtype == last2.dtype == torch.float64
    torch.testing.assert_close(y2, y)
    with pytest.raises(ValueError, match="float64"): wkv7_cpu(*inputs)


@pytest.mark.parametrize("engine", ["loop", *engines])
def test_mixed_types(engine):
    inputs, resets, *_ = example(2, 20, 2, 16)
    half = [x.to(torch.bfloat16) if i not in (1, 6, 7) else x.float() for i, x in enumerate(inputs)]
    y, last = one(engine)(*half, resets)
    exact, _ = wkv7_loop(*(x.double() for x in half), resets)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert (y.double() - exact).norm() / exact.norm() < 4e-3
    half[2].requires_grad_()
    one(engine)(*half, resets)[0].float().sum().backward()
    assert half[2].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("engine", ["loop", *engines])
def test_pieces_equal_the_whole(engine):
    inputs, resets, *_ = example(2, 50, 1, 16)
    *xs, state, initial = [x.float() for x in inputs]
    whole, last = one(engine)(*xs, state, initial, resets)
    parts = []
    for piece in (slice(0, 1), slice(1, 20), slice(20, 50)):
        y, state = one(engine)(*(x[:, piece] for x in xs), state, initial, resets[:, piece])       # not contiguous, too
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fast", [-3., -12., -200.])
def test_chunk_shortens_itself_for_faster_decays(fast):
    inputs, resets, dy, dlast = example(2, 40, 1, 8)
    inputs[1][:, ::3] = fast
    far = distance(everything(one("chunk"), inputs, resets, dy, dlast, torch.float32), everything(wkv7_loop, inputs, resets, dy, dlast, torch.float64))
    assert max(far.values()) < 5e-6, far


@pytest.mark.parametrize("engine", engines)
def test_not_a_number_travels(engine):
    inputs, *_ = example(1, 20, 1, 16)
    xs = [x.float() for x in inputs]
    xs[1][0, 7] = float("nan")
    y, _ = one(engine)(*xs, None)
    assert y[:, 8:].isnan().any()


@needs_cpp
def test_opcheck():
    inputs, resets, *_ = example(2, 18, 1, 16)
    xs = [x.float().requires_grad_() for x in inputs]
    torch.library.opcheck(wkv7_op, (*xs, resets, True))
    torch.library.opcheck(wkv7_op, (*xs[:6], None, None, None, True))
    torch.library.opcheck(wkv7_op, (*(x.detach() for x in xs), resets, False))


@pytest.mark.parametrize("engine", ["auto", "loop", *engines])
def test_meta(engine):
    inputs, resets, *_ = example(2, 37, 2, 16)
    xs = [x.float().to("meta").requires_grad_() for x in inputs]
    y, last = one(engine)(*xs, resets.to("meta"))
    (y.sum() + last.sum()).backward()
    assert y.shape == (2, 37, 2, 16) and all(x.grad.shape == x.shape for x in xs)


@needs_cpp
def test_thread_count_changes_no_bit():
    inputs, resets, dy, dlast = example(2, 40, 3, 16)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(everything(one("cpu"), inputs, resets, dy, dlast, torch.float32))
    finally: torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


@needs_cpp
def test_denormals_flushed_inside_only():
    inputs, resets, *_ = example(1, 20, 2, 16)
    wkv7_cpu(*(x.float() for x in inputs), resets)
    assert torch.tensor(1e-39) * 0.5 != 0


@needs_cpp
@pytest.mark.parametrize("capability, library", [("avx2", "avx2"), ("default", "base")])
def test_smaller_instruction_sets(capability, library):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import torch; torch.set_num_threads(1); import test_wkv as t; assert t.native_status()[1].endswith({library!r}), t.native_status(); " \
           "[t.test_every_gradient('cpu', T, N, 'random') for T in (5, 63) for N in (16, 64)]; t.test_odd_head_sizes_and_other_beginnings('cpu', 13, 'initial only')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change, message", [
    (dict(r=torch.zeros(2, 4, 8)), "split the channels"), (dict(r=torch.zeros(2, 0, 1, 8)), "at least one token"), (dict(k=torch.zeros(2, 4, 1, 9)), "k is"),
    (dict(state=torch.zeros(1, 1, 8, 8)), "state is"), (dict(initial=torch.zeros(2, 1, 8, 8)), "initial is"), (dict(resets=torch.zeros(2, 4)), "must be bool"),
    (dict(backend="gpu"), "choose auto, loop, chunk, cpu, fla, cuda"), (dict(state=torch.zeros(2, 1, 8, 8, device="meta")), "is on meta")])
def test_wrong_arguments_are_one_sentence(change, message):
    names = dict.fromkeys("rwkvab", torch.zeros(2, 4, 1, 8))
    with pytest.raises(ValueError, match=message) as caught: wkv7(**{**names, **change})
    assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: (None, "nobody compiled it"))
    assert backends()["cpu"] == (False, "nobody compiled it")
    inputs, resets, *_ = example(1, 20, 1, 8)
    xs = [x.float() for x in inputs]
    assert wkv.choose("auto", *xs) == "chunk"
    y, _ = wkv7(*xs[:7], initial=xs[7], resets=resets)
    torch.testing.assert_close(y, wkv7_loop(*xs, resets)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="nobody compiled it"): wkv7(*xs[:6], backend="cpu")


linux = sys.platform == "linux" and platform.machine() == "x86_64"


@pytest.mark.skipif(not (linux and shutil.which("g++")), reason="no g++ on x86-64 Linux")
def test_library_is_there_where_it_can_be_built():
    assert native_status()[0], native_status()[1]


@pytest.mark.skipif(not linux, reason="nothing is compiled elsewhere")
def test_failed_build_does_not_break_the_installation(tmp_path):
    pytest.importorskip("setuptools")
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)], cwd=ROOT,
                          env={**os.environ, "CC": "false", "CXX": "false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "was not built" in done.stderr and not list(tmp_path.rglob("*.so"))
