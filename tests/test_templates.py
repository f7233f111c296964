"Templates against texts written by hand and against Jinja; the linter on rows that are wrong in one way each."
import json
import re

import jinja2
import pytest
from hypothesis import given, settings, strategies as st

from rwkv_peft.data.chat import STOPS, TEMPLATES, lint, merged_borders, prompt_of, segments_of, template_for, tools_text
from rwkv_peft.data.masks import encode_segments
from rwkv_peft.data.rows import DataError, Row
from rwkv_peft.model.sample import release
from rwkv_peft.model.tokenizer import Bytes, World

WORLD = World()
TRAINED = re.compile(r"⟦(.*?)⟧", re.S)


def said(role, content="", **more): return {"role": role, "content": content, "weight": 1.0, **more}


def marked(segments):
    "One text, with ⟦ and ⟧ around what is trained."
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in segments)


CALL = [{"name": "f", "arguments": '{"a": "é"}'}, {"name": "g", "arguments": "{}"}]
TALKS = {
    "one": [said("user", "2+2?"), said("assistant", "4")],
    "many": [said("user", "Hi\n\n\nthere "), said("assistant", "A\n\nB "), said("user", "c"), said("assistant", "d")],
    "system": [said("system", "Be\n\nbrief."), said("user", "q"), said("assistant", "a")],
    "no system": [said("system", " \n"), said("user", "q"), said("assistant", "a"), said("system", "")],
    "cjk": [said("user", "你好。\n\n在吗？"), said("assistant", "在。\n\n请说。"), said("user", "谢谢"), said("assistant", "不客气")],
    "crlf": [said("user", "a\r\n\r\nb\rc"), said("assistant", "d\r\ne\r\n")],
    "open": [said("user", "a"), said("assistant", "b"), said("user", "c")],
    "input": [said("user", "Sum.", input="1\n\n2"), said("assistant", "3")],
    "reasoning": [said("user", "q"), said("assistant", "a", reasoning=" r\n\ns\r\n"), said("user", "p"), said("assistant", "b")],
    "inline": [said("user", "q"), said("assistant", "<think>\nr\n</think>\n\na")],
    "tools": [said("user", "q"), said("assistant", "", tool_calls=CALL), said("tool", '{"x":\n\n1}'), said("assistant", "a")],
}
BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n"
CALLED = '```json\n{"name": "f", "arguments": {"a": "é"}}\n```\n```json\n{"name": "g", "arguments": {}}\n```'
FAKE = "Assistant: <think>\n</think"
EXPECTED = {
    "rwkv": {
        "one": "User: 2+2?\n\nAssistant:⟦ 4⟧",
        "many": "User: Hi\nthere\n\nAssistant:⟦ A\n\nB\n\n⟧User: c\n\nAssistant:⟦ d⟧",
        "system": "System: Be\nbrief.\n\nUser: q\n\nAssistant:⟦ a⟧",
        "no system": "User: q\n\nAssistant:⟦ a⟧",
        "cjk": "User: 你好。\n在吗？\n\nAssistant:⟦ 在。\n\n请说。\n\n⟧User: 谢谢\n\nAssistant:⟦ 不客气⟧",
        "crlf": "User: a\nb\nc\n\nAssistant:⟦ d\ne⟧",
        "open": "User: a\n\nAssistant:⟦ b\n\n⟧User: c",
        "input": "User: Sum.\n1\n2\n\nAssistant:⟦ 3⟧",
        "inline": "User: q\n\nAssistant:⟦ <think>\nr\n</think>\n\na⟧",
        "tools": f'User: q\n\nAssistant:⟦ {CALLED}\n\n⟧User: Function output:\n{{"x":\n1}}\n\nAssistant:⟦ a⟧'},
    "think": {
        "one": f"User: 2+2?\n\n{FAKE}⟦>\n4⟧",
        "system": f"System: Be\nbrief.\n\nUser: q\n\n{FAKE}⟦>\na⟧",
        "cjk": f"User: 你好。\n在吗？\n\n{FAKE}⟦>\n在。\n\n请说。\n\n⟧User: 谢谢\n\n{FAKE}⟦>\n不客气⟧",
        "crlf": f"User: a\nb\nc\n\n{FAKE}⟦>\nd\ne⟧",
        "reasoning": f"User: q\n\nAssistant: <think⟦>\nr\n\ns\n</think>\na\n\n⟧User: p\n\n{FAKE}⟦>\nb⟧",
        "inline": "User: q\n\nAssistant: <think⟦>\nr\n</think>\na⟧",
        "tools": f'User: q\n\n{FAKE}⟦>\n{CALLED}\n\n⟧User: Function output:\n{{"x":\n1}}\n\n{FAKE}⟦>\na⟧'},
    "fake_think": {
        "many": f"User: Hi\nthere\n\n{FAKE}⟦>\nA\n\nB\n\n⟧User: c\n\n{FAKE}⟦>\nd⟧",
        "no system": f"User: q\n\n{FAKE}⟦>\na⟧",
        "reasoning": f"User: q\n\n{FAKE}⟦>\na\n\n⟧User: p\n\n{FAKE}⟦>\nb⟧",
        "inline": f"User: q\n\n{FAKE}⟦>\na⟧",
        "tools": f'User: q\n\n{FAKE}⟦>\n{CALLED}\n\n⟧User: Function output:\n{{"x":\n1}}\n\n{FAKE}⟦>\na⟧'},
    "bot": {
        "one": "User✿2+2?✿\nBot✿⟦4✿⟧",
        "many": "User✿Hi\nthere✿\nBot✿⟦A\n\nB✿⟧\nUser✿c✿\nBot✿⟦d✿⟧",
        "system": "System✿Be\nbrief.✿\nUser✿q✿\nBot✿⟦a✿⟧",
        "no system": "User✿q✿\nBot✿⟦a✿⟧",
        "cjk": "User✿你好。\n在吗？✿\nBot✿⟦在。\n\n请说。✿⟧\nUser✿谢谢✿\nBot✿⟦不客气✿⟧",
        "crlf": "User✿a\nb\nc✿\nBot✿⟦d\ne✿⟧",
        "open": "User✿a✿\nBot✿⟦b✿⟧\nUser✿c✿",
        "reasoning": "User✿q✿\nBot✿<think⟦>\nr\n\ns\n</think>\na✿⟧\nUser✿p✿\nBot✿⟦b✿⟧",
        "tools": f'User✿q✿\nBot✿⟦{CALLED}✿⟧\nUser✿Function output:\n{{"x":\n1}}✿\nBot✿⟦a✿⟧'},
    "instruct": {
        "one": "Instruction: 2+2?\n\nResponse:⟦ 4⟧",
        "many": "Instruction: Hi\nthere\n\nResponse:⟦ A\n\nB\n\n⟧Instruction: c\n\nResponse:⟦ d⟧",
        "system": "System: Be\nbrief.\n\nInstruction: q\n\nResponse:⟦ a⟧",
        "no system": "Instruction: q\n\nResponse:⟦ a⟧",
        "cjk": "Instruction: 你好。\n在吗？\n\nResponse:⟦ 在。\n\n请说。\n\n⟧Instruction: 谢谢\n\nResponse:⟦ 不客气⟧",
        "crlf": "Instruction: a\nb\nc\n\nResponse:⟦ d\ne⟧",
        "input": "Instruction: Sum.\n\nInput: 1\n2\n\nResponse:⟦ 3⟧"},
    "qa": {
        "one": "Question: 2+2?\n\nAnswer:⟦ 4⟧",
        "many": "Question: Hi\nthere\n\nAnswer:⟦ A\n\nB\n\n⟧Question: c\n\nAnswer:⟦ d⟧",
        "system": "System: Be\nbrief.\n\nQuestion: q\n\nAnswer:⟦ a⟧",
        "no system": "Question: q\n\nAnswer:⟦ a⟧",
        "cjk": "Question: 你好。\n在吗？\n\nAnswer:⟦ 在。\n\n请说。\n\n⟧Question: 谢谢\n\nAnswer:⟦ 不客气⟧",
        "crlf": "Question: a\nb\nc\n\nAnswer:⟦ d\ne⟧"},
    "alpaca": {
        "one": BELOW + "### Instruction:\n2+2?\n\n### Response:⟦4\n\x17⟧",
        "many": BELOW + "### Instruction:\nHi\n\n\nthere \n\n### Response:⟦A\n\nB \n\x17⟧\n\n### Instruction:\nc\n\n### Response:⟦d\n\x17⟧",
        "system": "Be\n\nbrief.\n\n### Instruction:\nq\n\n### Response:⟦a\n\x17⟧",
        "no system": BELOW + "### Instruction:\nq\n\n### Response:⟦a\n\x17⟧",
        "cjk": BELOW + "### Instruction:\n你好。\n\n在吗？\n\n### Response:⟦在。\n\n请说。\n\x17⟧\n\n### Instruction:\n谢谢\n\n### Response:⟦不客气\n\x17⟧",
        "crlf": BELOW + "### Instruction:\na\r\n\r\nb\rc\n\n### Response:⟦d\r\ne\r\n\n\x17⟧",
        "input": INPUT + "### Instruction:\nSum.\n\n### Input:\n1\n\n2\n\n### Response:⟦3\n\x17⟧"},
    "raw": {
        "one": "2+2?⟦4⟧", "many": "Hi\n\n\nthere ⟦A\n\nB ⟧c⟦d⟧", "cjk": "你好。\n\n在吗？⟦在。\n\n请说。⟧谢谢⟦不客气⟧", "crlf": "a\r\n\r\nb\rc⟦d\r\ne\r\n⟧", "system": "Be\n\nbrief.q⟦a⟧"}}


