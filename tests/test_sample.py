"""Sampling against the `rwkv` package's own pipeline, draw by draw; stopping, streaming, carrying the state."""
import numpy as np
import pytest
import torch
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.sample import Sampler, generate, read, still, twin
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.peft import DoRA, LoRA, attach
from rwkv_peft.train.infctx import infctx

SETTINGS = [dict(temperature=t, top_p=p, top_k=k) for t in (0, .5, 1., 1.7) for p in (0., .3, .85, 1.) for k in (0, 1, 7, 1000)]


@pytest.fixture(scope="module")
def theirs():
    from rwkv.utils import PIPELINE
    return PIPELINE.sample_logits


def test_draws_equal_the_rwkv_packages(theirs):
    torch.manual_seed(0)
    tied = torch.randint(0, 4, (300,)).float()                             # many equal scores
    for logits in (torch.randn(300) * 3, tied, torch.zeros(300), torch.randn(65536)[:5000] * 2):
        for settings in SETTINGS:
            np.random.seed(3)
            expected = [theirs(None, logits.clone(), **settings) for _ in range(4)]
            rng, sampler = np.random.RandomState(3), Sampler(**settings)
            assert [sampler.pick(logits.numpy(), {}, rng) for _ in range(4)] == expected, settings


def test_top_k_comes_after_top_p_and_temperature_last():
    scores = np.log(np.array([.4, .3, .2, .1], dtype=np.float32))
    stages = Sampler(temperature=4., top_p=.6, top_k=1).stages(scores, {})
    assert list(stages) == ["ban", "penalise", "softmax", "top_p", "top_k", "temperature"]
    assert [np.count_nonzero(stages[name]) for name in ("top_p", "top_k", "temperature")] == [2, 1, 1]


class Replay(torch.nn.Module):
    "Scores that were written down beforehand, whatever is read."
    def __init__(self, rows):
        super().__init__()
        self.rows, self.at, self.emb, self.tokenizer = rows, 0, torch.nn.Embedding(1, 1), Bytes()
        self.head = lambda x: x
        self.eval()                                                        # it counts, so that a twin would count by itself
    def hidden(self, tokens, state):
        self.at += 1
        return self.rows[self.at - 1].view(1, 1, -1).expand(1, tokens.shape[1], -1), self.at
    def forward(self, tokens, state):                                      # as the package calls a model
        self.at += 1
        return self.rows[self.at - 1].clone(), state


def test_a_whole_text_equals_the_rwkv_pipelines(theirs):
    "Penalties, their fading, digits that don't count, bans: 60 tokens in a row."
    from rwkv.utils import PIPELINE, PIPELINE_ARGS
    torch.manual_seed(1)
    rows = torch.randn(60, 257) * 2
    rows[:, 40:70] += 2                                                    # digits and neighbours, so that counts matter
    rows[:, 0] = -100
    class Pipeline(PIPELINE):
        def __init__(self, model): self.model = model
        def encode(self, text): return Bytes().encode(text)
        def decode(self, ids): return bytes(id - 1 for id in ids).decode("latin-1")       # a letter for every byte, so that the text tells the tokens
    settings = dict(temperature=1.3, top_p=.9, top_k=30)
    args = PIPELINE_ARGS(**settings, alpha_frequency=.4, alpha_presence=.5, alpha_decay=.9, token_ban=[66, 67])
    np.random.seed(5)
    expected = [ord(letter) + 1 for letter in Pipeline(Replay(rows)).generate("x", token_count=60, args=args)]
    sampler = Sampler(**settings, frequency=.4, presence=.5, decay=.9, ban=(66, 67), seed=5)
    ours = generate(Replay(rows), "x", 60, sampler, stop=())
    for _ in ours: pass
    assert ours.tokens == expected and len(expected) == 60 and 66 not in expected
    assert len(set(expected)) > 20 and set(expected) & set(range(49, 59))


def scripted(text, after=b""):
    "A model that says `text`, then token 0."
    ids = Bytes().encode(text) + [byte + 1 for byte in after] + [0]
    rows = torch.full((len(ids), 257), -20.)
    rows[range(len(ids)), ids] = 20
    return Replay(rows)


greedy = Sampler(temperature=0, presence=0, frequency=0)


@pytest.mark.parametrize("text, shown, why", [
    ("Yes.\n\nUser: more", "Yes.", "stop"), ("Yes.\n\nUseful\n\nUser:", "Yes.\n\nUseful", "stop"), ("\n\n\n\nUser:", "\n\n", "stop"), ("User:\n\nUse", "User:\n\nUse", "end"),
    ("你好。\n\nUser:", "你好。", "stop"), ("a" * 50, "a" * 50, "end"), ("", "", "end")])
def test_stop_strings_are_never_shown(text, shown, why):
    out = generate(scripted(text), "x", 200, greedy)
    pieces = []
    for piece in out:
        pieces.append(piece)
        assert piece and shown.startswith("".join(pieces))                 # nothing is shown that must be taken back
    assert "".join(pieces) == shown and out.finished == why


def test_streaming_never_shows_half_a_character():
    pieces = list(generate(scripted("读作🦖", after="🦖".encode()[:2]), "x", 200, greedy))
    assert "".join(pieces) == "读作🦖" and "\ufffd" not in "".join(pieces)
    out = generate(scripted("abcdef"), "x", 3, greedy)
    assert "".join(out) == "abc" and out.finished == "length" and len(out.tokens) == 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    model = RWKV(RWKVConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=300))       # rows above the vocabulary of bytes must never be drawn
    with torch.no_grad():
        for p in model.parameters(): p += .15 * torch.randn_like(p)
        model.head.weight[257:] *= 5
    return model.double()


