"Any text through every shape, template and mask that fit each other: lossless, weighed byte by byte as another computation says, and never markup."
import re

import pytest
from hypothesis import given, settings, strategies as st

from markup import Markup
from rwkv_peft.data.chat import TEMPLATES, segments_of, template_for
from rwkv_peft.data.masks import LOSS_MASKS, check_mask, encode_row, mask_ids
from rwkv_peft.data.records import read_data, show_example
from rwkv_peft.data.rows import KEYS, DataError, check_row
from rwkv_peft.model.tokenizer import Bytes, World

TOKENIZERS = [Bytes(), World()]
FRAGMENTS = ["User:", "\nUser: ", "\n \u3000Assistant:", "\n\n", "User", ":", " ", "你好，世界。", "…\n", "。\n", "😀👩‍👩‍👧🇨🇳", "é\u0301", "\u200f\u202e", "\x00", "\x1b[31m", "\x17\x7f", "\r\n", "\r", "\u2028\x85", "\ufeff", "\ufffd", "\ue000", "∎", "∅",
             "<script>alert(1)</script>", "</u></div><img src=x onerror=alert(1)>", "&lt;", "&amp;#60;", "\" onmouseover='x'", "$x$", "✿", "<think>", "\n### Response:"]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=8).map("".join)
SAID = TEXT.filter(str.strip)
SE = {"mask0": "User", "mask1": "Assistant:"}


def messages(turns, system): return {"messages": [{"role": "system", "content": system}] * bool(system) + [{"role": role, "content": c} for t in turns for role, c in zip(("user", "assistant"), t)]}


RAW = {"text": st.builds(lambda t: {"text": t}, SAID),
       "pair": st.builds(lambda p, c: {"prompt": p, "completion": c}, TEXT | st.just(""), SAID),
       "instruct": st.builds(lambda i, x, o: {"instruction": i, "input": x, "output": o}, SAID, st.just("") | TEXT, SAID),
       "messages": st.builds(messages, st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3), st.just("") | SAID),
       "segments": st.builds(lambda s: {"segments": [{"label": label, "text": t} for label, t in s]}, st.lists(st.tuples(st.booleans(), SAID), min_size=1, max_size=4))}
SHAPES = [shape for shape in RAW if shape in KEYS]


def fits(shape, template, mask):
    try: return template_for(shape, template) and check_mask(mask, shape, SE if mask == "se" else None)
    except DataError: return None


CASES = [(s, t, m) for s in SHAPES for t in TEMPLATES for m in LOSS_MASKS if fits(s, t, m)]


def test_every_shape_template_and_mask_is_tried():
    assert set(KEYS) <= {*RAW, "ids"}
    assert {s for s, _, _ in CASES} == set(SHAPES) and {t for _, t, _ in CASES} == set(TEMPLATES) and {m for _, _, m in CASES} == set(LOSS_MASKS)
    assert all((s, t, m) in CASES for s in ("pair", "messages") for t in TEMPLATES for m in LOSS_MASKS)


def marked(text, mask):
    "The bytes of `text` that are trained between markers, line by line or character by character."
    if mask == "se":
        parts, state, out = re.split("(User|Assistant:)", text), 0, []
        for part in parts:
            state = {"User": 0, "Assistant:": 1}.get(part, state)
            out += [state] * len(part.encode())
        return out
    state, out = 0, []
    for line in text.split("\n"):
        begins = line.lstrip()
        state = 0 if begins.startswith("User:") else 1 if begins.startswith("Assistant:") else state
        out += [state] * (len(line.encode()) + 1)
    return out[:-1]


def trained_bytes(rendered, mask, weight):
    "The weight of every byte of the joined text."
    if mask in ("none", "pad", "all"): return [weight for text, _ in rendered for _ in text.encode()]
    if mask in ("qa", "se"): return [weight * t for t in marked("".join(t for t, _ in rendered), mask)]
    weights = [w for text, w in rendered for _ in text.encode()]
    if mask == "last":
        at = max((i for i, w in enumerate(weights) if w > 0), default=-1)
        while at >= 0 and weights[at] > 0: at -= 1
        weights[:at + 1] = [0.0] * (at + 1)
    return weights


def shown(text): return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text).replace("\r", "␍").replace("\n", "↵\n")


