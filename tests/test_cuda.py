"The CUDA kernels: compiled by nvcc for three GPUs, and run on the CPU by a host header (tests/cuda_host) against the recurrence in float64."
from pathlib import Path
import subprocess
import pytest
import torch
from torch.nn.functional import normalize
from rwkv_peft.kernels import cuda
from rwkv_peft.kernels.loop import wkv7_loop

HOST = Path(__file__).parent / "cuda_host"


def wkv6_loop64(r, w, k, v, u, state=None, initial=None, resets=None):
    "RWKV-6 as its paper (arXiv 2404.05892) writes it, token by token."
    B, T, H, N = r.shape
    fresh = torch.zeros(B, H, N, N, dtype=r.dtype) if initial is None else initial.expand(B, H, N, N)
    S, out = fresh if state is None else state, []
    for t in range(T):
        if resets is not None: S = torch.where(resets[:, t, None, None, None], fresh, S)
        kv = v[:, t, :, :, None] * k[:, t, :, None, :]
        out.append(((S + u[:, None, :] * kv) * r[:, t, :, None, :]).sum(-1))
        S = S * w[:, t].exp()[..., None, :] + kv
    return torch.stack(out, 1), S


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    "The .cu files as g++ compiles them with the host header, and the operators on CPU tensors by that library."
    out = tmp_path_factory.mktemp("cuda") / "host.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{HOST}", "-x", "c++", *(str(f) for f in cuda.sources() if f.suffix == ".cu"), "-o", str(out)], check=True)
    lib = cuda.load(out)
    for op, run in ((cuda.wkv7_cuda_op, cuda.forward7), (cuda.wkv7_cuda_backward_op, cuda.backward7), (cuda.wkv6_cuda_op, cuda.forward6), (cuda.wkv6_cuda_backward_op, cuda.backward6)):
        op.register_kernel("cpu")(lambda *x, run=run: run(lib, *x))
    return lib


def inputs(version, B, T, H, N, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = lambda *shape: torch.randn(*shape, generator=g)
    r, k, v = (x(B, T, H, N) for _ in range(3))
    if version == 7:
        kk = normalize(x(B, T, H, N), dim=-1)
        w = -0.606531 * torch.sigmoid(2 * x(B, T, H, N))
        w[:, : T // 2, :, ::2] = -0.606531                       # the floor
        seqs = [r, w, k * 0.3, v, -kk, kk * torch.sigmoid(x(B, T, H, N))]
    else:
        w = -torch.exp(x(H, N).expand(B, T, H, N) if version == 5 else 2 * x(B, T, H, N))
        if version == 6: w = torch.where(torch.rand(B, T, H, N, generator=g) < 0.1, torch.full_like(w, -1e4), w)      # underflows to no memory at all
        seqs = [r, w.contiguous(), k, v, x(H, N)]
    seqs = [s if i == 1 or (version < 7 and i == 4) else s.to(dtype) for i, s in enumerate(seqs)]
    return seqs, x(B, H, N, N), x(H, N, N), x(B, T, H, N), x(B, H, N, N)


def both(version, monkeypatch, seqs, state, initial, resets, dy, dlast):
    "Outputs and gradients of the kernels on the host, and of the loop in float64."
    monkeypatch.setattr(cuda._prepare, "__defaults__", ("cpu",))
    found = []
    for run, dtype in ((cuda.wkv7_cuda if version == 7 else cuda.wkv6_cuda, None), (wkv7_loop if version == 7 else wkv6_loop64, torch.float64)):
        leaves = [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in (*seqs, state, initial)]
        y, last = run(*leaves, resets)
        wanted = [x for x in leaves if x is not None]
        loss = (y.double() * dy.double()).sum() + (last.double() * dlast.double()).sum()
        found.append([y, last, *torch.autograd.grad(loss, wanted)])
    return found


def worst(found):
    "The largest relative L2 error; NaN, which no bar is above, where there is one."
    return torch.stack([(a.double() - b.double()).norm() / (b.double().norm() if b.norm() > 0 else 1) for a, b in zip(*found)]).max().item()


def starts(B, T):
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, 0] = True
    resets[-1, [t for t in (3, 4, 16, 40) if t < T]] = True
    return resets


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("B,T,H,N,begin,packed", [(2, 1, 2, 16, "both", True), (2, 17, 2, 48, "initial", True), (1, 257, 1, 16, "state", False), (2, 67, 1, 64, "both", True),
                                                 (1, 19, 1, 128, "none", False), (1, 18, 1, 33, "state", True)])
def test_against_float64(host, monkeypatch, version, B, T, H, N, begin, packed):
    seqs, state, initial, dy, dlast = inputs(version, B, T, H, N)
    found = both(version, monkeypatch, seqs, state if begin in ("state", "both") else None, initial if begin in ("initial", "both") else None, starts(B, T) if packed else None, dy, dlast)
    assert worst(found) < 1e-6


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("dtype,bar", [(torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
def test_half_precision_only_rounds(host, monkeypatch, version, dtype, bar):
    seqs, state, initial, dy, dlast = inputs(version, 1, 35, 1, 32, dtype)
    kernel, exact = both(version, monkeypatch, seqs, state, initial, starts(1, 35), dy.to(dtype), dlast)
    assert kernel[0].dtype == dtype and kernel[2].dtype == dtype and kernel[3].dtype == torch.float32
    assert worst((kernel, exact)) < bar and worst((kernel[1:2], exact[1:2])) < 1e-6


def test_refusals():
    x = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="NVIDIA GPU"): cuda.wkv7_cuda(*[x] * 6)
    with pytest.raises(ValueError, match="float64"): cuda._prepare([x.double()] * 6, [None, None], None, "cpu")
    with pytest.raises(ValueError, match="shape"): cuda._prepare([x, x[:, :1], *[x] * 4], [None, None], None, "cpu")
    with pytest.raises(ValueError, match="128"): cuda._prepare([torch.zeros(1, 1, 1, 130)] * 6, [None, None], None, "cpu")


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_packed_model_is_separate(host, monkeypatch, version):
    "Documents in a row on the cuda backend, token shift and tuned states included."
    import test_packing
    from rwkv_peft.kernels import wkv
    monkeypatch.setattr(cuda._prepare, "__defaults__", ("cpu",))
    monkeypatch.setattr(wkv, "choose", lambda backend, *inputs: backend)
    model = test_packing.tiny(version, torch.float32)
    model.backend = "cuda"
    assert test_packing.distance(model, *test_packing.rows(), test_packing.CUTS) < 2e-4


def test_nvcc_compiles_for_three_gpus(tmp_path):
    compiler = cuda.nvcc_path()
    assert compiler, "nvcc is missing: install the CUDA toolkit's compiler"
    subprocess.run(cuda.nvcc_command(compiler, tmp_path / "wkv.so", ["75", "80", "90"]), check=True, capture_output=True)
    lib = cuda.load(tmp_path / "wkv.so")
    assert all(hasattr(lib, name) for name in ("wkv7_forward", "wkv7_backward", "wkv6_forward", "wkv6_backward"))


def test_status_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.cuda_status() == (False, "PyTorch sees no NVIDIA GPU: use backend='cpu' or 'chunk'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "nvcc_path", lambda: None)
    assert not cuda.cuda_status()[0] and "install the CUDA toolkit" in cuda.cuda_status()[1]
