"Loss masks against slow computations that don't know the module: characters one by one, RWKV-PEFT's scan as its readers describe it, transcripts put together by hand."
import json
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rwkv_peft.data.chat import raw, rwkv
from rwkv_peft.data.masks import LOSS_MASKS, check_mask, encode_row, encode_segments, markers, mask_ids, mask_segments
from rwkv_peft.data.rows import DataError, Row, check_row
from rwkv_peft.model.tokenizer import Bytes, World

TOKENIZERS = [Bytes(), World()]
SE = {"mask0": "<|im_start|>user", "mask1": "<|im_start|>assistant"}
SEED = {"mask0": [24281, 59], "mask1": [5585, 41693, 59]}       # World's ids of User: and Assistant:
corpus = [json.loads(line)["messages"] for line in (Path(__file__).parent.parent / "rwkv_peft/demo/rows.jsonl").read_text(encoding="utf-8").splitlines()]
# conversations of one to four turns, in English and Chinese, made of the demo's question and answer pairs
talks = [[dict(m) for row in corpus[i:i + 1 + i % 4] for m in row] for i in range(0, 120, 5)]


def refused(*said): return pytest.raises(DataError, match=".*".join(map(re.escape, said)))


def slow_marks(text, off, on, lines):
    "For each character whether it is trained, by looking at every place for a marker."
    trained, state, i = [], False, 0
    while i < len(text):
        ends = i
        if lines and (i == 0 or text[i - 1] == "\n"):
            while ends < len(text) and text[ends].isspace() and text[ends] != "\n": ends += 1
        here = [(at + len(m), m) for at in range(i, ends + 1) for m in (off, on) if text.startswith(m, at)] if not lines or i == 0 or text[i - 1] == "\n" else []
        if here:
            end, marker = max(here, key=lambda h: (len(h[1]), h[0]))
            state = marker == on
            trained += [state] * (end - i)
            i = end
        else:
            trained.append(state)
            i += 1
    return trained


def by_first_byte(ids, trained, text, tokenizer):
    "Each token's weight from the character that holds its first byte."
    of_byte = [t for c, t in zip(text, trained) for _ in c.encode()]
    starts = accumulate((len(tokenizer.token_bytes(i)) for i in ids[:-1]), initial=0)
    return [float(of_byte[s]) for s in starts]


def transcript(talk):
    "The official form of a conversation and, for each message, where it stands with its header and where its own text is."
    text, spans = "", []
    for i, m in enumerate(talk):
        start = len(text)
        text += m["role"].title() + ":"
        own = len(text) + (m["role"] != "assistant")
        text += " " + m["content"]
        said = len(text)
        text += "\n\n" if i < len(talk) - 1 else ""
        spans.append((start, own, said, len(text)))
    return text, spans


def pieces_of(talk):
    "What is tokenised alone: everything up to each Assistant:, then what it says."
    text, spans = transcript(talk)
    cuts = sorted({0, len(text), *(c for m, (_, own, _, end) in zip(talk, spans) if m["role"] == "assistant" for c in (own, end))})
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


def expect(talk, trained, tokenizer):
    "(tokens, weights) of a transcript of which `trained` says the weight of each character."
    ids, weights, at = [], [], 0
    for piece in pieces_of(talk):
        new = tokenizer.encode(piece)
        ids, weights = ids + new, weights + by_first_byte(new, trained[at:at + len(piece)], piece, tokenizer)
        at += len(piece)
    return [0, *ids, 0], [0.0, *weights, float(trained[-1])]


def same(example, expected):
    assert (example.tokens.tolist(), example.weights.tolist()) == expected and example.tokens.dtype == torch.int64 and example.weights.dtype == torch.float32


# ---- a fixed corpus under every mask

@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@pytest.mark.parametrize("mask", LOSS_MASKS)
def test_conversations(mask, tokenizer):
    ids = SE if mask == "se" else None
    for talk in talks:
        text, spans = transcript(talk)
        trained = [mask in ("none", "pad", "all")] * len(text)
        for m, (_, own, _, end) in zip(talk, spans):
            if mask == "assistant" and m["role"] == "assistant": trained[own:end] = [True] * (end - own)
        if mask == "last": trained[spans[-1][1]:] = [True] * (len(text) - spans[-1][1])
        if mask in ("qa", "se"): trained = slow_marks(text, *(("User:", "Assistant:", True) if mask == "qa" else (*SE.values(), False)))
        same(encode_row(check_row({"messages": talk}, 1, "row 1"), rwkv, mask, tokenizer, mask_id=ids), expect(talk, trained, tokenizer))
    assert mask == "se" or any(trained)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@pytest.mark.parametrize("mask", ["none", "pad", "all", "qa", "se"])
