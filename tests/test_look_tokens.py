"Token losses against full logits, sorts and the run's own evaluation; ribbons over rows that nobody would write."
import math
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import cross_entropy

from markup import Markup
from rwkv_peft import LoRA, RWKV, RWKVConfig, StateTuning, attach, read_data
from rwkv_peft.data.chat import TEMPLATES
from rwkv_peft.data.masks import Example, encode_segments
from rwkv_peft.data.rows import DataError
from rwkv_peft.look.tokens import WorstRows, compare, example_of, judged, loss_ribbon, read_losses, roles_of, spelled, worst_rows
from rwkv_peft.model.state import State
from rwkv_peft.model.tokenizer import Bytes, World
from rwkv_peft.show.html import token_ribbon
from rwkv_peft.train.evaluate import evaluate
from rwkv_peft.train.infctx import infctx

torch.set_num_threads(1)


def small(vocab_size=257, **sizes):
    "A model with random weights that are large enough to have opinions."
    torch.manual_seed(3)
    model = RWKV(RWKVConfig(**{**dict(n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=vocab_size), **(dict(w_rank=8, a_rank=8, v_rank=8, g_rank=8) if sizes.get("version", "7") == "7" else {}), **sizes}))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3 * torch.randn_like(p))
    return model.requires_grad_(False)


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_losses_are_those_of_the_full_logits(version, chunk):
    model = small(version=version).double()
    ids = torch.randint(257, (30,))
    logits = model(ids[None])[0][0, :-1]
    found = read_losses(model, ids, chunk=chunk)
    assert torch.allclose(found.nats, cross_entropy(logits, ids[1:], reduction="none"), rtol=1e-9)
    p = logits.softmax(1)
    for t, true in enumerate(ids[1:].tolist()):
        order = sorted(range(257), key=lambda i: -p[t, i].item())
        assert found.ranks[t] == order.index(true) + 1 and found.top_ids[t].tolist() == order[:3]
        assert found.top_p[t].tolist() == pytest.approx([p[t, i].item() for i in order[:3]], rel=1e-9)
    assert found.ids == ids.tolist() and len(found.pieces) == len(found.roles) == 30 and len(found.nats) == len(found.weights) == 29


def test_a_tie_is_as_good_as_the_best():
    nats, ranks, ids, p = judged(torch.tensor([[1., 5., 5., 0.], [0., 0., 0., 0.]]), torch.tensor([2, 3]))
    assert ranks.tolist() == [1, 1] and sorted(ids[0, :2].tolist()) == [1, 2] and nats[1].item() == pytest.approx(math.log(4))
    assert judged(torch.zeros(1, 2), torch.tensor([1]))[2].shape == (1, 2)                        # a vocabulary of two has no third


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 256), st.sampled_from([0., 0., .25, 1., 3.])), min_size=2, max_size=40).filter(lambda row: any(w for _, w in row[1:])))
def test_the_mean_is_that_of_an_evaluation(row):
    tokens, weights = zip(*row)
    example = Example(torch.tensor(tokens), torch.tensor([0., *weights[1:]]))
    assert read_losses(MODEL, example).loss == pytest.approx(evaluate(MODEL, [example])["loss"], rel=1e-5)


MODEL = small()


def test_scores_of_a_long_row_never_exist_together_and_little_of_it_is_drawn():
    shapes = []
    model = small(n_layer=1, n_embd=16)
    model.head.register_forward_hook(lambda module, given, scores: shapes.append(tuple(scores.shape)))
    tokens = torch.tensor([0, *[98] * 100_000])
    found = read_losses(model, Example(tokens, torch.tensor([0.] * 60_001 + [1.] * 40_000)), chunk=2000)
    assert sum(n for _, n, _ in shapes) == len(found.nats) == 100_000 and max(n for _, n, _ in shapes) == 2000
    html = loss_ribbon(found)
    assert len(html) < 400_000 and len(Markup(html).values("title")) == 1000
    assert "the 59,901 pieces before" in html and f"… and {100_001 - 59_901 - 1000:,} more tokens" in html
    assert len(Markup(loss_ribbon(found, limit=10, start=0)).values("title")) == 10 and "pieces before" not in loss_ribbon(found, limit=10, start=0)
    assert Markup(loss_ribbon(found, limit=10, start=200_000)).values("title") == []                       # beyond the end: nothing, and it says how much was passed over
    assert "100,001 pieces before" in loss_ribbon(found, limit=10, start=200_000)


