"""Products for few rows against float64; token by token against sequence mode; several texts against each alone; beginnings that are read once."""
import pytest
import torch
from rwkv_peft.kernels.few_rows import few_rows, few_rows_int8, few_rows_int8_op, few_rows_op
from rwkv_peft.kernels.native import at_once
from rwkv_peft.model.quant import Int8
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.sample import Prefixes, SampleError, Sampler, generate, generate_batch
from rwkv_peft.model.step import step
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.peft.lora import LoRA

greedy = Sampler(temperature=0, presence=0, frequency=0)


def off(got, exact): return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("K, N", [(1, 1), (3, 5), (15, 2), (64, 7), (65, 129), (768, 33), (1000, 257), (3072, 8)])
def test_products_equal_those_in_float64(K, N):
    torch.manual_seed(K)
    W, q, scale = torch.randn(N, K), torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + .01
    for M in range(1, 18):                                                   # 17: PyTorch's own products
        bar = 3e-7 if M < 17 else 1e-6
        x = torch.randn(M, K)
        assert off(few_rows(x, W), x.double() @ W.double().T) < bar
        assert off(few_rows_int8(x, q, scale), x.double() @ (q.double() * scale[:, None].double()).T) < bar
        assert off(few_rows_op(x, W), x.double() @ W.double().T) < 3e-7


def test_a_row_does_not_notice_neighbours_threads_or_layout():
    torch.manual_seed(0)
    x, W = torch.randn(16, 770), torch.randn(301, 770)
    q, scale, threads = (W * 40).round().clamp(-127, 127).to(torch.int8), torch.rand(301, 1), torch.get_num_threads()
    for product, more in ((few_rows, (W,)), (few_rows_int8, (q, scale))):
        whole = product(x, *more)
        assert all(torch.equal(product(x[i:i + n], *more), whole[i:i + n]) for n in (1, 2, 3, 5, 8) for i in (0, 7))
        spread = torch.stack([x, -x], -1)[..., 0]
        assert not spread.is_contiguous() and torch.equal(product(spread, *more), whole)
        assert torch.equal(product(x.view(2, 8, 770), *more), whole.view(2, 8, 301))
        try:
            torch.set_num_threads(2)
            assert torch.equal(product(x, *more), whole)
        finally: torch.set_num_threads(threads)
    assert off(few_rows(x, W.T.contiguous().T), x.double() @ W.double().T) < 1e-6            # a transposed matrix
    assert off(few_rows_int8(x, q.T.contiguous().T, scale), x.double() @ (q * scale).double().T) < 1e-6
    assert few_rows(x.double(), W.double()).dtype == few_rows_int8(x.double(), q, scale).dtype == torch.float64
    assert few_rows(x.to("meta"), W.to("meta")).shape == few_rows_int8(x.to("meta"), q.to("meta"), scale.to("meta")).shape == (16, 301)
    for wrong in (q.short(), q[:, 1:], q[1:]):
        with pytest.raises(ValueError, match="few_rows_int8 takes") as e: few_rows_int8(x, wrong, scale)
        assert "\n" not in str(e.value)


def test_gradients_and_what_pytorch_asks_of_operators():
    torch.manual_seed(1)
    x, W, q, scale = torch.randn(3, 20, requires_grad=True), torch.randn(7, 20, requires_grad=True), torch.randint(-9, 9, (7, 20), dtype=torch.int8), torch.rand(7)
    torch.library.opcheck(few_rows_op, (x, W))
    torch.library.opcheck(few_rows_int8_op, (x, q, scale))
    mine, theirs = (torch.autograd.grad((f(x, W) ** 2).sum(), (x, W)) for f in (few_rows, torch.nn.functional.linear))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(mine, theirs))
    mine, theirs = (torch.autograd.grad((y ** 2).sum(), x)[0] for y in (few_rows_int8(x, q, scale), x @ (q * scale[:, None]).T))
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_operators_are_called_past_pytorch_only_where_nothing_follows():
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append(str(f))
            return f(*args, **(kwargs or {}))
    x, W = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    with Watch(): few_rows(x, W.detach())
    assert any("few_rows" in name for name in seen)
    assert few_rows(x, W).requires_grad
    with torch.no_grad(): assert not at_once(few_rows_op, x, W).requires_grad and torch.equal(at_once(few_rows_op, x, W), few_rows_op(x, W))


def tiny(**sizes):
    torch.manual_seed(2)
    model = RWKV(RWKVConfig(**(dict(n_layer=2, n_embd=64, head_size=16, vocab_size=300) | sizes)))
    with torch.no_grad():
        for p in model.parameters(): p += .15 * torch.randn_like(p)
        model.head.weight[0] = -1
    return model.eval()


@pytest.fixture(scope="module")
def model(): return tiny()


