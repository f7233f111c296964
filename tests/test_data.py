"What a lesson cell can't show about rwkv_peft.data: masks against text computed another way, every refusal, any order of batches."
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rwkv_peft.data.batches import Loader, batches, collate, epoch_order
from rwkv_peft.data.chat import raw, rwkv
from rwkv_peft.data.masks import Example
from rwkv_peft.data.records import Dataset, load_encoded, read_data, save_encoded, suggest_ctx_len
from rwkv_peft.data.rows import DataError
from rwkv_peft.data.views import padding_efficiency, split_rows
from rwkv_peft.data.sources import read_rows
from rwkv_peft.model.tokenizer import Bytes, World

TOKENIZERS = [Bytes(), World()]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
TRICKY = ["plain", "你好，世界。", "😀👩‍👩‍👧 flag 🇨🇳", "User: hi\n\nAssistant: no", "\n\nUser:", "a\r\n\r\nb", "  indented\n\n  more", "<script>alert(1)</script>", "∎ \x00 \x17", "7", "Assistant:", "é\u0301"]


def chat(*turns): return {"messages": [{"role": role, "content": content} for role, content in turns]}


def trained_text(e, tokenizer): return tokenizer.decode(e.tokens[e.weights > 0].tolist())


def trained_runs(e, tokenizer):
    "Texts of the runs of consecutive trained tokens."
    runs, open_ = [], False
    for token, weight in zip(e.tokens.tolist(), e.weights.tolist()):
        if weight > 0: runs = runs + [[token]] if not open_ else runs[:-1] + [runs[-1] + [token]]
        open_ = weight > 0
    return [tokenizer.decode(run) for run in runs]


# ---- masks, against text put together without the templates

def official(turns):
    "The transcript by the official rule, and the answers' spans in it."
    text, spans = "", []
    for i, (role, content) in enumerate(turns):
        content = content.replace("\r\n", "\n")
        body = content.strip() if role == "assistant" else re.sub("\n\n+", "\n", content.replace("\r", "\n")).strip()
        text += {"user": "User:", "assistant": "Assistant:", "system": "System:"}[role]
        start = len(text)
        text += " " + body + ("\n\n" if i < len(turns) - 1 else "")
        if role == "assistant": spans.append((start, len(text)))
    return text, spans


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@pytest.mark.parametrize("user", TRICKY)
@pytest.mark.parametrize("answer", TRICKY)
def test_turns_are_masked_by_their_spans(tokenizer, user, answer):
    turns = [("system", "Be kind."), ("user", user), ("assistant", answer), ("user", answer), ("assistant", user)]
    text, spans = official(turns)
    [e] = read_data([chat(*turns)], tokenizer)
    assert tokenizer.decode(e.tokens.tolist()) == text and e.tokens[0] == e.tokens[-1] == 0
    assert trained_runs(e, tokenizer) == [text[a:b] for a, b in spans]
    assert e.weights[0] == 0 and e.weights[-1] == 1
    [last] = read_data([chat(*turns)], tokenizer, loss_mask="last")
    assert trained_runs(last, tokenizer) == [text[spans[-1][0]:]] and torch.equal(last.tokens, e.tokens)
    for mask in ("none", "all", "pad"):
        [full] = read_data([chat(*turns)], tokenizer, loss_mask=mask)
        assert trained_text(full, tokenizer) == text and full.trained == full.length


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.sampled_from(TOKENIZERS))
def test_any_conversation(pairs, tokenizer):
    turns = [turn for user, answer in pairs for turn in (("user", user), ("assistant", answer))]
    text, spans = official(turns)
    [e] = read_data([chat(*turns)], tokenizer)
    assert tokenizer.decode(e.tokens.tolist()) == text
    assert trained_runs(e, tokenizer) == [text[a:b] for a, b in spans]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), TEXT, st.sampled_from(TOKENIZERS))
