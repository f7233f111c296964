"lm-eval's questions against a scorer that reads each sequence whole, in float64; its own evaluator over a task made here."
import sys
import subprocess
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.sample import Sampler, generate
from rwkv_peft.model.tokenizer import Bytes, World
from rwkv_peft.peft.adapters import attach
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.peft.state_tuning import StateTuning
from rwkv_peft.train.config import ConfigError

harness = pytest.importorskip("rwkv_peft.train.harness")
from lm_eval.api.instance import Instance  # noqa: E402

torch.set_num_threads(1)


def tiny(version="7", tuned=True):
    "Float64, noise everywhere, with a LoRA and a tuned first state."
    torch.manual_seed(0)
    ranks = dict(w_rank=8, a_rank=8, v_rank=8, g_rank=8) if version == "7" else {}
    model = RWKV(RWKVConfig(version=version, n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, **ranks)).double()
    if tuned: attach(model, LoRA(4), StateTuning())
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def model(): return tiny()


def ask(kind, *arguments): return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def slow(model, context, continuation, prefix=(0,)):
    "One row, the whole sequence, no state handed on."
    with torch.no_grad(): p = model(torch.tensor([[*prefix, *context, *continuation]]))[0][0].log_softmax(-1)
    at = range(len(prefix) + len(context) - 1, len(prefix) + len(context) + len(continuation) - 1)
    return sum(p[t, c].item() for t, c in zip(at, continuation)), all(p[t].argmax().item() == c for t, c in zip(at, continuation))


def counted(model):
    "A list that gets the shape of each forward's tokens."
    shapes, handle = [], None
    hidden = model.hidden
    model.hidden = lambda tokens, *a, **k: shapes.append(tuple(tokens.shape)) or hidden(tokens, *a, **k)
    return shapes


@pytest.mark.parametrize("version", ["7", "6", "5.2"])
def test_likelihoods_are_those_of_whole_sequences(version):
    model = tiny(version, tuned=version == "7")
    long = "a common beginning of more than thirty-two bytes, "
    pairs = [(long + "one", " x"), (long + "one", " yes, and more"), ("", "b"), ("Q:", "?"), (long + "two", " z"), ("", "cd"), (long + "one", "!"), ("Q: ", "with a blank"), ("  ", "only blanks"), (long, long)]
    found = harness.LM(model, batch_size=2).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (nats, greedy) in zip(pairs, found):
        bare = context.rstrip() or context
        want = slow(model, Bytes().encode(bare), Bytes().encode(context[len(bare):] + continuation))
        assert nats == pytest.approx(want[0], rel=1e-9) and greedy == want[1], (context, continuation)


def test_greedy_is_said_when_it_is(model):
    text = "abc"
    likeliest = ""
    for _ in range(3):
        with torch.no_grad(): likeliest += chr(int(model(torch.tensor([[0, *Bytes().encode(text + likeliest)]]))[0][0, -1, 1:129].argmax()))
    ids = Bytes().encode(likeliest)
    nats, greedy = harness.LM(model).loglikelihood(ask("loglikelihood", (text, likeliest)), disable_tqdm=True)[0]
    assert (nats, greedy) == (pytest.approx(slow(model, Bytes().encode(text), ids)[0]), slow(model, Bytes().encode(text), ids)[1])


def test_a_context_is_read_once():
    "Two contexts of 100 and 120 bytes that share 90, ten continuations each: the shared part goes through the model once, the rest once a context, and then only continuations."
    model, shared = tiny(), "s" * 90
    shapes, pairs = counted(model), [(shared + c * n, f" {i}{'y' * i}") for c, n in (("a", 10), ("b", 30)) for i in range(10)]
    found = harness.LM(model, batch_size=4).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    read = sum(b * t for b, t in shapes if b == 1)
    assert read == 1 + 90 + 9 + 29 and max(b for b, _ in shapes) == 4 and len(found) == 20        # token 0, the last byte of each context belongs to the continuations
    assert found[13][0] == pytest.approx(slow(model, Bytes().encode(pairs[13][0]), Bytes().encode(pairs[13][1]))[0], rel=1e-9)


def test_prefix_and_training_mode():
    model = tiny().train()
    lm = harness.LM(model, prefix=(0, 11))
    for context in ("ab", ""):
        nats, _ = lm.loglikelihood(ask("loglikelihood", (context, "cd")), disable_tqdm=True)[0]
        assert nats == pytest.approx(slow(model.eval(), Bytes().encode(context), Bytes().encode("cd"), (0, 11))[0], rel=1e-9)
        model.train()
    assert model.training and lm.loglikelihood(ask("loglikelihood", ("ab", "")), disable_tqdm=True) == [(0., True)]
    with pytest.raises(ConfigError, match="prefix: a text's first token"): harness.LM(model, prefix=())