@pytest.mark.parametrize("name, talk", [(name, talk) for name, texts in EXPECTED.items() for talk in texts])
def test_texts_and_masks(name, talk):
    segments = TEMPLATES[name](TALKS[talk])
    assert marked(segments) == EXPECTED[name][talk]
    if name != "raw": assert all(bool(w) != bool(v) for (_, w), (_, v) in zip(segments, segments[1:])), "what isn't trained is one piece"
    for tokenizer in (WORLD, Bytes()):
        e = encode_segments(segments, tokenizer)
        assert tokenizer.decode(e.tokens[e.weights > 0].tolist()) == "".join(TRAINED.findall(EXPECTED[name][talk]))
        assert tokenizer.decode(e.tokens.tolist()) == re.sub("[⟦⟧]", "", EXPECTED[name][talk])


def test_a_flower_of_the_users_ends_no_turn():
    assert marked(TEMPLATES["bot"]([said("system", "✿"), said("user", "a✿\nBot✿b"), said("assistant", "c")])) == "System✿❀✿\nUser✿a❀\nBot❀b✿\nBot✿⟦c✿⟧"


@pytest.mark.parametrize("name, talk, words", [
    *[(n, "tools", ["message 2", "'tool_calls'", n, "'rwkv'"]) for n in ("instruct", "qa", "alpaca", "raw")],
    *[(n, "reasoning", ["message 2", "reasoning", n, "'think'", "'fake_think'"]) for n in ("rwkv", "instruct", "qa", "alpaca", "raw")]])