def test_pairs_are_word_for_word(prompt, completion, tokenizer):
    [e] = read_data([{"prompt": prompt, "completion": completion}], tokenizer)
    assert tokenizer.decode(e.tokens.tolist()) == prompt + completion and trained_text(e, tokenizer) == completion
    assert e.tokens.tolist() == [0, *tokenizer.encode(prompt), *tokenizer.encode(completion), 0]      # as a prompt is tokenised when used


@settings(max_examples=100, deadline=None)
@given(TEXT, st.sampled_from(TOKENIZERS))
def test_texts_train_everything_but_the_first_zero(text, tokenizer):
    for source in ([text], [{"text": text}]):
        [e] = read_data(source, tokenizer)
        assert e.tokens.tolist() == [0, *tokenizer.encode(text), 0] and e.weights.tolist() == [0.0] + [1.0] * (len(e.tokens) - 1)


def test_a_prompt_is_tokenised_as_when_it_is_used():
    [e] = read_data([chat(("user", "7 + 8?"), ("assistant", "15"))], World())
    prompt = World().encode("User: 7 + 8?\n\nAssistant:")
    assert e.tokens.tolist()[1:1 + len(prompt)] == prompt and e.weights[:1 + len(prompt)].sum() == 0 and e.weights[1 + len(prompt)] == 1


def test_unanswered_end_is_not_trained():
    [e] = read_data([chat(("user", "a"), ("assistant", "b"), ("user", "c"))], Bytes())
    assert trained_text(e, Bytes()) == " b\n\n" and e.weights[-1] == 0


def test_weights_of_messages_and_rows():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": .5}], "weight": .5}
    [e] = read_data([row], Bytes())
    assert trained_text(e, Bytes()) == " d" and set(e.weights.tolist()) == {0.0, .25}
    assert e.weights.dtype == torch.float32 and e.tokens.dtype == torch.int64
    [e] = read_data([{"text": "ab", "weight": 2}], Bytes())
    assert e.weights.tolist() == [0, 2, 2, 2]


def test_without_ends():
    [e] = read_data([{"prompt": "ab", "completion": "c"}], Bytes(), bos=False, eos=False)
    assert e.tokens.tolist() == [98, 99, 100] and e.weights.tolist() == [0, 0, 1]
    [e] = read_data(["ab"], Bytes(), bos=False)
    assert e.tokens.tolist() == [98, 99, 0] and e.weights.tolist() == [0, 1, 1]      # nothing predicts a first token