def test_texts(mask, tokenizer):
    for i, talk in enumerate(talks):
        text = ("  " * (i % 2) + transcript(talk)[0]).replace("\n\nAss", "\n\n" + " \u3000" * (i % 3) + "Ass") + " So says User: and Assistant: too, User: does."
        if mask == "se": text = text.replace("User:", SE["mask0"] + " ").replace("Assistant:", SE["mask1"] + " ")
        trained = slow_marks(text, "User:", "Assistant:", True) if mask == "qa" else slow_marks(text, *SE.values(), False) if mask == "se" else [True] * len(text)
        ids = tokenizer.encode(text)
        e = encode_row(Row(1, "text", text), raw, mask, tokenizer, mask_id=SE if mask == "se" else None)
        same(e, ([0, *ids, 0], [0.0, *by_first_byte(ids, trained, text, tokenizer), float(trained[-1])]))
        assert any(trained) and "".join(t for t, _ in e.segments) == text
        if mask in ("qa", "se"): assert not all(trained)


def test_a_marker_may_begin_with_the_other():
    for names, trained in (({"mask0": "<b", "mask1": "<b>"}, "<b>c"), ({"mask0": "<b>", "mask1": "<b"}, "<be")):
        e = encode_row(Row(1, "text", "a<b>c<be"), raw, "se", Bytes(), mask_id=names)
        assert Bytes().decode(e.tokens[e.weights > 0].tolist()) == trained


# ---- ids, against the seed's scan

def seed_scan(window, real, off, on):
    "RWKV-PEFT's qa mask of a window of tokens of which `real` are a document's: aligned with what is predicted, so the first token has none."
    mask, state = [0] * len(window), 0
    for i in range(real):
        if window[i:i + len(off)] == off and i + len(off) <= real: state = 0
        elif window[i:i + len(on)] == on and i + len(on) <= real: state = 1
        mask[i] = state
    if not any(mask):
        for i in range(real - 1): mask[i] = 1
    return mask[1:]


def agrees_with_the_seed(ids, mask, off, on):
    seed, ours = seed_scan(ids + [0] * 5, len(ids), off, on), mask.tolist()
    found = any(ids[i:i + len(on)] == on and ids[i:i + len(off)] != off for i in range(len(ids)))
    if not found: seed[len(ids) - 2] = 1       # where nothing starts training the seed takes everything but the last token; that one counts here
    assert ours == [0, *seed[:len(ids) - 1]] and not any(seed[len(ids) - 1:])


def test_ids_follow_the_seed():
    for talk in talks + [talk[:1] for talk in talks]:
        ids = [*World().encode(transcript(talk)[0]), 0]
        for mask_id in (None, SEED): agrees_with_the_seed(ids, mask_ids(ids, "qa", World(), mask_id), *SEED.values())
        e = encode_row(Row(3, "ids", (ids, None)), raw, "qa", World())
        assert e.tokens.tolist() == ids and torch.equal(e.weights, mask_ids(ids, "qa", World())) and e.row == 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=40), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from(["qa", "se"]))
def test_any_pattern_follows_the_seed(ids, off, on, mask):
    if off == on: return
    agrees_with_the_seed(ids, mask_ids(ids, mask, None, {"mask0": off, "mask1": on}), off, on)


def test_ids_and_text_agree_where_tokens_can_tell():
    for talk in talks:
        for text in (transcript(talk)[0], " " + transcript(talk)[0].replace("User", "Human").replace("Assistant", "AI").replace("。\n\nAI", "。\n AI")):
            names = None if "User" in text else {"mask0": "Human:", "mask1": "AI:"}
            e = encode_row(Row(1, "text", text), raw, "qa", World(), mask_id=names)
            assert torch.equal(mask_ids(e.tokens, "qa", World(), names)[:-1], e.weights[:-1]) and 0 < e.trained < e.length