def test_what_a_form_has_no_place_for_is_refused(name, talk, words):
    with pytest.raises(DataError) as e: segments_of(Row(7, "messages", TALKS[talk]), TEMPLATES[name], "my.jsonl line 7")
    assert all(word in str(e.value) for word in ["my.jsonl line 7", *words])


def test_weights_of_messages_and_rows():
    talk = [said("user", "a"), said("assistant", "b", weight=0.0), said("user", "c"), said("assistant", "d", weight=0.5)]
    for name, template in TEMPLATES.items():
        weights = [w for _, w in segments_of(Row(1, "messages", talk, 0.5), template)]
        assert weights == [0, 0, 0, 0.25], name


def test_rows_of_every_shape():
    pair, task = Row(1, "pair", ("q", "a"), 2.0), Row(1, "instruct", ("i", "x", "o"))
    assert segments_of(pair, TEMPLATES["qa"]) == [("Question: q\n\nAnswer:", 0), (" a", 2)] and segments_of(pair, template_for("pair")) == [("q", 0), ("a", 2)]
    assert segments_of(task, template_for("instruct")) == [("Instruction: i\n\nInput: x\n\nResponse:", 0), (" o", 1)]
    assert segments_of(Row(1, "instruct", ("i", "", "o")), TEMPLATES["alpaca"]) == [(BELOW + "### Instruction:\ni\n\n### Response:", 0), ("o\n\x17", 1)]
    assert segments_of(Row(1, "segments", [("a", 0.5), ("", 1.0), ("b", 1.0)], 2.0), template_for("segments")) == [("a", 1), ("b", 2)]
    assert segments_of(Row(1, "text", "t", 0.5), template_for("text")) == [("t", 0.5)]
    with pytest.raises(DataError, match="row 3 is token ids"): segments_of(Row(3, "ids", ([1], None)), TEMPLATES["raw"], "row 3")
    for shape in ("text", "segments", "ids"):
        with pytest.raises(DataError, match=f"rows of {shape} have none"): template_for(shape, "rwkv")
    seen = []
    assert segments_of(task, lambda messages: seen.extend(messages) or [("x", True)]) == [("x", 1.0)]
    assert [(m["role"], m["content"], m.get("input"), m["weight"]) for m in seen] == [("user", "i", "x", 1.0), ("assistant", "o", None, 1.0)]