def test_template_of_ones_own_and_renamed_keys():
    template = lambda messages: [("Q " + messages[0]["content"], False), ("A ", 0), (messages[1]["content"], .5)]
    [e] = read_data([{"q": "x", "a": "y", "text": "unused"}], Bytes(), template=template, fields={"prompt": "q", "completion": "a"})
    assert Bytes().decode(e.tokens.tolist()) == "Q xA y" and e.weights.tolist()[-2:] == [.5, .5]
    assert read_data([{"q": "x", "a": "y"}], Bytes(), template="rwkv", fields={"prompt": "q", "completion": "a"})[0].segments == (("User: x\n\nAssistant:", 0.0), (" y", 1.0))
    assert rwkv([{"role": "system", "content": ""}, {"role": "user", "content": "a"}]) == [("User: a", 0.0)]
    assert raw([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == [("a", 0.0), ("b", 1.0)]


# ---- refusals: each names the place and a way out

def refused(*said):
    return pytest.raises(DataError, match=".*".join(map(re.escape, said)))


GOOD = [chat(("user", "hi"), ("assistant", "hello"))]

@pytest.mark.parametrize("rows, said", [
    ([], ("no rows",)),
    ({"text": "a"}, ("one dict", "[row]")),
    ((t for t in ()), ("generator", "no rows")),
    (b"abc", ("bytes", "list of rows")),
    (7, ("int", ".jsonl")),
    (["a", 3], ("row 1", "int", '{"text"}')),
    ([{}], ("row 0", "no keys")),
    ([{"text": "a"}, {"txt": "b"}], ("row 1", "'txt'", "'text'", "fields")),
    ([{"text": ""}], ("row 0", "'text'", "empty")),
    ([{"text": " \n"}], ("row 0", "'text'", "empty")),
    ([{"text": 5}], ("row 0", "'text'", "int", "string")),
    ([{"text": None}], ("row 0", "'text'", "null")),
    ([{"text": "a\ud800b"}], ("row 0", "'text'", "half a character", "position 1")),
    ([{"text": "a", "prompt": "b", "completion": "c"}], ("row 0", "2 shapes", "fields=")),
    ([{"prompt": "a"}], ("row 0", "'prompt'", "completion")),
    ([{"frage": "a", "n": 3, "antwrt": "b"}], ("row 0", "fields={'prompt': 'frage', 'completion': 'antwrt'}", "sft_field = ['frage', 'antwrt']")),
    ([{"prompt": "a", "completion": ""}], ("row 0", "'completion'", "empty")),
    ([{"text": "a"}, {"prompt": "b", "completion": "c"}], ("row 1", "prompt and completion", "row 0", "text", "one shape")),
    ([{"messages": []}], ("row 0", "'messages'", "empty list")),
    ([{"messages": "hi"}], ("row 0", "'messages'", "str", "list of messages")),
    ([{"messages": ["hi"]}], ("row 0", "message 1", "str", '"role"')),
    ([{"messages": [{"role": "user"}]}], ("row 0", "message 1", "'content'")),
    ([{"messages": [{"content": "a"}]}], ("row 0", "message 1", "'role'")),
    ([chat(("user", "a"), ("bot", "b"))], ("row 0", "message 2", "'bot'", "system, user, assistant")),
    ([chat(("user", "a"), ("narrator", "b"))], ("message 2", "'narrator'", "user, assistant, tool")),
    ([chat(("user", [{"type": "text"}]))], ("message 1", "'content'", "list", "string")),
    ([chat(("user", ""), ("assistant", "b"))], ("message 1", "'content'", "empty")),
    ([{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}], ("message 1", "tool call 1", "arguments", "remove")),
    ([{"messages": [{"role": "assistant", "content": "a", "weight": True}]}], ("message 1", "'weight'", "True")),
    ([{"text": "a", "weight": -1}], ("row 0", "'weight'", "-1")),
    ([{"text": "a", "weight": float("nan")}], ("row 0", "'weight'", "nan")),
    ([chat(("user", "a"))], ("no row of the 1", "loss_mask='assistant'", "assistant message")),
    (GOOD + [chat(("user", "a"))], ("row 1", "no token to train", "untrained='drop'")),
    ([{"text": "a", "weight": 0}], ("no row", "weight above 0")),
])
def test_rows_that_are_refused(rows, said):
    with refused(*said): read_data(rows, Bytes())


@pytest.mark.parametrize("settings_, said", [
    ({"template": "bots"}, ("'bots'", "did you mean 'bot'", "'rwkv'")),
    ({"template": "chatml"}, ("'chatml'", "isn't known", "'rwkv'")),
    ({"template": lambda m: "hello"}, ("row 0", "(text, trained)", "hello")),
    ({"template": lambda m: [("a", -1)]}, ("row 0", "(text, trained)")),
    ({"template": lambda m: None}, ("row 0", "None")),
    ({"loss_mask": "se"}, ("loss_mask='se'", "mask_id")),
    ({"loss_mask": "asistant"}, ("did you mean 'assistant'",)),
    ({"ctx_len": 0}, ("ctx_len=0", "at least 1")),
    ({"ctx_len": True}, ("ctx_len=True",)),
    ({"ctx_len": "512"}, ("ctx_len='512'",)),
    ({"ctx_len": 5}, ("row 0 has 27 tokens", "ctx_len=5", "set ctx_len=27", "long='cut'", "long='drop'")),
    ({"ctx_len": 5, "long": "drop"}, ("all 1 rows", "raise ctx_len")),
    ({"ctx_len": 5, "long": "cut"}, ("no row", "a token to train", "raise ctx_len")),
    ({"long": "trim"}, ("long='trim'", "'drop'")),
    ({"untrained": "keep"}, ("untrained='keep'", "'drop'")),
    ({"fields": {"question": "q"}}, ("'question'", "renames")),
    ({"fields": {"text": "body"}}, ("row 0", "'messages'", "'body'")),
])
def test_settings_that_are_refused(settings_, said):
    with refused(*said): read_data(GOOD, Bytes(), **settings_)


def test_text_has_no_turns():
    for template in ("rwkv", rwkv):
        with refused("template", "text"): read_data(["a"], Bytes(), template=template)
    with refused("loss_mask='last'", "turns"): read_data(["a"], Bytes(), loss_mask="last")
    with refused("tokenizer is NoneType"): read_data(["a"], None)


@pytest.mark.parametrize("name, content, said", [
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": "b"', ("bad.jsonl line 3", "isn't JSON", "column")),
    ("deep.jsonl", b"[" * 9 + b'"a"' + b"]" * 9, ("deep.jsonl row 0", "list")),
    ("nest.jsonl", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", ("line 1", "nested too deeply")),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', ("line 2", "UTF-8")),
    ("empty.jsonl", b"", ("empty.jsonl has no rows",)),
    ("blank.jsonl", b"\n \n\n", ("has no rows",)),
    ("row.jsonl", b'{"text": "a"}\n\n{"title": "b"}', ("row.jsonl line 3", "'title'")),
    ("num.jsonl", b"12\n", ("line 1", "int")),
    ("t.csv", b"txt\na\n", ("t.csv line 2", "'txt'", "'text'")),
    ("t.parquet", b"PAR1", ("parquet", "whole")),
    ("t.bin", b"MMIDIDX", ("t.idx is missing beside", "t.bin")),
])
def test_files_that_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with refused(*said): read_data(str(tmp_path / name), Bytes())


def test_missing_file_and_folder(tmp_path):
    with refused("nowhere.jsonl is not there", ".jsonl file"): read_data("nowhere.jsonl", Bytes())
    with refused("is a folder"): read_data(tmp_path, Bytes())


def test_errors_are_one_sentence(tmp_path):
    for rows in ([{"text": "x\ny" * 50, "messages": []}], [{"text": ["a\nb"]}], [chat(("us\ner", "a"))]):
        with pytest.raises(DataError) as e: read_data(rows, Bytes())
        assert "\n" not in str(e.value)


def test_a_file_is_read_like_a_list(tmp_path):
    rows = [{"text": t} for t in TRICKY]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(rows)), encoding="utf-8")
    data = read_data(path, World())
    assert data.fingerprint() == read_data(rows, World()).fingerprint()
    assert [e.row for e in data] == list(range(1, 2 * len(rows), 2)) and data.where(2) == f"{path} line 5"


# ---- rows that are left out are counted and listed

def test_long_rows_are_dropped_or_cut_only_when_told():
    rows = [{"text": c * n} for c, n in zip("xxxy", (3, 50, 4, 60))]
    drop, cut = (read_data(rows, Bytes(), ctx_len=10, long=how) for how in ("drop", "cut"))
    assert drop.lengths == [4, 5] and drop.facts["dropped"] == [1, 3] and "2 rows longer than ctx_len were dropped: 1, 3" in repr(drop.report())
    assert cut.lengths == [4, 10, 5, 10] and cut.facts["cut"] == [1, 3] and cut[1].tokens.tolist() == [0] + [121] * 10
    assert [p["row"] for p in cut.check()] == ["row 1", "row 3"]
    assert read_data(rows, Bytes(), ctx_len=61).lengths == [4, 51, 5, 61] and "cut" not in read_data(rows, Bytes(), ctx_len=61).facts
    with refused("row 3 has 61 tokens", "2 of 4 rows: 1, 3"): read_data(rows, Bytes(), ctx_len=10)


def test_untrained_rows_are_dropped_only_when_told():
    data = read_data(GOOD + [chat(("user", "a"))], Bytes(), untrained="drop")
    assert len(data) == 1 and data.facts["untrained"] == [1] and "nothing to train were dropped: 1" in repr(data.report())
    assert [p["row"] for p in data.check()] == ["row 1"]


# ---- looking

def test_report_figures():
    rows = [{"prompt": "p" * n, "completion": " c"} for n in range(1, 101)] + [{"prompt": "p", "completion": " c", "id": 3}]
    report = read_data(rows, Bytes()).report(micro_bsz=4)
    lengths = sorted([n + 3 for n in range(1, 101)] + [4])
    assert (report["rows"], report["tokens"], report["trained_tokens"]) == (101, sum(lengths), 303)
    assert (report["length_p50"], report["length_p95"], report["length_max"], report["duplicates"]) == (lengths[50], lengths[95], 103, 1)
    assert report["padding_efficiency"] == padding_efficiency(lengths, 4) and report["trained_share"] == 303 / sum(lengths)
    assert "id" in report["notes"][-1] or any("id" in n for n in report["notes"])
    json.dumps(report)
    assert report["rows"] and "duplicates" in report._repr_html_()


def test_markup_in_a_row_stays_text():
    evil = '<img src=x onerror="alert(1)"></div><script>alert(2)</script>'
    data = read_data([{"prompt": evil, "completion": evil, evil: 1}], World(), fields={"prompt": "prompt", "completion": "completion"})
    for html in (data.show(0), data.report()._repr_html_(), data.check()._repr_html_(), data._repr_html_()):
        assert "<script" not in html and "<img" not in html
    assert "&lt;" in data.show(0) and "id " in data.show(0)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, st.sampled_from(TOKENIZERS))