@pytest.mark.parametrize("backend", ["auto", "cpu", "chunk", "loop"])
@pytest.mark.parametrize("B", [1, 5])
def test_token_by_token_equals_sequence_mode(model, backend, B):
    torch.manual_seed(3)
    tokens, model.backend = torch.randint(1, 257, (B, 37)), backend
    try:
        whole = model(tokens)                                                # gradients on: PyTorch's products, the operators
        with torch.no_grad():
            state, logits = None, []
            for t in range(37): out, state = model(tokens[:, t:t + 1], state); logits.append(out)
        assert off(torch.cat(logits, 1), whole[0].detach().double()) < 1e-5
        assert off(state.wkv, whole[1].wkv.detach().double()) < 1e-5
    finally: model.backend = "auto"


@pytest.mark.parametrize("B, sizes", [(1, {}), (3, dict(n_embd=96, head_size=32, dim_ffn=100, w_rank=5, a_rank=33, v_rank=16, g_rank=7)), (16, dict(n_layer=1, n_embd=60, head_size=20))])
def test_one_call_a_layer_equals_sequence_mode(B, sizes):
    model = tiny(**sizes)
    tokens = torch.randint(1, 257, (B, 21), generator=torch.Generator().manual_seed(4))
    whole, last = model(tokens)
    with torch.no_grad():
        _, state = model(tokens[:, :3])
        kept, outs = state.clone(), []
        for t in range(3, 21):
            x, state = step(model, tokens[:, t:t + 1], state)
            outs.append(model.head(x))
        assert off(torch.cat(outs, 1), whole[:, 3:].detach().double()) < 1e-5
        for got, want in zip(vars(state).values(), vars(last).values()): assert off(got, want.detach().double()) < 1e-5
        step(model, tokens[:, 3:4], kept)
        assert all(torch.equal(a, b) for a, b in zip(vars(kept).values(), vars(model(tokens[:, :3])[1]).values()))


def test_one_call_a_layer_stands_aside_for_everything_else():
    from rwkv_peft.peft.adapters import attach
    model, one = tiny(), torch.tensor([[5]])
    _, state = model(one)
    state = state.detach()
    assert step(model, one, state) is None                                   # gradients
    with torch.no_grad():
        assert step(model, one, state) is not None
        assert step(model, one, None) is None and step(model, torch.tensor([[5, 6]]), state) is None
        hook = model.blocks[1].ln2.register_forward_hook(lambda *seen: None)
        assert step(model, one, state) is None
        hook.remove()
        att, model.blocks[0].att = model.blocks[0].att, torch.nn.Identity()
        assert step(model, one, state) is None
        model.blocks[0].att = att
        model.backend = "chunk"
        assert step(model, one, state) is None
        model.backend = "auto"
        assert step(model.double(), one, state.to(dtype=torch.float64)) is None
        attach(model.float(), LoRA(r=2))
        assert step(model, one, state) is None
        wide, many = tiny(), torch.full((17, 1), 5)
        assert step(wide, many, wide(many)[1]) is None


PROMPTS = ["Once upon a time", "Once", "Once upon", "O", "Twice and more often than that, " * 3]


def exchange(model):
    "What can happen to a layer's tensors between two tokens, one after the other."
    att, ffn = model.blocks[1].att, model.blocks[0].ffn
    yield "written in place", lambda: att.key.weight.data.mul_(1.1)
    yield "another parameter", lambda: setattr(att.value, "weight", torch.nn.Parameter(att.value.weight.detach() * .9))
    yield "other memory behind the same parameter", lambda: setattr(att.w1, "data", att.w1.data * 1.2)
    yield "another module", lambda: setattr(model.blocks[0], "ln2", torch.nn.LayerNorm(ffn.key.in_features).requires_grad_(False))
    yield "packed", lambda: ffn.key.pack(Int8(ffn.key.weight))
    yield "an adapter", lambda: LoRA(r=2).attach(model, "blocks.1.ffn.value")
    yield "taken off again", lambda: setattr(model.blocks[1].ffn.value, "adapter", None)


@torch.no_grad()
def test_what_is_exchanged_between_two_tokens_is_seen():
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=50)).eval()
    for p in model.parameters(): p += .1 * torch.randn_like(p)
    _, state = model(torch.randint(50, (2, 5)))
    token = torch.randint(50, (2, 1))
    assert step(model, token, state) is not None
    for what, change in exchange(model):
        change()
        if what == "an adapter": torch.nn.init.normal_(model.blocks[1].ffn.value.adapter.B, std=.1)
        got, (want, wanted) = step(model, token, state), model.hidden(token, state)
        assert (got is None) == (what == "an adapter"), what
        if got: assert off(got[0], want.double()) < 1e-5 and off(got[1].wkv, wanted.wkv.double()) < 1e-5, what


@pytest.mark.parametrize("sampler", [greedy, Sampler(seed=11), Sampler(seed=2 ** 32 - 2, top_p=.5)])
def test_texts_together_equal_each_alone(model, sampler):
    rows = generate_batch(model, PROMPTS, 25, sampler, stop=())
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows)):
        seed = None if sampler.seed is None else (sampler.seed + i) % 2 ** 32
        one = generate(model, prompt, 25, Sampler(**{**vars(sampler), "seed": seed}), stop=())
        assert "".join(one) == row.text == one.text and one.tokens == row.tokens and one.finished == row.finished
        for got, want in zip(vars(row.state).values(), vars(one.state).values()): assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tokens) for row in rows}) > 1