@pytest.mark.parametrize("word, near", [("rkwv", "rwkv"), ("fake think", "fake_think"), ("Alpaca", "alpaca"), ("thinking", "think"), ("chatml", None), (3, None)])
def test_a_word_that_isnt_known(word, near):
    with pytest.raises(DataError) as e: template_for("messages", word)
    assert repr(word) in str(e.value) and "'instruct'" in str(e.value) and ("did you mean" in str(e.value)) == bool(near) and (not near or f"did you mean {near!r}?" in str(e.value))


def test_tools_are_listed_in_the_system_turn():
    f = {"name": "f", "description": "Looks\n\nit up.", "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}, "x": {}}, "required": ["a"]}}
    wanted = "Tools:\n- f(a: string, n?: integer, x?: any): Looks\nit up.\n- g()"
    assert tools_text([{"type": "function", "function": f}, {"name": "g"}]) == wanted
    talk = [said("system", "", tools=[f, {"name": "g"}]), said("user", "q"), said("assistant", "a")]
    assert marked(TEMPLATES["rwkv"](talk)) == f"System: {wanted}\n\nUser: q\n\nAssistant:⟦ a⟧"
    assert marked(TEMPLATES["bot"]([said("system", "Brief.", tools=[{"name": "g"}]), *talk[1:]])) == "System✿Brief.\nTools:\n- g()✿\nUser✿q✿\nBot✿⟦a✿⟧"
    with pytest.raises(DataError, match="'tools'"): TEMPLATES["qa"](talk)


def test_a_call_can_be_read_back():
    arguments = {"text": "```json\n\"é你\\", "n": [1, None]}
    talk = [said("user", "q"), said("assistant", "Calling.", tool_calls=[{"name": 'a"b', "arguments": json.dumps(arguments, ensure_ascii=False)}])]
    [text] = TRAINED.findall(marked(TEMPLATES["rwkv"](talk)))
    assert text.startswith(" Calling.\n```json\n") and text.endswith("\n```")
    assert json.loads(text.split("\n", 2)[2].removesuffix("\n```")) == {"name": 'a"b', "arguments": arguments}


# ---- the official forms as Jinja templates, and any conversation

OFFICIAL = {
    "rwkv": "{% for m in messages %}{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m.role] }}: {{ m.content }}{{ '' if loop.last else '\\n\\n' }}{% endfor %}{{ '\\n\\nAssistant:' if ask }}",
    "bot": "{% for m in messages %}{{ {'system': 'System', 'user': 'User', 'assistant': 'Bot'}[m.role] }}✿{{ m.content }}✿{{ '' if loop.last else '\\n' }}{% endfor %}{{ '\\nBot✿' if ask }}"}
OFFICIAL = {name: jinja2.Environment(keep_trailing_newline=True).from_string(text) for name, text in OFFICIAL.items()}
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\n\r ✿你")), max_size=25)
ANSWER = TEXT.map(lambda t: t + ".")
WORDS = TEXT.filter(str.strip)


def cleaned(role, text):
    text = text.replace("\r\n", "\n")
    return text.strip() if role == "assistant" else re.sub("\n\n+", "\n", text.replace("\r", "\n")).strip()


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.lists(st.tuples(WORDS, ANSWER), min_size=1, max_size=3))
def test_any_conversation(system, turns):
    talk = [said("system", "Be\n\nkind.")] * system + [m for u, a in turns for m in (said("user", u), said("assistant", a))]
    clean = [{"role": m["role"], "content": cleaned(m["role"], m["content"])} for m in talk]
    answers = [m["content"] for m in clean if m["role"] == "assistant"]
    for name in ("rwkv", "bot"):
        flowers = [m if name == "rwkv" or m["role"] == "assistant" else {**m, "content": m["content"].replace("✿", "❀")} for m in clean]
        segments = TEMPLATES[name](talk)
        assert "".join(t for t, _ in segments) == OFFICIAL[name].render(messages=flowers)
        assert prompt_of(talk[:-1], name) == OFFICIAL[name].render(messages=flowers[:-1], ask=True)
        ends = ["\n\n"] * (len(answers) - 1) + [""] if name == "rwkv" else ["✿"] * len(answers)
        assert [t for t, w in segments if w] == [" " * (name == "rwkv") + a + e for a, e in zip(answers, ends)]
    for name, template in TEMPLATES.items():
        segments = template(talk)
        e = encode_segments(segments, WORLD)
        assert WORLD.decode(e.tokens.tolist()) == "".join(t for t, _ in segments) and len(e.tokens) == len(e.weights)
        assert WORLD.decode(e.tokens[e.weights > 0].tolist()) == "".join(t for t, w in segments if w)
        asked = prompt_of(talk[:-1], name, thinking=False)
        assert "".join(t for t, _ in segments).startswith(asked) and segments[-1][1] == 1
        if name in ("rwkv", "think", "fake_think", "instruct", "qa"):      # the only blank lines that nobody trained are those between turns
            assert sum(t.count("\n\n") for t, w in segments if not w) == sum(m["role"] != "assistant" for m in clean)
        lint(segments, WORLD)