def test_show_underlines_what_is_trained(prompt, completion, tokenizer):
    from html import unescape
    html = read_data([{"prompt": prompt, "completion": completion}], tokenizer).show(0)
    painted = "".join(unescape(p) for p in re.findall(r"<u [^>]*>(.*?)</u>", html, re.S))
    clean = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", completion)
    assert painted.replace("↵\n", "\n").replace("␍", "\r") == clean.replace("↵\n", "\n").replace("␍", "\r") + "∎"


def test_check_names_what_looks_odd():
    rows = [{"prompt": "What is LoRA?", "completion": "A thin one"}, {"prompt": "a", "completion": " b\n\nUser: c"}, {"prompt": "a", "completion": " \ufffd"}, {"prompt": "a ", "completion": "b"}, {"prompt": "a ", "completion": "b"}]
    said = [(p["row"], p["problem"]) for p in read_data(rows, Bytes()).check()]
    assert [row for row, _ in said] == ["row 0", "row 1", "row 2", "row 4"]
    assert all(word in problem for word, (_, problem) in zip(["runs into", "User:", "\ufffd", "the same as row 3"], said))
    assert repr(read_data(["fine"], Bytes()).check()) == "no problems found"


# ---- splitting, fingerprints, keeping

@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=1), min_size=1, max_size=40), st.floats(0, .99), st.integers(0, 5))
def test_any_split(keys, fraction, seed):
    if fraction and len(set(keys)) < 2:
        with refused("can't be split"): split_rows(keys, fraction, seed)
        return
    kept, held = split_rows(keys, fraction, seed)
    assert sorted(kept + held) == list(range(len(keys))) and kept == sorted(kept) and held == sorted(held)
    assert not {keys[i] for i in kept} & {keys[i] for i in held}
    assert kept and bool(held) == bool(fraction)
    turned = split_rows(keys[::-1], fraction, seed)
    if fraction and len(set(keys)) == len(keys): assert {keys[i] for i in held} == {keys[::-1][i] for i in turned[1]}      # the file's order doesn't matter