def test_reading_changes_nothing_in_the_model():
    model = small()
    attach(model, LoRA(r=4, dropout=.9))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapter." in name: p.normal_()
    model.train()
    first, again = (read_losses(model, [0, 5, 6, 7, 8]) for _ in range(2))
    assert torch.equal(first.nats, again.nats) and model.training and not first.nats.requires_grad and all(p.grad is None for p in model.parameters())
    model.eval()
    read_losses(model, [0, 5])
    assert not model.training
    bare = small()
    assert not torch.allclose(read_losses(bare, [0, 5, 6, 7, 8]).nats, first.nats)                # the adapter was heard


def test_a_model_that_is_training_in_pieces_keeps_its_modes_while_it_is_looked_at():
    model = attach(small(), LoRA(r=4, dropout=.9))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapter." in name: p.normal_()
    rows = [example_of([0, 5, 6, 7, 8, 9], Bytes()), example_of([0, 4, 4, 4, 4], Bytes())]
    want = [evaluate(model.eval(), [row])["loss"] for row in rows]
    infctx(model.train(), 2)
    model.blocks[0].eval()
    modes, seen = [m.training for m in model.modules()], []
    model.ln_out.register_forward_hook(lambda module, given, y: seen.append([m.training for m in model.modules()]))
    assert [read_losses(model, row).loss for row in rows] == pytest.approx(want, rel=1e-5)
    assert sorted(row["loss"] for row in worst_rows(model, rows)) == pytest.approx(sorted(want), rel=1e-5)
    assert len(seen) > 4 and all(then == modes for then in seen) and [m.training for m in model.modules()] == modes


def test_a_tuned_memory_is_the_state_that_it_stands_for():
    memory = torch.randn(2, 2, 16, 16)
    state = State.zeros(MODEL.config)
    state.wkv[:] = memory[:, None]
    tuned = small()
    StateTuning({f"blocks.{i}.att.time_state": memory[i] for i in range(2)}).attach(tuned)
    ids = [0, 9, 8, 7, 6, 5]
    handed = read_losses(MODEL, ids, state, chunk=2)
    assert torch.allclose(read_losses(tuned, ids, chunk=4).nats, handed.nats, atol=1e-5)
    assert not torch.allclose(read_losses(MODEL, ids).nats, handed.nats, atol=1e-2)
    numbers = lambda html: re.search(r"trained: (.*?) nats before, (.*?) after", html).groups()
    assert numbers(compare(MODEL, tuned, ids)) == numbers(compare(MODEL, MODEL, ids, state=state)) == numbers(compare(read_losses(MODEL, ids), tuned))


def test_the_sentence_tells_the_sums_and_the_signs_are_drawn():
    example = Example(torch.tensor([0, *range(60, 72)]), torch.tensor([0.] * 5 + [1.] * 6 + [.5, 0.]))
    other = small(version="6")
    nats = [cross_entropy(m(example.tokens[None, :-1])[0][0], example.tokens[1:], reduction="none").double() for m in (MODEL, other)]
    w = example.weights[1:].double()
    before, after = ((x * w).sum().item() for x in nats)
    html = compare(MODEL, other, example)
    better, worse = (int(((sign * (nats[0] - nats[1]) > 0) & (w > 0)).sum()) for sign in (1, -1))
    assert better and worse and better + worse == 7
    assert f"7 trained: {before:,.2f} nats before, {after:,.2f} after ({after - before:+,.2f}; {before / 6.5:.3f} → {after / 6.5:.3f} a token), {better} improved and {worse} worse." in html
    assert html.count("underline solid") == better and html.count("underline dashed") == worse
    turned = compare(other, MODEL, example)
    assert turned.count("underline solid") == worse and turned.count("underline dashed") == better
    assert html.count("opacity:.65") == 6                                                         # five that aren't trained, and the first token
    same = compare(MODEL, MODEL, example)
    assert "0 improved and 0 worse" in same and "<u " not in same


def test_readings_of_different_rows_are_refused():
    with pytest.raises(DataError, match="different tokens"): compare(read_losses(MODEL, [0, 1]), read_losses(MODEL, [0, 2]))
    with pytest.raises(DataError, match="id 257.*0 to 256"): read_losses(MODEL, [0, 1, 257])
    with pytest.raises(DataError, match="id -1"): read_losses(MODEL, [0, -1])
    for nothing in (None, 3, [[1, 2]], [.5, .5], object()):
        with pytest.raises(DataError, match="a row is"): read_losses(MODEL, nothing)