def holds(raw, shape, template, mask, tokenizer, weight=1.0, html=True):
    "One row, by every rule that this page tests."
    row = check_row({**raw, "weight": weight}, 7, "row 7")
    render = template_for(shape, template)
    rendered = segments_of(row, render, "row 7")
    text, data = "".join(t for t, _ in rendered), "".join(t for t, _ in rendered).encode()
    e = encode_row(row, render, mask, tokenizer, "row 7", SE if mask == "se" else None)
    ids, weights = e.tokens.tolist(), e.weights.tolist()
    assert ids == [0, *(i for t, _ in rendered for i in tokenizer.encode(t)), 0]                 # whatever the mask
    assert b"".join(map(tokenizer.token_bytes, ids)) == data and tokenizer.decode(ids) == text and "".join(t for t, _ in e.segments) == text
    byte, at, expected = trained_bytes(rendered, mask, weight), 0, [0.0]
    for i in ids[1:-1]:
        expected.append(byte[at])
        at += len(tokenizer.token_bytes(i))
    assert at == len(data) == len(byte) and weights == [*expected, byte[-1]] and (e.row, len(e.tokens)) == (7, len(e.weights))
    if html:
        seen = Markup(show_example(e, tokenizer, "row <b>7</b>"))
        assert set(seen.tags) <= {"div", "span", "u"} and {k for k, _ in seen.attributes} <= {"style", "title", "class"} and "row <b>7</b>" in seen.text
        drawn = seen.text.partition(" … and ")[0] if len(ids) > 3000 and " more tokens" in seen.text else None      # a long row is drawn in part
        assert seen.text.startswith("∎" + shown(text) + "∎") if drawn is None else len(drawn) > 2000 and ("∎" + shown(text)).startswith(drawn)
    return e


@settings(max_examples=700, deadline=None)
@given(st.data(), st.sampled_from(CASES), st.sampled_from(TOKENIZERS), st.sampled_from([1.0, .5, 0.0]))
def test_any_row(data, case, tokenizer, weight):
    holds(data.draw(RAW[case[0]]), *case, tokenizer, weight)


FIXED = {"text": lambda t: {"text": t}, "pair": lambda t: {"prompt": t, "completion": t}, "instruct": lambda t: {"instruction": t, "input": t, "output": t},
         "messages": lambda t: messages([(t, t), (t, t)], t), "segments": lambda t: {"segments": [{"label": False, "text": t}, {"label": True, "text": t}]}}


@pytest.mark.parametrize("shape, template", sorted({(s, t) for s, t, _ in CASES}))
def test_every_case_with_everything_in_it(shape, template):
    text = "a" + "".join(FRAGMENTS) + "\nAssistant: 好\nUser: b"
    for _, _, mask in [c for c in CASES if c[:2] == (shape, template)]:
        for tokenizer in TOKENIZERS: assert holds(FIXED[shape](text), shape, template, mask, tokenizer).trained


MEGABYTE = {"letters": "x" * 2**20, "characters": "你好😀\n" * (2**20 // 11), "turns": "User: a\nAssistant: b\n" * (2**20 // 21), "nul": "\x00\n" * 2**19, "spaces": " " * 2**20 + "Assistant:", "markup": "Assistant: " + "<script>" * 2**17}

@pytest.mark.parametrize("name, tokenizer, mask", [("letters", World(), "qa"), ("characters", World(), "se"), ("turns", World(), "qa"), ("turns", Bytes(), "se"), ("nul", Bytes(), "all"), ("nul", World(), "qa"), ("spaces", World(), "qa"), ("markup", World(), "qa")])
def test_texts_of_a_megabyte(name, tokenizer, mask):
    holds({"text": MEGABYTE[name]}, "text", "raw", mask, tokenizer, html=tokenizer.name == "world")


@pytest.mark.parametrize("name", ["characters", "markup"])
def test_turns_of_a_megabyte(name):
    holds(messages([(MEGABYTE[name], "yes"), ("why?", MEGABYTE[name])], ""), "messages", "rwkv", "last", World(), html=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 11, 261, 24281, 29956, 5585, 58683, 41693, 59, 65529]), max_size=12), max_size=5).map(lambda parts: sum(parts, [])), st.sampled_from(["none", "pad", "all", "qa", "se"]))
def test_any_ids(ids, mask):
    weights = mask_ids(ids, mask, World(), SE if mask == "se" else None)
    assert weights.shape == (len(ids),) and set(weights.tolist()) <= {0.0, 1.0} and (not ids or weights[0] == 0)
    if mask in ("none", "pad", "all"): assert weights.sum() == max(0, len(ids) - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(SAID, min_size=1, max_size=3), st.sampled_from(TOKENIZERS))
def test_a_data_set_of_anything_shows_and_reports_itself(texts, tokenizer):
    data = read_data([{"prompt": t, "completion": t} for t in texts], tokenizer)
    for html in (data.show(0), data.report()._repr_html_(), data.check()._repr_html_()):
        seen = Markup(html)
        assert not set(seen.tags) & {"script", "img", "think"} and not [a for a, _ in seen.attributes if a.startswith("on")]