def test_a_space_before_a_marker_counts_where_a_line_begins():
    world = World()
    ids = world.encode("x Assistant: a") + [0] + world.encode(" Assistant: b User: c")
    assert world.decode([t for t, w in zip(ids, mask_ids(ids, "qa", world)) if w]) == " Assistant: b User: c"
    assert mask_ids(ids, "qa", world, SEED).tolist() == [0] + [1] * (len(ids) - 1)             # the seed finds nothing and takes all


def test_own_weights_of_ids():
    row = Row(1, "ids", ([5, 6, 7, 8, 9, 9], [0.0, 1.0, 0.0, 0.5, 1.0, 0.0]), 2.0)
    weights = lambda mask, mask_id=None: encode_row(row, raw, mask, None, mask_id=mask_id).weights.tolist()
    for mask in ("none", "pad", "all", "assistant"): assert weights(mask) == [0, 2, 0, 1, 2, 0]
    assert weights("last") == [0, 0, 0, 1, 2, 0]
    assert weights("se", {"mask0": [9], "mask1": [6]}) == [0, 2, 0, 1, 0, 0]
    assert encode_row(Row(1, "ids", ([5, 6], [1.0, 1.0])), raw, "last", None).weights.tolist() == [0, 1]
    with refused("row 4", "'last' needs 'labels'"): encode_row(Row(4, "ids", ([5, 6], None)), raw, "last", None, "row 4")


# ---- messages that aren't trained

def weighed(talk, weights, mask, template=rwkv, tokenizer=Bytes()):
    row = {"messages": [{**m, "weight": w} for m, w in zip(talk, weights)]}
    return encode_row(check_row(row, 1, "row 1"), template, mask, tokenizer)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@pytest.mark.parametrize("mask", ["none", "pad", "all", "assistant", "last", "qa"])
def test_own_weights_of_messages(mask, tokenizer):
    for n, talk in enumerate(talks):
        talk = [{"role": "system", "content": "Be brief. 简短。"}, *talk] if n % 2 else talk
        weights = [[1, 0, .5, 2][(n + 3 * i) % 4] for i in range(len(talk))]
        text, spans = transcript(talk)
        trained = [1.0] * len(text) if mask in ("none", "pad", "all") else [float(t) for t in slow_marks(text, "User:", "Assistant:", True)]
        for m, w, (_, own, said, end) in zip(talk, weights, spans):
            if m["role"] == "assistant": said = end      # the end of a turn belongs to the answer
            trained[own:said] = [w if mask in ("assistant", "last") and m["role"] == "assistant" else w * t for t in trained[own:said]]
        if mask in ("assistant", "last"):
            answers = [(own, end, w) for m, w, (_, own, _, end) in zip(talk, weights, spans) if m["role"] == "assistant" and w]
            trained = [0.0] * len(text)
            for own, end, w in answers[-1:] if mask == "last" else answers: trained[own:end] = [float(w)] * (end - own)
        same(weighed(talk, weights, mask, tokenizer=tokenizer), expect(talk, trained, tokenizer))


def test_an_untrained_end_is_not_an_end_to_learn():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert weighed(talk, [1, 0], "all").weights[-1] == 0 and weighed(talk, [1, 1], "all").weights[-1] == 1
    assert not weighed(talk, [1, 0], "last").trained


def test_own_weights_with_a_template_of_ones_own():
    talk = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    template = lambda ms: [(f"<{m['role']}>{m['content']}</>", m["role"] == "assistant" and m["weight"]) for m in ms]
    def kept(weights, template=template):
        e = weighed(talk, weights, "all", template)
        return Bytes().decode(e.tokens[e.weights > 0].tolist())
    assert kept([0, 1]) == "<user></><assistant>say</>" and kept([1, 0]) == "<user>ask</>"
    assert weighed(talk, [1, .5], "all", template).weights.tolist() == [0] + [1] * 12 + [.5] * 18
    assert kept([0, 1], lambda ms: [(ms[-1]["content"], True)]) == "say"                      # what isn't shown needs no mask
    twice = lambda ms: [(f"{ms[0]['content']} {ms[0]['content']}: ", False), (ms[1]["content"], True)]
    assert kept([0, 1], twice) == ": say"
    assert weighed(talk, [0, 1], "all", raw).segments == (("ask", 0.0), ("say", 1.0))
    longer = lambda ms: [(f"{len(ms[0]['content'])} letters: {ms[0]['content']}", False), (ms[1]["content"], True)]
    with refused("row message 1", "can't be placed", "'assistant'"): weighed(talk, [0, 1], "all", longer)
    moody = lambda ms: [("a" if ms[1]["weight"] else "b", 1)]
    with refused("row: the template writes another text", "'assistant'"): weighed(talk, [1, 0], "all", moody)