def test_a_whole_text_of_any_length(model):
    text = "The sea, the sea! " * 150
    assert len(text) > 2 * 1024
    found = harness.LM(model).loglikelihood_rolling(ask("loglikelihood_rolling", (text,), ("x",)))
    assert found == [pytest.approx(slow(model, [], Bytes().encode(t))[0], rel=1e-9) for t in (text, "x")]


def test_generation_is_ours_and_stops(model):
    prompts = ["a", "the same beginning of some length, one", "the same beginning of some length, two", "b"]
    greedy = Sampler(temperature=0, presence=0, frequency=0)
    alone = ["".join(generate(model, p, max_tokens=9, sampler=greedy, stop=())) for p in prompts]
    lm = harness.LM(model, batch_size=3)
    asked = [(p, {"until": [], "max_gen_toks": 9 if i != 3 else 4}) for i, p in enumerate(prompts)]
    found = lm.generate_until(ask("generate_until", *asked))
    assert found[:3] == alone[:3] and alone[3].startswith(found[3])
    stop = alone[1][2:4]
    cut, = lm.generate_until(ask("generate_until", (prompts[1], {"until": stop, "max_gen_toks": 9})))
    assert cut == alone[1][:alone[1].index(stop)]
    with pytest.raises(ConfigError, match="num_beams: generation has no such setting"): lm.generate_until(ask("generate_until", ("a", {"num_beams": 3})))


@given(st.text(alphabet="ab ,\n猫é", min_size=1, max_size=9), st.text(alphabet="ab ,\n猫é", min_size=1, max_size=9))
@settings(max_examples=150, deadline=None)
def test_no_byte_is_lost_at_the_border(context, continuation):
    "World's tokens of context and continuation are the bytes of the two texts, in order; blanks at the context's end stand in the continuation."
    world = World()
    before, after = harness.encode_pair(world, context, continuation)
    data = [b"".join(world.token_bytes(i) for i in ids).decode() for ids in (before, after)]
    assert "".join(data) == context + continuation and data[0] == (context.rstrip() or context)


def test_a_border_inside_a_token_is_seen():
    world = World()
    whole, before = world.encode("a b"), world.encode("a ")
    assert whole[:len(before)] != before                                    # " b" is one token
    for context, continuation in [("appl", "e"), ("Is it a", "pple?")]:
        ids = harness.encode_pair(world, context, continuation)
        assert world.decode(ids[0]) == context and world.decode(ids[1]) == continuation


def test_chats_read_as_they_were_trained(model):
    lm = harness.LM(model)
    history = [{"role": "user", "content": "Hi."}]
    assert lm.apply_chat_template(history) == "User: Hi.\n\nAssistant:" and lm.apply_chat_template(history, add_generation_prompt=False).rstrip() == "User: Hi."


def test_lm_evals_own_evaluator(model):
    "A task of each kind, no network; what it reports is recomputed by hand."
    import datasets
    from lm_eval import simple_evaluate
    asked = [("ab", [" c", " dd"], 0), ("x, ", ["y", "zz z"], 1), ("Q", ["1", "22"], 0)]
    rows = lambda **_: {"test": datasets.Dataset.from_list([{"question": q, "choices": c, "answer": a, "text": q + c[0]} for q, c, a in asked])}
    common = {"custom_dataset": rows, "test_split": "test", "target_delimiter": ""}
    mean = lambda name: [{"metric": name, "aggregation": "mean", "higher_is_better": True}]
    choice = {"task": "pick", **common, "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": mean("acc")}
    rolling = {"task": "read", **common, "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    write = {"task": "write", **common, "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": mean("exact_match")}
    found = simple_evaluate(model=harness.LM(model), tasks=[choice, rolling, write], bootstrap_iters=0, verbosity="ERROR")
    e = Bytes().encode
    def likelihood(q, c): b = q.rstrip(); return slow(model, e(b), e(q[len(b):] + c))[0]
    right = [max(range(2), key=lambda i: likelihood(q, c[i])) == a for q, c, a in asked]
    assert found["results"]["pick"]["acc,none"] == pytest.approx(sum(right) / 3)
    nats, size = sum(slow(model, [], e(q + c[0]))[0] for q, c, _ in asked), sum(len(q + c[0]) for q, c, _ in asked)
    assert found["results"]["read"]["bits_per_byte,none"] == pytest.approx(-nats / size / 0.6931471805599453, rel=1e-9)
    assert found["results"]["write"]["exact_match,none"] == 0 and len(found["samples"]["write"]) == 3


def test_without_lm_eval_a_sentence_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None\ntry: import rwkv_peft.train.harness\nexcept ImportError as e: print(e)"
    assert "pip install rwkv_peft[eval]" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
