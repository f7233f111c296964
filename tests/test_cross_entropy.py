"The sliced loss against PyTorch's own, and what it holds in memory."
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_peft.kernels.cross_entropy import head_cross_entropy, linear_cross_entropy, softmax_in_place


class Seen(TorchDispatchMode):
    "Counts numbers in the largest tensor returned by any operation, and calls by name."
    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return out


def example(n=90, C=12, V=300, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, C, generator=g, dtype=torch.float64), torch.randn(V, C, generator=g, dtype=torch.float64)
    targets, weights = torch.randint(V, (n,), generator=g), torch.randint(3, (n,), generator=g).double() / 2
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights.to(dtype)


def whole(x, weight, targets, weights): return (cross_entropy(x @ weight.T, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_equals_pytorch_in_float64(chunk):
    x, weight, targets, weights = example()
    loss, expected = linear_cross_entropy(x, weight, targets, weights, chunk), whole(x, weight, targets, weights)
    assert loss.shape == () and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * .3, (x, weight)), torch.autograd.grad(expected * .3, (x, weight)))


def test_float32_and_bfloat16():
    x, weight, targets, weights = example()
    expected = whole(x, weight, targets, weights)
    for dtype, bar in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        xs = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        loss = linear_cross_entropy(*xs, targets, weights.float(), 32)
        assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < bar * expected.item()
        for g, e, t in zip(torch.autograd.grad(loss, xs), torch.autograd.grad(whole(x, weight, targets, weights), (x, weight)), xs):
            assert g.dtype == t.dtype and (g.double() - e).norm() < bar * e.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.], [3., 3., 3.], [-1e30, 5., 4.]], dtype=dtype)
    targets, weights = torch.tensor([1, 2, 1]), torch.ones(3, dtype=dtype)
    z = logits.clone().requires_grad_()
    expected = cross_entropy(z, targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(softmax_in_place(logits, targets, weights), expected.detach())
    torch.testing.assert_close(logits, z.grad)


def test_not_a_number_is_not_hidden():
    x, weight, targets, weights = example(dtype=torch.float32)
    bad = x.detach().clone()
    bad[weights.nonzero()[0, 0]] = float("nan")
    assert linear_cross_entropy(bad, weight, targets, weights).isnan()


def test_nothing_trained():
    x, weight, targets, weights = example()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100), torch.zeros_like(weights))
    loss.backward()
    assert loss == 0 and x.grad.shape == x.shape and not x.grad.any() and not weight.grad.any()
    head = nn.Linear(12, 300).double()
    loss = head_cross_entropy(x, head, targets, torch.zeros_like(weights))
    loss.backward()
    assert loss == 0 and not head.weight.grad.any()


def test_never_holds_the_logits():
    n, C, V, chunk = 400, 8, 1000, 20
    x, weight = torch.randn(n, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets, weights = torch.randint(V, (n,)), torch.ones(n)
    with Seen() as sliced: linear_cross_entropy(x, weight, targets, weights, chunk).backward()
    assert sliced.largest <= chunk * V
    head = nn.Linear(C, V)
    with Seen() as any_head: head_cross_entropy(x, head, targets, weights, chunk).backward()
    assert any_head.largest <= chunk * V
    with Seen() as plain: whole(x, weight, targets, weights).backward()
    assert plain.largest >= n * V


def test_only_asked_gradients_are_computed():
    x, weight, targets, weights = example(dtype=torch.float32)
    def products(x, weight, grad=True):
        with Seen() as seen, torch.set_grad_enabled(grad): linear_cross_entropy(x, weight, targets, weights, 512)
        return sum(count for name, count in seen.calls.items() if "mm" in name)
    assert products(x, weight, grad=False) == products(x.detach(), weight.detach()) == 1
    assert products(x, weight.detach()) == products(x.detach(), weight) == 2
    assert products(x, weight) == 3


def test_untrained_rows_leave_before_the_product():
    x, weight, targets, weights = example(dtype=torch.float32)
    x = x.detach().clone()
    x[weights == 0] = float("nan")
    assert linear_cross_entropy(x, weight, targets, weights).isfinite()


@pytest.mark.parametrize("wrong", [-1, 300])
def test_target_outside_the_vocabulary(wrong):
    x, weight, targets, weights = example()
    targets[weights.nonzero()[3, 0]] = wrong
    with pytest.raises(ValueError, match=f"target {wrong} is outside the head's 300 tokens"): linear_cross_entropy(x, weight, targets, weights)


def test_any_head_with_dropout_recomputes_the_same():
    x, _, targets, weights = example(dtype=torch.float32)
    head = nn.Sequential(nn.Dropout(.5), nn.Linear(12, 300))
    torch.manual_seed(0)
    loss = head_cross_entropy(x, head, targets, weights)
    gradient, = torch.autograd.grad(loss, x)
    torch.manual_seed(0)
    rows = weights.nonzero()[:, 0]
    expected = (cross_entropy(head(x[rows]), targets[rows], reduction="none") * weights[rows]).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


def test_meta():
    x, weight, targets, weights = (t.detach().to("meta") for t in example(dtype=torch.float32))
    x.requires_grad_()
    linear_cross_entropy(x, weight, targets, weights, 32).backward()
    assert x.grad.is_meta and x.grad.shape == x.shape