# ---- tokens never depend on the mask

def test_a_token_on_the_border_follows_its_first_byte():
    world = World()
    text = "…\n…\n"
    assert [world.token_bytes(t).decode() for t in world.encode(text)] == ["…\n", "…\n"]
    e = encode_row(Row(1, "text", text), raw, "se", world, mask_id={"mask0": "no", "mask1": "\n…"})
    assert e.tokens.tolist() == [0, *world.encode(text), 0] and e.weights.tolist() == [0, 0, 1, 1]


def test_pieces_must_be_the_text():
    assert encode_segments([("a", 1), ("b", 0)], Bytes(), pieces=["ab"]).tokens.tolist() == [0, 98, 99, 0]
    assert encode_segments([], Bytes(), pieces=[]).tokens.tolist() == [0, 0]
    for pieces in (["abc"], ["ac"], ["a", "b", "c"], ["a"], []):
        with refused("another text"): encode_segments([("a", 1), ("b", 0)], Bytes(), pieces=pieces)
    with refused("run over a border"): encode_segments([("ab", 1)], Bytes(), pieces=["a", "b"])


def test_a_tokenizer_that_loses_bytes_is_refused():
    class Lossy(Bytes):
        def token_bytes(self, id): return b"?" * (id % 2)
    with refused("row 2", "token_bytes give 1 of 2 bytes"): encode_row(Row(2, "text", "ab"), raw, "se", Lossy(), "row 2", {"mask0": "a", "mask1": "b"})
    assert encode_row(Row(2, "text", "ab"), raw, "all", Lossy()).trained == 3                  # nothing to place


# ---- what is refused

@pytest.mark.parametrize("mask_id, said", [
    (None, ("'se' needs mask_id", "mask0")), ("<bot>", ("mask_id=<bot>", "two keys")), ({"mask0": "a"}, ("two keys",)), ({"mask0": "a", "mask1": "b", "mask2": "c"}, ("two keys",)),
    ({"mask0": "", "mask1": "b"}, ("'mask0'", "not empty")), ({"mask0": "a", "mask1": []}, ("'mask1'", "not empty")), ({"mask0": "a", "mask1": 5}, ("'mask1'", "a text or a list of ids")),
    ({"mask0": "a", "mask1": [True]}, ("'mask1'", "list of ids")), ({"mask0": "a", "mask1": ["b"]}, ("'mask1'",)), ({"mask0": "a", "mask1": "a"}, ("twice", "differ")), ({"mask0": [1], "mask1": "b"}, ("only rows of ids",))])
def test_markers_that_are_refused(mask_id, said):
    with refused(*said): check_mask("se", "text", mask_id)
    with pytest.raises(DataError) as e: markers("se", mask_id)
    assert "\n" not in str(e.value)
    if mask_id is not None:
        with refused(*said): check_mask("qa", "messages", mask_id)


def test_masks_that_are_refused():
    for shape in ("text", "pair", "instruct", "messages", "segments", "ids"):
        usual = check_mask(None, shape)
        assert usual == ("none" if shape in ("text", "ids") else "assistant") and check_mask(usual, shape) == usual
        with refused("did you mean 'assistant'", "none, pad, qa, se, assistant, last, all"): check_mask("asistant", shape)
        with refused("mask_id is read by", "leave mask_id out"): check_mask(None, shape, SE)
        for mask in LOSS_MASKS:
            if shape == "text" and mask in ("assistant", "last"):
                with refused(mask, "turns"): check_mask(mask, shape)
            else: assert check_mask(mask, shape, SE if mask == "se" else None) == mask
    assert check_mask("se", "ids", SEED) == "se"
    with refused("'assistant' can't be seen from ids"): mask_ids([1, 2], "assistant")
    with refused("row 9", "half of a surrogate"): encode_row(Row(9, "text", "\ud800"), raw, "qa", Bytes(), "row 9")


def test_segments_are_never_changed_in_place():
    segments = [("User: a\n", 0.0), ("Assistant: b", 1.0)]
    for mask in LOSS_MASKS: mask_segments(segments, mask, .5, SE if mask == "se" else None)
    assert segments == [("User: a\n", 0.0), ("Assistant: b", 1.0)]