def test_greedy_text_is_the_argmax_of_the_whole_forward(model):
    out = generate(model, "Once upon", 30, Sampler(temperature=0, presence=0, frequency=0, ban=(0,)), stop=())
    for _ in out: pass
    ids = [0, *Bytes().encode("Once upon"), *out.tokens]
    logits = model(torch.tensor([ids]))[0][0]
    logits[:, 257:] = logits[:, 0] = -torch.inf
    assert out.tokens == logits[-len(out.tokens) - 1:-1].argmax(-1).tolist() and len(set(out.tokens)) > 2
    assert torch.allclose(out.state.wkv, model(torch.tensor([ids]))[1].wkv, rtol=1e-9, atol=1e-9)


def test_states_fork_and_carry(model):
    sampler = Sampler(seed=4, ban=(0,))
    start = generate(model, "Once", 8, sampler, stop=())
    for _ in start: pass
    kept = start.state.clone()
    futures = [generate(model, "!", 8, Sampler(seed=seed, ban=(0,)), stop=(), state=start.state) for seed in (1, 2, 1)]
    for pair in zip(*futures): pass                                        # drawn in turns
    again = generate(model, [0, *Bytes().encode("Once"), *start.tokens, *Bytes().encode("!")], 8, Sampler(seed=1, ban=(0,)), stop=())
    for _ in again: pass
    full = [generate(model, "!", 8, Sampler(seed=seed, ban=(0,)), stop=(), state=start.state) for seed in (1, 2, 1)]
    for f in full:
        for _ in f: pass
    assert full[0].tokens == full[2].tokens == again.tokens != full[1].tokens
    assert torch.equal(kept.wkv, start.state.wkv) and not start.state.wkv.requires_grad


def test_training_mode_and_gradients_are_left_alone(model):
    model.train()
    list(generate(model, "a", 2, sampler=Sampler(seed=0)))
    assert model.training and all(part.training for part in model.modules())
    assert isinstance(next(iter(model.generate("a", max_tokens=40, sampler=Sampler(seed=0, ban=(0,))))), str)


@pytest.mark.parametrize("method", [LoRA(r=4, dropout=.5), DoRA(r=4, dropout=.5)], ids=["lora", "dora"])
def test_a_model_that_trains_elsewhere_is_read_without_dropout_and_without_being_touched(method):
    "Modes as another thread would see them, written down by a hook in the middle of the reading."
    torch.manual_seed(3)
    model = attach(RWKV(RWKVConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=257)), method)
    with torch.no_grad():
        for p in model.parameters(): p += .15 * torch.randn_like(p)
    quiet, seen = read(model.eval(), [[1, 2, 3]])[0], []
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    model.blocks[1].ffn.register_forward_hook(lambda module, given, y: seen.append((module.training, [m.training for m in model.modules()])))
    assert (read(model, [[1, 2, 3]])[0] == quiet).all() and (read(model, [[1, 2, 3]])[0] == quiet).all()
    assert seen == [(False, modes)] * 2 and [m.training for m in model.modules()] == modes
    model.blocks[1].ffn._forward_hooks.clear()
    assert not torch.equal(model(torch.tensor([[1, 2, 3]]))[0], model(torch.tensor([[1, 2, 3]]))[0])         # it still drops


def test_a_twin_shares_all_tensors_and_reads_in_pieces_by_itself():
    model = infctx(attach(RWKV(RWKVConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=257)), DoRA(r=4, dropout=.5)), 3).train()
    other, tokens = twin(model), torch.arange(1, 9)[None]
    assert {n: id(x) for n, x in other.state_dict(keep_vars=True).items()} == {n: id(x) for n, x in model.state_dict(keep_vars=True).items()}
    assert not {*other.modules()} & {*model.modules()} and still(other) is other and still(model) is not model
    with torch.no_grad():
        for p in model.parameters(): p += .15 * torch.randn_like(p)
        for more in ({}, {"targets": tokens}): assert torch.equal(other(tokens, **more)[0], other(tokens, **more)[0]) and not torch.equal(model(tokens, **more)[0], model(tokens, **more)[0])
        other(tokens)
        kept = model.blocks[0].att.key.adapter.kept[1]
        assert torch.equal(twin(model)(tokens)[0], other(tokens)[0]) and model.blocks[0].att.key.adapter.kept[1] is kept          # DoRA's row lengths are computed once for all of them


def test_bad_input_is_one_sentence(model):
    for call, word in ((lambda: generate(model, []), "nothing to go on"), (lambda: Sampler(top_p=2), "top_p=2"), (lambda: Sampler(temperature=-1), "temperature=-1"), (lambda: Sampler(temperature=np.inf), "finite"), (lambda: Sampler(repetition=1e-44).stages(np.ones(9, np.float32), {2: 1.}), "not finite"),
                       (lambda: list(generate(Replay(torch.full((3, 257), torch.nan)), "x")), "not finite"), (lambda: list(generate(model, "x", 3, Sampler(ban=tuple(range(257))))), "not finite")):
        with pytest.raises(ValueError, match=word) as e: call()
        assert "\n" not in str(e.value)