def test_split_share_and_seed():
    data = read_data([f"row {i}" for i in range(500)], Bytes())
    (train, held), (_, other) = data.split(.1), data.split(.1, seed=1)
    assert (len(train), len(held)) == (450, 50) and set(held.contents()) != set(other.contents())
    assert data.split(0)[1].examples == [] and len(data.split(0)[0]) == 500
    assert data.split(.1)[1].fingerprint() == held.fingerprint()
    with refused("below 1"): data.split(1.0)


def test_split_is_the_same_in_another_process():
    code = "from rwkv_peft.data.views import split_rows; print(split_rows([bytes([i]) for i in range(50)], .2)[1])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}).stdout
    assert other.strip() == str(split_rows([bytes([i]) for i in range(50)], .2)[1])


def test_fingerprint_sees_what_training_sees():
    base = read_data(GOOD * 2, Bytes()).fingerprint()
    assert base == read_data(GOOD * 2, Bytes()).fingerprint()
    others = [read_data(GOOD, Bytes()), read_data(GOOD * 2, World()), read_data(GOOD * 2, Bytes(), loss_mask="all"), read_data(GOOD * 2, Bytes(), eos=False),
              read_data(GOOD + [chat(("user", "hi"), ("assistant", "hellp"))], Bytes())]
    assert len({base, *(o.fingerprint() for o in others)}) == 6


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_saved_and_loaded(tmp_path, tokenizer):
    data = read_data([{"prompt": t, "completion": t + "\u2028\x85"} for t in TRICKY], tokenizer)
    save_encoded(data, tmp_path / "data")
    back = load_encoded(tmp_path / "data")
    assert len(back) == len(data) and back.facts == data.facts and back.tokenizer.name == tokenizer.name and back.fingerprint() == data.fingerprint()
    for a, b in zip(data, back):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.weights, b.weights) and (a.row, a.segments) == (b.row, b.segments)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["dataset.json", "rendered.jsonl", "rows.bin", "spans.bin", "tokens.bin", "tokens.idx"]
    assert back.show(3) == data.show(3)


