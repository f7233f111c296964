"Float32 products by the library that suits the processor, against float64; and what stays with PyTorch."
import pytest
import torch

from rwkv_peft.kernels import product
from rwkv_peft.kernels.product import linear, times, times_back


def rel(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request, monkeypatch):
    "Each of the two, whatever processor this is."
    if request.param: assert torch.backends.mkldnn.is_available()
    monkeypatch.setattr(product, "onednn_here", lambda: request.param)


@pytest.mark.parametrize("shape", [(1,), (16,), (17,), (3, 40), (2, 5, 7), (0,)], ids=str)
@pytest.mark.parametrize("out, inside", [(1, 1), (33, 24), (64, 129), (257, 16)])
def test_products_equal_those_in_float64(library, shape, out, inside):
    torch.manual_seed(0)
    x, W, g, bias = torch.randn(*shape, inside), torch.randn(out, inside), torch.randn(*shape, out), torch.randn(out)
    for found, true in ((times(x, W), x.double() @ W.double().T), (times_back(g, W), g.double() @ W.double()), (linear(x, W, bias), x.double() @ W.double().T + bias)):
        assert found.shape == true.shape and found.dtype == torch.float32 and (not true.numel() or rel(found, true) < 1e-6)


@pytest.mark.parametrize("trains", ["x", "W", "xW"])
def test_gradients(library, trains):
    torch.manual_seed(0)
    x, W = torch.randn(3, 40, 24, requires_grad="x" in trains), torch.randn(33, 24, requires_grad="W" in trains)
    g, asked = torch.randn(3, 40, 33), [t for t in (x, W) if t.requires_grad]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, W)]
    true = torch.autograd.grad(wide[0] @ wide[1].T, [t for t in wide if t.requires_grad], g.double())
    for run in (linear, times): assert all(rel(a, b) < 1e-6 for a, b in zip(torch.autograd.grad(run(x, W), asked, g), true))


def test_views_are_read_as_they_lie(library):
    torch.manual_seed(0)
    x, W = torch.randn(24, 2, 40).permute(1, 2, 0), torch.randn(24, 66)[:, ::2].T
    assert not x.is_contiguous() and not W.is_contiguous() and rel(times(x, W), x.double() @ W.double().T) < 1e-6
    a, b = x.detach().clone().requires_grad_(), W.detach().clone().requires_grad_()
    got, want = (torch.autograd.grad(linear(p, q).square().sum(), (p, q)) for p, q in ((a, b), (a, b.contiguous())))
    assert all(rel(p, q) < 1e-6 for p, q in zip(got, want))


def test_what_is_kept_for_the_backward(library):
    "A frozen matrix keeps nothing but itself."
    kept = []
    x, W = torch.randn(40, 24, requires_grad=True), torch.randn(33, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t.detach(), lambda t: t): linear(x, W)
    assert set(kept) <= {W.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_with_torch(monkeypatch, dtype):
    monkeypatch.setattr(product, "onednn_here", lambda: pytest.fail("asked for a type that is none of its own"))
    x, W = torch.randn(40, 24, dtype=dtype), torch.randn(33, 24, dtype=dtype)
    assert torch.equal(times(x, W), x @ W.T) and torch.equal(linear(x, W), torch.nn.functional.linear(x, W))


def test_wrong_shapes_are_refused(library):
    for run in (times, linear):
        with pytest.raises(RuntimeError): run(torch.randn(40, 24), torch.randn(33, 25))


def test_meta_and_compiled_graphs(library):
    assert linear(torch.empty(40, 24, device="meta"), torch.empty(33, 24, device="meta")).shape == (40, 33)
    x, W = torch.randn(40, 24), torch.randn(33, 24)
    with torch.no_grad(): assert rel(torch.compile(lambda a, b: linear(a, b), backend="eager")(x, W), x @ W.T) < 1e-6


def test_where(monkeypatch):
    "On an AMD processor with AVX-512 only."
    class Library:
        def made_by_amd(self): return 1
    ask = product.onednn_here.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(product, "library", lambda: (Library(), ""))
    assert ask()
    monkeypatch.setattr(Library, "made_by_amd", lambda self: 0)
    assert not ask()
    monkeypatch.setattr(product, "library", lambda: (None, "not built"))
    assert not ask()
    monkeypatch.setattr(product, "library", lambda: (type("Amd", (), {"made_by_amd": lambda self: 1})(), ""))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not ask()
