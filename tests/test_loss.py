"The loss of a step: its penalties against finite differences, and one gradient however the rows are split over passes and processes."
import subprocess
import sys
import textwrap

import pytest
import torch
from small import new_model, rel
from torch import nn
from torch.nn.functional import cross_entropy

from rwkv_peft.data.batches import collate
from rwkv_peft.data.records import read_data
from rwkv_peft.kernels.cross_entropy import head_cross_entropy, linear_cross_entropy
from rwkv_peft.model.quant import storage_of
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.peft.adapters import attach, trained_parameters
from rwkv_peft.peft.state_tuning import StateTuning
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.events import timeline
from rwkv_peft.train.loop import Run, finetune
from rwkv_peft.train.loss import LossScale, accumulate, trained_tokens

torch.set_num_threads(1)
PENALTIES = [{}, {"l2wrap": .2}, {"z_loss": .2}]


def example(n=11, C=5, V=13, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in ((n, C), (V, C)))
    weights = torch.tensor([0., 1, .5, 1, 0, 1, 2, 1, 0, 0, 1] * (n // 11), dtype=dtype)
    return x, weight, torch.randint(V, (n,), generator=g), weights


def by_hand(logits, targets, weights, l2wrap=0., z_loss=0.):
    "The loss with its penalty as a plain function, both values included."
    lse = logits.exp().sum(1).log()
    return (weights * (lse - logits[range(len(targets)), targets] + z_loss * lse ** 2 + l2wrap / 2 * logits.amax(1) ** 2)).sum()


# --- penalties ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("way", ["weight", "module"])
def test_gradients_are_finite_differences(penalty, way):
    "L2Wrap acts on the gradient alone: its value is added here, without a gradient, and then finite differences must see the whole."
    x, weight, targets, weights = example()
    head = nn.Linear(5, 13, bias=False, dtype=torch.float64)

    def loss(x, weight):
        head.weight.data = weight.data
        found = linear_cross_entropy(x, weight, targets, weights, 4, **penalty) if way == "weight" else head_cross_entropy(x, lambda rows: rows @ weight.T, targets, weights, 4, **penalty)
        hidden = penalty.get("l2wrap", 0) / 2 * (weights * (x @ weight.T).detach().amax(1) ** 2).sum()
        return found + hidden
    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.allclose(loss(x, weight), by_hand(x @ weight.T, targets, weights, **penalty))


@pytest.mark.parametrize("penalty", PENALTIES[1:])
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_follows(penalty, dtype, bar):
    exact = example(n=44, V=301)
    x, weight, targets, weights = example(n=44, V=301, dtype=dtype)
    expected = torch.autograd.grad(by_hand(exact[0] @ exact[1].T, *exact[2:], **penalty), exact[:2])
    got = torch.autograd.grad(linear_cross_entropy(x, weight, targets, weights.float(), 7, **penalty), (x, weight))
    assert all(rel(a, b) < bar for a, b in zip(got, expected))


@pytest.mark.parametrize("penalty", PENALTIES[1:])
@pytest.mark.parametrize("kind, matmul, bar", [("nf4", "dequant", 1e-5), ("int8", "dequant", 1e-5), ("int8", "exact", .02)])
def test_a_packed_head_has_the_gradient_of_its_own_numbers(penalty, kind, matmul, bar):
    torch.manual_seed(0)
    head, targets, weights = storage_of(torch.randn(257, 64), kind, matmul), torch.randint(257, (20,)), torch.ones(20)
    x = torch.randn(20, 64) / 4
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    linear_cross_entropy(a, head, targets, weights, chunk=6, **penalty).backward()
    by_hand(b @ head.dense().double().T, targets, weights, **penalty).backward()
    assert rel(a.grad, b.grad) < bar


def test_l2wrap_is_not_in_the_value_and_follows_the_incoming_factor():
    x, weight, targets, weights = example()
    plain, wrapped = (linear_cross_entropy(x, weight, targets, weights, 4, l2wrap=c) for c in (0., .2))
    assert plain.item() == wrapped.item()
    one, three = (torch.autograd.grad(k * linear_cross_entropy(x, weight, targets, weights, 4, l2wrap=.2), (x, weight)) for k in (1, 3))
    assert all(torch.allclose(3 * a, b) for a, b in zip(one, three))
    assert not torch.allclose(one[0], torch.autograd.grad(plain, x, retain_graph=True)[0])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_untrained_rows_never_reach_the_head(penalty):
    x, weight, targets, weights = example()
    seen = []
    def head(rows):
        seen.append(len(rows))
        return rows @ weight.T
    head_cross_entropy(x, head, targets, weights, 4, **penalty).backward()
    assert sum(seen) == 2 * int((weights > 0).sum())                     # once in the forward, once when it is computed again
    poisoned = x.detach().clone()
    poisoned[weights == 0] = float("nan")
    loss = linear_cross_entropy(poisoned.requires_grad_(), weight, targets, weights, 4, **penalty)
    loss.backward()
    assert loss.isfinite() and (poisoned.grad[weights == 0] == 0).all()


def test_one_penalty_at_a_time():
    x, weight, targets, weights = example()
    for call in (lambda **p: linear_cross_entropy(x, weight, targets, weights, **p), lambda **p: head_cross_entropy(x, nn.Linear(5, 13).double(), targets, weights, **p), lambda **p: new_model()(targets[None], targets=targets[None], **p)):
        with pytest.raises(ValueError, match="use one of them"): call(l2wrap=.1, z_loss=.1)
        with pytest.raises(ValueError, match="0 or more"): call(z_loss=-.1)
    with pytest.raises(ConfigError, match="l2wrap and z_loss both"): Config(model="rwkv7-tiny", data=[{"text": "a"}], l2wrap=1e-4, z_loss=1e-4)


# --- one step, split in many ways ---------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{i}?", "completion": "!" * n} for i, n in enumerate((1, 9, 3, 14))]      # 2, 10, 4 and 15 trained tokens


def split(micro): return [collate([DATA[i] for i in range(j, j + micro)]) for j in range(0, 4, micro)]


DATA = read_data(ROWS, Bytes())
DATA.examples.sort(key=lambda e: e.length)


def small(dtype):
    torch.manual_seed(3)
    from rwkv_peft.model.rwkv import RWKV, RWKVConfig
    model = RWKV(RWKVConfig(n_layer=2, n_embd=16, head_size=8, dim_ffn=24, vocab_size=257, w_rank=4, a_rank=4, v_rank=4, g_rank=4))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    return model.to(dtype)


def gradient(model): return torch.cat([p.grad.flatten() for p in model.parameters()])


def truth(penalty):
    "From full logits of each row alone, in float64."
    model = small(torch.float64)
    total = sum(by_hand(model(b.tokens)[0][0], b.targets[0], b.weights[0].double(), **penalty) for b in split(1))
    (total / trained_tokens(split(1))).backward()
    return gradient(model)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype, bar", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_one_gradient_however_the_rows_are_split(penalty, dtype, bar):
    expected = truth(penalty)
    for micro in (4, 2, 1):
        model = small(dtype)
        accumulate(model, split(micro), **penalty)
        assert rel(gradient(model), expected) < bar, micro


def test_two_processes_have_the_same_gradient(tmp_path):
    "Through DistributedDataParallel and gloo; 1 + 3 rows, so that the ranks have different numbers of rows and of trained tokens."
    (tmp_path / "two.py").write_text(textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(sys.path[0])!r})
        import torch
        from accelerate import Accelerator
        from test_loss import DATA, PENALTIES, collate, gradient, small
        from rwkv_peft.train.loss import accumulate, over_ranks, trained_tokens
        accelerator, found = Accelerator(cpu=True), {{}}
        own = [[collate([DATA[3]])], [collate([DATA[0], DATA[1], DATA[2]])]][accelerator.process_index]
        assert accelerator.num_processes == 2
        for dtype in (torch.float64, torch.float32):
            for penalty in PENALTIES:
                model = accelerator.prepare(small(dtype))
                total = over_ranks(accelerator, trained_tokens(own))
                sums = accumulate(model, own, accelerator.backward, total, accelerator.num_processes, **penalty)
                found[str((dtype, penalty))] = gradient(accelerator.unwrap_model(model)), over_ranks(accelerator, sums.sum().item()) / total
        if accelerator.is_main_process: torch.save(found, {str(tmp_path / "found.pth")!r})
        accelerator.end_training()
        """))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "two.py"], check=True, capture_output=True, timeout=120)
    found = torch.load(tmp_path / "found.pth", weights_only=True)
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for penalty in PENALTIES:
            got, loss = found[str((dtype, penalty))]
            assert rel(got, truth(penalty)) < bar, (dtype, penalty)
            model = small(torch.float64)
            assert abs(loss - accumulate(model, split(4), **penalty).item() / trained_tokens(split(4))) < 10 * bar


# --- float16 ------------------------------------------------------------------------------------------------------------------

def test_what_is_scaled_is_not_lost():
    "Half a million tokens in a step: without a factor most of the gradient underflows, with one it is float32's up to rounding."
    exact = new_model().requires_grad_(False)
    half = new_model().half().requires_grad_(False)
    batch = next(batches_of(31))
    for model in (exact, half): attach(model, StateTuning())
    find = lambda model, scale: (model.zero_grad(), accumulate(model, [batch], total=5e5, scale=scale), torch.cat([p.grad.flatten() for p in trained_parameters(model).values()]).double() / scale)[-1]
    truth = find(exact, 1.)
    assert rel(find(half, 2. ** 16), truth) < .02 < .1 < rel(find(half, 1.), truth)


def batches_of(vocabulary):
    from types import SimpleNamespace
    tokens = torch.randint(vocabulary, (3, 18), generator=torch.Generator().manual_seed(0))
    yield SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=torch.ones(3, 17), resets=None)


def test_the_factor_moves():
    scale = LossScale(torch.float16)
    assert scale.factor == 65536 and not scale.holds(float("inf")) and scale.factor == 32768 and scale.holds(1.)
    assert all(scale.holds(1.) for _ in range(1998)) and scale.factor == 32768 and scale.holds(1.) and scale.factor == 65536
    for _ in range(16): assert not scale.holds(float("nan"))
    assert scale.factor == 1 and scale.holds(float("nan")) and scale.factor == 1      # the rows are to blame, not the factor
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 4.)
    scale = LossScale(torch.float16)
    scale.undo([p, nn.Parameter(torch.ones(1))])
    assert torch.equal(p.grad, torch.full((3,), 2. ** -14))
    other = LossScale(torch.bfloat16)
    assert other.factor == 1 and other.holds(float("nan")) and other.factor == 1


def test_a_float16_run_follows_float32_and_goes_on(tmp_path):
    "From a factor that must overflow: the same rows are tried again, losses stay near float32's, the factor is kept with a checkpoint."
    settings = {"peft": "lora", "r": 4, "max_steps": 4, "save_steps": 2}
    def begin(name, dtype):
        found = finetune(model=small(dtype), data=ROWS, lr_init=1e-2, micro_bsz=2, accumulate=2, eval_split=0., output=str(tmp_path), name=name, **settings)
        found.plan()
        return found
    full, half, parts = begin("full", torch.float32), begin("half", torch.float16), begin("parts", torch.float16)
    half.scale.factor = parts.scale.factor = 2. ** 40
    list(full.steps()), list(half.steps())
    for event in parts.steps():
        if event["event"] == "step" and event["step"] == 2: parts.stop()
    again = Run.resume(parts.folder, model=small(torch.float16))
    list(again.steps())
    loss = lambda run: [e["loss"] for e in timeline(run.events) if e["event"] == "step"]
    assert loss(half) == pytest.approx(loss(full), rel=5e-3) and loss(again) == loss(half)
    assert 1 < again.scale.factor == half.scale.factor < 2. ** 40 and again.scale.calm == 4
    assert {p.dtype for p in half.trained.values()} == {torch.float32}


# --- in a run -----------------------------------------------------------------------------------------------------------------

def run(folder, name, **settings):
    found = finetune(**({"model": small(torch.float32), "data": ROWS, "peft": "none", "lr_init": 1e-2, "micro_bsz": 4, "accumulate": 1, "max_steps": 3, "eval_split": 0., "output": str(folder), "name": name} | settings))
    list(found.steps())
    return found, [e for e in timeline(found.events) if e["event"] == "step"]


def test_clipping_comes_after_accumulation(tmp_path):
    "The norm is that of the whole step's gradient, and so is what clipping leaves of it."
    whole, parts = (run(tmp_path, f"m{micro}", micro_bsz=micro, accumulate=4 // micro, grad_clip=1e-3, lr_init=1e-1)[1] for micro in (4, 1))
    assert [e["grad_norm"] for e in whole] == pytest.approx([e["grad_norm"] for e in parts], rel=1e-3)
    assert [e["loss"] for e in whole] == pytest.approx([e["loss"] for e in parts], rel=1e-4)
    assert whole[0]["grad_norm"] == pytest.approx(truth({}).norm().item(), rel=1e-4) and whole[0]["grad_norm"] > 1e-3


def test_settings_reach_the_loss(tmp_path):
    "z_loss is in the training loss that is shown, l2wrap is not, held-out loss knows neither; the steps differ."
    plain, wrapped, z = (run(tmp_path, name, eval_data=ROWS, eval_steps=3, **{name: 1.} if name != "plain" else {})[0] for name in ("plain", "l2wrap", "z_loss"))
    loss = lambda run, kind: [e["loss"] for e in timeline(run.events) if e["event"] == kind]
    assert loss(plain, "step")[0] == loss(wrapped, "step")[0] and loss(plain, "eval")[0] == loss(wrapped, "eval")[0] == loss(z, "eval")[0]
    model, batch = small(torch.float64), split(4)[0]
    logits = model(batch.tokens)[0].flatten(0, 1)
    lse = logits.logsumexp(1)[batch.weights.flatten() > 0]
    ce = cross_entropy(logits[batch.weights.flatten() > 0], batch.targets.flatten()[batch.weights.flatten() > 0])
    assert loss(z, "step")[0] == pytest.approx((ce + (lse ** 2).mean()).item(), rel=1e-5)
    assert len({loss(r, "step")[1] for r in (plain, wrapped, z)}) == 3
    assert z.model(batch.tokens)[0].logsumexp(-1).abs().mean() < plain.model(batch.tokens)[0].logsumexp(-1).abs().mean()      # it does what it is for