def test_damaged_folders_are_refused(tmp_path):
    data = read_data(GOOD, Bytes())
    save_encoded(data, tmp_path)
    with refused("tokenizer 'bytes'", "'world'"): load_encoded(tmp_path, World())
    other = read_data([chat(("user", "hi"), ("assistant", "hullo"))], Bytes())
    save_encoded(other, tmp_path / "other")
    (tmp_path / "other/tokens.bin").replace(tmp_path / "tokens.bin")
    with refused("isn't what was saved"): load_encoded(tmp_path)
    for name, said in (("spans.bin", "cut short"), ("rows.bin", "cut short"), ("tokens.bin", "truncated")):
        folder = tmp_path / f"damaged {name}"
        save_encoded(data, folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
        with refused(said): load_encoded(folder)
        (folder / name).unlink()
        with refused(f"has no {name}"): load_encoded(folder)


def test_an_empty_part_can_be_kept(tmp_path):
    save_encoded(read_data(["a", "b"], Bytes()).split(0)[1], tmp_path)
    assert len(load_encoded(tmp_path)) == 0


def test_suggested_length():
    data = lambda sizes: read_data(["x" * (n - 1) for n in sizes], Bytes())
    assert suggest_ctx_len(data([100] * 99 + [110])) == 112 and suggest_ctx_len(data([100] * 99 + [4000])) == 112 and suggest_ctx_len(data([100] * 99 + [120])) == 120


# ---- batches

def lengths_to_data(lengths): return [Example(torch.arange(n + 1), torch.ones(n + 1), i) for i, n in enumerate(lengths)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 70), st.integers(-2**40, 2**70), st.integers(0, 10**6), st.data())
def test_every_row_once_in_a_resumable_order(lengths, micro_bsz, seed, epoch, draw):
    data = lengths_to_data(lengths)
    n = len(Loader(data, micro_bsz))
    start = draw.draw(st.integers(0, n))
    whole = [b.rows for b in batches(data, micro_bsz, seed=seed, epoch=epoch)]
    assert sorted(sum(whole, [])) == list(range(len(lengths))) and len(whole) == n
    assert sorted(map(len, whole))[1:] == [micro_bsz] * (n - 1)
    assert [b.rows for b in batches(data, micro_bsz, seed=seed, epoch=epoch, start=start)] == whole[start:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 9), st.integers(1, 20))