@pytest.mark.parametrize("tokens", [[], [0], [77]])
def test_a_row_without_predictions_is_drawn(tokens):
    found = read_losses(MODEL, tokens)
    assert len(found.nats) == len(found.ranks) == 0 and math.isnan(found.loss) and len(found.pieces) == len(tokens)
    assert "0 of 0 tokens" in Markup(loss_ribbon(found)).text and "NaN" not in compare(found, found) and "nan" not in compare(found, found)


def test_a_row_without_trained_tokens_says_so():
    example = Example(torch.tensor([0, 70, 71, 72]), torch.zeros(4))
    found = read_losses(MODEL, example)
    html = loss_ribbon(found)
    assert math.isnan(found.loss) and "0 of 3 tokens" in html and "nan" not in html and "<u " not in html and html.count("opacity:.65") == 4 and "<details" not in html
    assert "No token is trained." in compare(found, found) and "3 not trained" in compare(found, found)
    assert "No token is not trained." in compare(MODEL, MODEL, [0, 1, 2])


EVIL = ["<script>alert(1)</script>", "\" onmouseover='x' ", "</span></u></div><img src=x onerror=y>", "\x1b[31m\x1b]0;title\x07", "\u202eabc\u2066", "שלום עולם", "a\r\n\tb\0", "$x$ &amp; `c`", "\ud7ff\ue000\U0010ffff"]


@pytest.mark.parametrize("tokenizer", [Bytes(), World()], ids=["bytes", "world"])
def test_whatever_a_row_holds_is_text(tokenizer):
    text = "|".join(EVIL)
    example = encode_segments([("Q", 0.), (text, 1.)], tokenizer)
    model = MODEL if tokenizer.name == "bytes" else small(65536, n_layer=1)
    found, bare = read_losses(model, example), Markup(loss_ribbon(read_losses(model, [0, *tokenizer.encode("ab")])))
    for html in (loss_ribbon(found, name=text), compare(found, read_losses(model, example), name=text), WorstRows(worst_rows(model, [example]))._repr_html_()):
        seen = Markup(html)
        assert set(seen.tags) <= {*bare.tags, "p", "b", "u"} and {k for k, _ in seen.attributes} <= {"style", "class", "title"}
        assert not set("\x1b\x07\0\r\u202e\u2066") & set(html)
    ribbon = Markup(loss_ribbon(found)).text
    for part in ("<script>alert(1)</script>", "\\x1b[31m\\x1b]0;title\\x07", "\\u202eabc\\u2066", "שלום עולם", "\\x0d↵\n\tb\\x00", "$x$ &amp; `c`"): assert part in ribbon
    assert "http" not in ribbon and "tex2jax_ignore" in loss_ribbon(found)


def test_half_characters_are_bytes_and_whole_ones_are_drawn_together():
    text, model = "😀好", small(65536, n_layer=1)
    ids = World().encode(text)
    found = read_losses(model, [0, *ids])
    assert b"".join(map(World().token_bytes, ids)) == text.encode() and any("\\x" in p for p in found.pieces)
    drawn = Markup(loss_ribbon(found))
    assert "😀好" in drawn.text and "\ufffd" not in drawn.text
    both = next(t for t in drawn.values("title") if "\\xf0\\x9f" in t)
    assert all(f"id {i} " in both for i in ids[:len(World().encode("😀"))])                      # one hover tells of all its tokens
    broken = Markup(loss_ribbon(read_losses(MODEL, [0, 0xe5 + 1, 66])))
    assert "\\xe5A" in broken.text
    assert spelled([65533], World()) == "id 65533" and spelled([300], Bytes()) == "id 300"


def test_a_model_that_believes_in_rows_without_a_token():
    model = small(65536, n_layer=1)
    with torch.no_grad(): model.head.weight[65533] = 50 * model.hidden(torch.tensor([[0, 33]]))[0][0, 1]
    found = read_losses(model, [0, 33, 34])
    assert found.top(1)[0] == ("id 65533", pytest.approx(1.0)) and "id 65533" in loss_ribbon(found)


CALLS = {"rwkv": ("System", "User", "Assistant"), "think": ("System", "User", "Assistant"), "bot": ("System", "User", "Bot"), "qa": ("System", "Question", "Answer"), "instruct": ("System", "Instruction", "Response"), "alpaca": ("", "Instruction", "Response")}