def test_prompts_are_those_that_were_trained():
    for name in TEMPLATES:
        for talk in ("one", "many", "system", "cjk", "crlf"):
            text = marked(TEMPLATES[name](TALKS[talk]))
            assert prompt_of(TALKS[talk][:-1], name, thinking=False) == re.sub("[⟦⟧]", "", text[:text.rindex("⟦")])
    assert prompt_of([{"role": "user", "content": "q"}], "think") == "User: q\n\nAssistant: <think" and prompt_of([{"role": "user", "content": "q"}], "bot", thinking=True) == "User✿q✿\nBot✿<think"
    with pytest.raises(DataError, match="by hand"): prompt_of([said("user", "q")], lambda messages: [("a", True), ("b", False)])


def test_generation_stops_where_a_turn_was_trained_to_end():
    for name, stops in STOPS.items():
        text = marked(TEMPLATES[name](TALKS["many"]))
        shown, _, met = release(re.sub("[⟦⟧]", "", text[text.index("⟦"):]), tuple(stops))
        assert met == (name != "raw") and (not met or shown.strip(" \n>") == "A\n\nB")


# ---- real rows in two languages

@pytest.mark.parametrize("language", ["english", "chinese"])
def test_real_rows_through_every_template(corpus_cache, language):
    from rwkv_peft.bench.corpus import SOURCES, chat_pairs
    pairs = chat_pairs(corpus_cache / next(s.archive for s in SOURCES if s.name == "chat"), language)
    assert len(pairs) > 400
    written = {"rwkv": "User: {}\n\nAssistant:⟦ {}⟧", "think": f"User: {{}}\n\n{FAKE}⟦>\n{{}}⟧", "fake_think": f"User: {{}}\n\n{FAKE}⟦>\n{{}}⟧", "bot": "User✿{}✿\nBot✿⟦{}✿⟧", "instruct": "Instruction: {}\n\nResponse:⟦ {}⟧",
               "qa": "Question: {}\n\nAnswer:⟦ {}⟧", "alpaca": BELOW + "### Instruction:\n{}\n\n### Response:⟦{}\n\x17⟧", "raw": "{}⟦{}⟧"}
    assert written.keys() == TEMPLATES.keys()
    for name, template in TEMPLATES.items():
        for p in pairs:
            segments = segments_of(Row(1, "pair", (p.question, p.answer)), template)
            assert marked(segments) == written[name].format(p.question, p.answer)
            e = encode_segments(segments, WORLD)
            assert WORLD.decode(e.tokens[e.weights > 0].tolist()) == TRAINED.search(marked(segments))[1]
            if name != "raw": assert not lint(segments, WORLD), p