def test_a_batch_holds_its_rows_and_nothing_else(lengths, micro_bsz, multiple):
    data = lengths_to_data(lengths)
    for batch in batches(data, micro_bsz, pad_multiple=multiple):
        longest = max(lengths[i] for i in batch.rows)
        B, T = batch.tokens.shape
        assert B == len(batch.rows) and longest <= T < longest + multiple and T % multiple == 0
        assert all(x.shape == (B, T) for x in (batch.targets, batch.weights, batch.resets))
        assert (batch.tokens.dtype, batch.targets.dtype, batch.weights.dtype, batch.resets.dtype) == (torch.int64, torch.int64, torch.float32, torch.bool)
        for i, row in enumerate(batch.rows):
            n = lengths[row]
            assert batch.tokens[i].tolist() == [*range(n)] + [0] * (T - n) and batch.targets[i].tolist() == [*range(1, n + 1)] + [0] * (T - n)
            assert batch.weights[i].tolist() == [1] * n + [0] * (T - n) and batch.resets[i].tolist() == [True] + [False] * (T - 1)


def test_weights_follow_their_targets():
    data = read_data([{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}], Bytes())
    [batch] = batches(data, 2)
    for i, row in enumerate(batch.rows):
        trained = batch.targets[i][batch.weights[i] > 0].tolist()
        assert trained == [*Bytes().encode(["cd", "f"][row]), 0]
    assert batch.weights.sum() == sum(e.weights.sum() for e in data)


def test_epochs_and_seeds_differ_and_like_lengths_meet():
    lengths = torch.randint(1, 500, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    orders = [epoch_order(lengths, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert len({tuple(sorted(map(tuple, map(sorted, o)))) for o in orders}) == 4        # other companions too, not only another order
    real = sum(lengths) / sum(len(b) * max(lengths[i] for i in b) for b in orders[0])
    assert real > .95 and max(lengths[i] for i in orders[0][0]) < max(lengths)
    firsts = [max(lengths[i] for i in b) for b in orders[0]]
    assert firsts != sorted(firsts)


def test_the_order_is_pinned():
    assert epoch_order([5, 90, 7, 80, 6], 2, seed=3, epoch=4) == [[0, 4], [1], [2, 3]]


@pytest.mark.parametrize("settings_, said", [
    ({"dataload": "buket"}, ("did you mean 'bucket'",)), ({"micro_bsz": 0}, ("micro_bsz=0", "at least 1")), ({"micro_bsz": 2.0}, ("micro_bsz=2.0",)),
    ({"start": 4}, ("start=4", "3 batches")), ({"start": -1}, ("start=-1",)), ({"epoch": -1}, ("epoch=-1",)), ({"pad_multiple": 0}, ("pad_multiple=0",)),
])
def test_batch_settings_that_are_refused(settings_, said):
    with refused(*said): batches(lengths_to_data([1, 2, 3]), **settings_)      # at the call, before a batch is asked for


def test_nothing_to_train_is_refused():
    with refused("nothing to train", "0 rows"): batches(Dataset([]))
    with refused("nothing to train", "1 rows"): batches([Example(torch.arange(3), torch.zeros(3))])


def test_collate_is_batches_row_by_row():
    data = lengths_to_data([3, 5])
    assert torch.equal(collate(data, [0, 1]).tokens, torch.tensor([[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]))


def test_reading_rows_keeps_unknown_keys_in_sight():
    assert read_rows([{"text": "a", "id": 1, 5: 2}])[0].ignored == ("id", 5)