@pytest.mark.parametrize("template", CALLS)
@pytest.mark.parametrize("tokenizer", [Bytes(), World()], ids=["bytes", "world"])
def test_roles_are_those_of_the_turns(template, tokenizer):
    said = {"system": "sss", "user": "uuu", "assistant": "aaa"}
    turns = [{"role": role, "content": said[role], "weight": 1.} for role in ("system", "user", "assistant", "user", "assistant")]
    ids = encode_segments(TEMPLATES[template](turns), tokenizer).tokens.tolist()
    roles = roles_of(ids, tokenizer)
    for letters, role in zip(("sss", "uuu", "aaa"), CALLS[template]):
        text = [b for token, told in zip(ids, roles) for b in [told] * len(tokenizer.token_bytes(token))]
        places = [m.start() + k for m in re.finditer(letters.encode(), b"".join(map(tokenizer.token_bytes, ids))) for k in range(3)]
        assert places and {text[p] for p in places} == {role}
    assert roles[0] == "" and roles[-1] == CALLS[template][2] and len(roles) == len(ids)


@given(st.text(max_size=60), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_text_has_as_many_roles_as_tokens(text, begun):
    text = text.encode(errors="ignore").decode()
    ids = [0] * begun + Bytes().encode(text)
    assert len(roles_of(ids, Bytes())) == len(ids) and ("User:" in text or "Assistant:" in text or not any(roles_of(ids, Bytes())))
    assert roles_of(Bytes().encode("User: a"), Bytes()) == ["User"] * 7


def test_the_worst_rows_are_the_worst():
    texts = [[(("ask " * (k % 3)), 0.), ("answer %d %s" % (k, "x" * (k * 5 % 17)), 1.)] for k in range(23)]
    data = [encode_segments(segments, Bytes(), row=k + 1) for k, segments in enumerate(texts)] + [Example(torch.tensor([0, 66, 67]), torch.zeros(3)), Example(torch.tensor([0]), torch.zeros(1))]
    loss = lambda e: (cross_entropy(MODEL(e.tokens[None, :-1])[0][0], e.tokens[1:], reduction="none") * e.weights[1:]).sum().item() / e.weights[1:].sum().item()
    losses = {i: loss(e) for i, e in enumerate(data[:23])}
    worst = worst_rows(MODEL, data, n=5, micro_bsz=4)
    assert [r["i"] for r in worst] == sorted(losses, key=losses.get, reverse=True)[:5]
    assert [r["loss"] for r in worst] == pytest.approx(sorted(losses.values(), reverse=True)[:5], rel=1e-5)
    for r in worst:
        e = data[r["i"]]
        nats = cross_entropy(MODEL(e.tokens[None, :-1])[0][0], e.tokens[1:], reduction="none") * e.weights[1:]
        assert r["nats"] == pytest.approx(nats.max().item(), rel=1e-5) and r["piece"] == (chr(e.tokens[int(nats.argmax()) + 1] - 1) if e.tokens[int(nats.argmax()) + 1] else "∎")
    assert "2 rows without a trained token were left out" in worst._repr_html_() and f"{sum(losses.values()) / 23:.3f}" in repr(worst)
    few = worst_rows(MODEL, data, n=50, most=7)
    assert len(few) <= 7 and "looked at 7 of 25 rows" in repr(few)
    assert worst_rows(MODEL, data[23:]) == [] and worst_rows(MODEL, []) == [] and worst_rows(MODEL, []).notes == ()
    assert "rows" not in Markup(worst_rows(MODEL, [])._repr_html_()).text


def test_rows_are_named_as_the_data_set_names_them(tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert {r["row"] for r in worst_rows(MODEL, read_data(tmp_path / "my.jsonl", Bytes()))} == {f"{tmp_path}/my.jsonl line {n}" for n in (1, 3)}


def test_a_broken_model_is_shown_as_broken():
    model = small()
    with torch.no_grad(): model.head.weight[0] = math.nan
    found = read_losses(model, [0, 66, 67])
    assert found.nats.isnan().all()
    html = loss_ribbon(found)
    assert "underline dotted" in html and "the model is broken here" in html
    worst = worst_rows(model, [Example(torch.tensor([0, 66]), torch.tensor([0., 1.]))])
    assert math.isnan(worst[0]["loss"])


def test_a_ribbon_fades_and_scales_as_told():
    html = token_ribbon(["a", "b", "c"], [4., -1., 0.], faint=[True, False, True], top=4)
    assert html.count("<u ") == 1 and "underline dashed" in html and html.count("opacity:.65") == 2
    assert token_ribbon(["a"], [1.], top=4) != token_ribbon(["a"], [1.]) and token_ribbon(["a"], [9.], top=4) == token_ribbon(["a"], [4.], top=4)
    with pytest.raises(ValueError, match="2 of faint"): token_ribbon(["a"], [1.], faint=[True, False])