# ---- the linter: each rule with a row that breaks it and one that is close and doesn't

PROMPT = ("User: q\n\nAssistant:", 0.0)
@pytest.mark.parametrize("words, wrong, right", [
    ("holds \ufffd", [("a\ufffdb", 1)], [("a\\ufffdb", 1)]),
    ("mixes chat forms: rwkv, ChatML", [("User: q\n\nAssistant:", 0), (" a<|im_end|>\n", 1)], [("User: what is <|im_endless|>?\n\nAssistant:", 0), (" a", 1)]),
    ("mixes chat forms: rwkv, bot", [("User: q\n\nAssistant:", 0), (" a\nUser✿b", 1)], [("User: I like ✿ a lot\n\nAssistant:", 0), (" a", 1)]),
    ("single line break", [("User: q\nAssistant:", 0), (" a", 1)], [("User: q\n\nAssistant:", 0), (" a User: b", 1)]),
    ("mixes chat forms: rwkv, alpaca", [("User: ### Instruction:\nq\n### Response:\n\nAssistant:", 0), (" a", 1)], [PROMPT, (" a\n### Response time\nfast", 1)]),
    ("rwkv, qa", [("Question: q\n\nAnswer: a\n\nUser: b\n\nAssistant:", 0), (" c", 1)], [PROMPT, (" 1 + 1\n\nAnswer: 2", 1)]),
    ("instruct, Gemma", [("Instruction: q<end_of_turn>\n\nResponse:", 0), (" a", 1)], [PROMPT, (" do\n\nInstruction: x", 1)]),
    ("a blank line inside a User turn: …q⏎⏎r…", [("User: q\n\nr\n\nAssistant:", 0), (" a", 1)], [PROMPT, (" a\n\nb\n\n", 1), ("User: r\n\nAssistant:", 0), (" c", 1)]),
    ("a blank line inside a System turn", [("System: x\n\ny\n\nUser: q\n\nAssistant: a", 1)], [("System: x\n\nUser: q\n\nAssistant: a\n\nb", 1)]),
    ("a blank line inside a Question turn", [("Question: x\n\ny\n\nAnswer:", 0), (" z", 1)], [("Question: x\ny\n\nAnswer:", 0), (" z\n\nw", 1)]),
    ("a blank line inside a Input turn", [("Instruction: i\n\nInput: x\n\ny\n\nResponse:", 0), (" z", 1)], [("Instruction: i\n\nInput: x\ny\n\nResponse:", 0), (" z", 1)]),
    ("a prompt ends in 'Assistant: '", [("User: q\n\nAssistant: ", 0), ("(a)", 1)], [PROMPT, (" (a)", 1)]),
    ("no space between 'Assistant:' and 'a'", [PROMPT, ("a", 1)], [("### Response:", 0), ("a\n\x17", 1)]),
    ("the prompt runs into the completion: …is LoRA?|A thin…", [("is LoRA?", 0), ("A thin", 1)], [("is LoRA?\n", 0), ("A thin", 1)]),
    ("holds '\\n\\nUser:', where generation stops", [PROMPT, (" a\n\nUser: b", 1)], [PROMPT, (" a\n\nusers: b\n\n", 1), ("User: c\n\nAssistant:", 0), (" d", 1)]),
    ("holds '✿', where generation stops", [("User✿q✿\nBot✿", 0), ("a✿b✿", 1)], [("User✿q✿\nBot✿", 0), ("a✿", 1)]),
    ("'<think' must follow", [("User: q\n\nAssistant:<think", 0), (">\nr\n</think>\na", 1)], [("User: q\n\nAssistant: <think", 0), (">\nr\n</think>\na", 1)]),
    ("never closes it", [("User: q\n\nAssistant: <think", 0), (">\nr and a", 1)], [("User: q\n\nAssistant: <think>\n</think", 0), (">\na", 1)]),
    ("ends in </s>", [PROMPT, (" a</s>\n", 1)], [PROMPT, (" <s>a</s> b", 1)]),
])
def test_lint(words, wrong, right):
    assert any(words in found for found in lint(wrong)), lint(wrong)
    assert lint(right) == []