def test_rows_that_finish_early_leave_and_disturb_nobody(model):
    free = generate_batch(model, PROMPTS, 25, greedy, stop=())
    stop = Bytes().decode(free[2].tokens[3:5])
    fed = []
    hook = model.emb.register_forward_hook(lambda module, args, out: fed.append(tuple(args[0].shape)))
    try: rows = generate_batch(model, PROMPTS, 25, greedy, stop=stop)
    finally: hook.remove()
    assert "stop" in {row.finished for row in rows} and any(B < len(PROMPTS) for B, T in fed if T == 1)
    for prompt, row, full in zip(PROMPTS, rows, free):
        one = generate(model, prompt, 25, greedy, stop=stop)
        assert "".join(one) == row.text and row.finished == one.finished and row.tokens == full.tokens[:len(row.tokens)]
        on = generate(model, [33], 5, greedy, stop=(), state=row.state)     # a state that goes on
        again = generate(model, [0, *Bytes().encode(prompt), *row.tokens, 33], 5, greedy, stop=())
        for _ in on: pass
        for _ in again: pass
        assert on.tokens == again.tokens and row.state.wkv.shape[1] == 1
    assert [row.finished for row in generate_batch(model, ["a", "b"], 0)] == ["length", "length"] and generate_batch(model, []) == []


def test_what_prompts_share_is_read_once(model):
    fed = []
    hook = model.emb.register_forward_hook(lambda module, args, out: fed.append(args[0].numel()))
    rules = [0, *Bytes().encode("These are the rules of the game. " * 3)]
    prompts = [rules + Bytes().encode(text) for text in ("One", "Second", "The third")]
    try:
        plain = [generate(model, prompt, 6, greedy, stop=()) for prompt in prompts]
        for one in plain: list(one)
        alone, _ = sum(fed), fed.clear()
        together = generate_batch(model, prompts, 6, greedy, stop=())
        shared, _ = sum(fed), fed.clear()
        assert alone - shared == 2 * len(rules)
        cache = Prefixes(model)
        cache.read(rules)
        assert sum(fed) == len(rules)
        fed.clear()
        cached = [generate(model, prompt, 6, greedy, stop=(), prefixes=cache) for prompt in prompts]
        for one in cached: list(one)
        assert alone - sum(fed) == 3 * len(rules) == cache.spared
        fed.clear()
        list(generate(model, prompts[1], 1, greedy, prefixes=cache))
        assert fed == [1]                                                   # the very same prompt: its last token only
    finally: hook.remove()
    assert [one.tokens for one in plain] == [one.tokens for one in together] == [one.tokens for one in cached]
    state = cache.read(rules)
    on = generate_batch(model, [prompt[len(rules):] for prompt in prompts], 6, greedy, stop=(), state=state)
    assert [row.tokens for row in on] == [one.tokens for one in plain]
    begun = Prefixes(model, start=state)
    assert generate(model, "One", 6, greedy, stop=(), prefixes=begun).unread == Bytes().encode("One")
    assert [row.tokens for row in generate_batch(model, ["One", "Second", "The third"], 6, greedy, stop=(), prefixes=begun)] == [one.tokens for one in plain]


def test_prefixes_forget_the_least_used_and_all_when_weights_change():
    model = tiny()
    cache = Prefixes(model, limit=2)
    for ids in ([1, 2], [3], [1, 2, 4]): cache.read(ids)
    assert set(cache.states) == {(1, 2), (1, 2, 4)} and cache.tokens == 4 and cache.spared == 2
    cache.read([1, 2]); cache.read([5])
    assert set(cache.states) == {(1, 2), (5,)}
    with torch.no_grad(): model.blocks[0].att.key.weight.mul_(1.5)
    assert off(cache.read([1, 2]).wkv, model(torch.tensor([[1, 2]]))[1].wkv.detach().double()) < 1e-6 and set(cache.states) == {(1, 2)}
    from rwkv_peft.peft.adapters import attach
    from rwkv_peft.peft.lora import LoRA
    attach(model, LoRA(r=2))
    cache.read([7])
    assert set(cache.states) == {(7,)}


def test_bad_input_is_one_sentence(model):
    two = generate_batch(model, ["a", "b"], 2, greedy)
    state = torch.utils._pytree.tree_map(lambda x: x, two[0].state)
    double = type(state)(*(torch.cat([x, x], 1) for x in vars(state).values()))
    for call, word in ((lambda: generate_batch(model, "abc"), "one text"), (lambda: generate_batch(model, ["a"], sampler=[greedy] * 2), "2 samplers"), (lambda: Prefixes(model, 0), "limit=0"),
                       (lambda: generate(tiny(), "a", prefixes=Prefixes(model)), "another model"), (lambda: generate(model, "a", state=state, prefixes=Prefixes(model)), "start=state"),
                       (lambda: generate(model, "a", state=double), "2 rows"), (lambda: generate_batch(model, ["a", []]), "nothing to go on")):
        with pytest.raises(SampleError, match=word) as e: call()
        assert "\n" not in str(e.value)
