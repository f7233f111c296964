"The CUDA kernels without a GPU: compiled by nvcc for three generations, and executed by a host that runs a block's threads as fibers, against the float64 loop."
import subprocess
from pathlib import Path

import pytest
import torch

from rwkv_peft.kernels import cuda
from rwkv_peft.kernels.loop import wkv6_loop, wkv7_loop

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope="module")
def host(tmp_path_factory):
    "Both .cu files as they are, compiled by g++ with tests/cuda_host in the place of CUDA's headers."
    folder = tmp_path_factory.mktemp("cuda")
    for version in "67": (folder / f"wkv{version}.cpp").write_text(f'#include "{ROOT}/kernels/wkv{version}.cu"\n')
    ran = subprocess.run(["g++", "-std=c++17", "-O2", "-w", "-fPIC", "-shared", f"-I{ROOT}/tests/cuda_host", *map(str, folder.glob("*.cpp")), "-o", str(folder / "wkv.so")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return cuda.load(folder / "wkv.so")


def example(version, B, T, H, N, decay):
    g = torch.Generator().manual_seed(T * N)
    def normal(*size): return torch.randn(*size, generator=g)
    shape = (B, T, H, N)
    key = torch.nn.functional.normalize(normal(*shape), dim=-1)
    fastest = -.60653066 if version == "7" else -1e4
    w = {"mild": lambda: -.6 * torch.sigmoid(2 * normal(*shape)), "floor": lambda: torch.full(shape, fastest), "mixed": lambda: torch.where(torch.rand(shape, generator=g) < .2, fastest, -1e-3)}[decay]()
    sequences = [normal(*shape), w, normal(*shape), normal(*shape)]
    extra = [-key, key * torch.sigmoid(normal(*shape))] if version == "7" else [normal(H, N)]
    resets = torch.rand(B, T, generator=g) < 3 / T
    if T > 4: resets[0, [0, 3, 4]] = True
    return [*sequences, *extra, normal(B, H, N, N), normal(H, N, N)], resets, normal(*shape), normal(B, H, N, N)


def on_host(lib, version, inputs, resets, dy, dlast, type):
    "y, last and every gradient, by the library's own functions, which are handed the host's build; sequences but w in the given type."
    dtype = [torch.float32, torch.float16, torch.bfloat16][type]
    r, w, k, v, *extra, state, initial = inputs
    narrow = lambda x: x.to(dtype).contiguous()
    r, k, v, dy = map(narrow, (r, k, v, dy))
    forward, backward = (cuda.forward7, cuda.backward7) if version == "7" else (cuda.forward6, cuda.backward6)
    given = (r, w, k, v, *(map(narrow, extra) if version == "7" else extra), state, initial, resets)
    y, last, *kept = forward(lib, *given, True)
    *grads, dstate, dinitial = backward(lib, *given, *kept, dy, dlast)
    bare = forward(lib, *given, False)
    assert torch.equal(bare[0], y) and torch.equal(bare[1], last) and not bare[-1].numel()
    return [y, last, *grads, *([] if state is None else [dstate]), *([] if initial is None else [dinitial])]


def truth_of(version, inputs, resets, dy, dlast, type):
    dtype = [torch.float32, torch.float16, torch.bfloat16][type]
    round_ = lambda i, x: x if i == 1 or i >= (6 if version == "7" else 4) else x.to(dtype)
    xs = [None if x is None else round_(i, x).double().requires_grad_() for i, x in enumerate(inputs)]
    y, last = (wkv7_loop if version == "7" else wkv6_loop)(*xs, resets)
    return [y, last, *torch.autograd.grad([y, last], [x for x in xs if x is not None], [dy.to(dtype).double(), dlast.double()], allow_unused=True, materialize_grads=True)]


def compare(host, version, shape, decay, begin, cuts, type, bar):
    inputs, resets, dy, dlast = example(version, *shape, decay)
    if begin in ("none", "initial"): inputs[-2] = None
    if begin in ("none", "state"): inputs[-1] = None
    resets = resets if cuts else None
    ours, truth = on_host(host, version, inputs, resets, dy, dlast, type), truth_of(version, inputs, resets, dy, dlast, type)
    far = [float((x.double() - t.detach()).norm() / t.detach().norm().clamp_min(1e-30)) for x, t in zip(ours, truth)]
    assert len(ours) == len(truth) and all(x.isfinite().all() for x in ours)
    if version == "6" and decay == "floor": far.pop(3)                # e^-10000: no decay, and no gradient of it
    assert max(far) < bar, far


@pytest.mark.parametrize("decay", ["mild", "floor", "mixed"])
@pytest.mark.parametrize("T, N", [(1, 16), (17, 48), (17, 64), (257, 16), (33, 128), (17, 13)])
@pytest.mark.parametrize("version", "67")
def test_every_output_and_gradient(host, version, T, N, decay): compare(host, version, (2, T, 2, N), decay, "both", True, 0, 1.5e-6)


@pytest.mark.parametrize("begin", ["none", "state", "initial"])
@pytest.mark.parametrize("version", "67")
def test_other_beginnings(host, version, begin): compare(host, version, (2, 40, 1, 32), "mild", begin, begin == "initial", 0, 1e-6)


@pytest.mark.parametrize("type, bar", [(1, 2e-3), (2, 1e-2)])
@pytest.mark.parametrize("version", "67")
def test_half_precision_is_rounded_at_the_border_only(host, version, type, bar): compare(host, version, (1, 40, 2, 64), "mild", "both", True, type, bar)


@pytest.mark.parametrize("version", "67")
def test_long_sequence(host, version): compare(host, version, (1, 257, 1, 64), "mild", "both", True, 0, 1e-6)


def test_nvcc_compiles_for_three_generations(tmp_path):
    compiler = cuda.nvcc_path()
    assert compiler, "nvcc is missing: install the CUDA toolkit's compiler"
    ran = subprocess.run(cuda.nvcc_command(compiler, tmp_path / "wkv.so", ["75", "80", "90"]), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {b"sm_75", b"sm_80", b"sm_90"} <= {name for name in (b"sm_75", b"sm_80", b"sm_90") if name in (tmp_path / "wkv.so").read_bytes()}


@pytest.mark.parametrize("change, said", [(dict(), "needs tensors on an NVIDIA GPU"), (dict(w=torch.zeros(1, 2, 1, 16, dtype=torch.float64)), "float64"), (dict(k=torch.zeros(1, 3, 1, 16)), "is needed")])
def test_wrong_tensors_are_refused_before_anything_is_compiled(monkeypatch, change, said):
    given = {**dict.fromkeys("rwkvab", torch.zeros(1, 2, 1, 16)), **change}
    if change: monkeypatch.setattr(cuda._prepare, "__defaults__", ("cpu",))
    with pytest.raises(ValueError, match=said): cuda.wkv7_cuda(**given)


def test_status_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.cuda_status() == (False, "PyTorch sees no NVIDIA GPU: use backend='cpu' or 'chunk'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "nvcc_path", lambda: None)
    assert not cuda.cuda_status()[0] and "install the CUDA toolkit" in cuda.cuda_status()[1]