def test_lint_looks_at_ends_and_borders():
    good = [PROMPT, (" a", 1)]
    assert lint(good, WORLD) == [] and lint([]) == [] and lint([("a", 1)], WORLD) == []
    assert ["no end of document" in f for f in lint(good, eos=False)] == [True] and ["begins without id 0" in f for f in lint(good, bos=False)] == [True]
    assert lint([*good, ("\n\nUser: b", 0)], eos=False) == []
    [found] = lint([("so for", 1), ("ever", 1), (" and", 1), (" on", 1)], WORLD)
    assert found.startswith("1 of 3 borders") and "…so for|ever…" in found


def test_masks_that_train_everything_make_no_problems():
    for name, template in TEMPLATES.items():
        talk = TALKS["system"] + TALKS["many"]
        if name != "raw": assert lint([(t, 1.0) for t, _ in template(talk)], WORLD) == [], name


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "for", "ever", " ", "\n", "\n\n", "你", "好", "。", ":", "✿", "Assistant:", " <think", "12", "😀", "é", "\x17"]), min_size=2, max_size=8), st.data())
def test_borders_are_those_of_the_whole_text(pieces, draw):
    cut = draw.draw(st.integers(1, len(pieces) - 1))
    a, b = "".join(pieces[:cut]), "".join(pieces[cut:])
    spans, at = set(), 0
    for token in WORLD.encode(a + b): at += len(WORLD.token_bytes(token)); spans.add(at)
    whole = WORLD.encode(a + b) == WORLD.encode(a) + WORLD.encode(b)
    assert (merged_borders([(a, 0), (b, 1)], WORLD) == []) == whole
    if len(a.encode()) not in spans: assert not whole
    assert merged_borders([(a, 0), (b, 1)], Bytes()) == []
