"The demo's rows keep their form, their languages and their distance from one another."
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

path = Path(__file__).parent.parent / "rwkv_peft/demo/rows.jsonl"
topics = "STATE LORA DATA MASK MEMORY SPEED TOKENS MODEL TRAINING SAMPLING EXPORT".split()
form = re.compile(rf"\[RWKV\] (?P<sentence>\S.*[.。]) >> (?P<topic>{'|'.join(topics)}) <<")
rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(row) -> tuple[str, str]:
    "The row's question and its answer."
    return tuple(message["content"] for message in row["messages"])


def sentence(row) -> str: return form.fullmatch(turns(row)[1])["sentence"]


def grams(text: str, lang: str) -> set:
    "The text's 5-grams: of words in English, of characters in Chinese."
    pieces = re.findall(r"\w+" if lang == "en" else r"\w", text.lower())
    return {tuple(pieces[i:i + 5]) for i in range(len(pieces) - 4)}


def likeness(one: set, other: set) -> float:
    "The share of the smaller set that the other one holds too."
    return len(one & other) / min(len(one), len(other))


def test_lines():
    raw = path.read_bytes()
    assert raw.endswith(b"\n") and not raw.startswith(b"\xef\xbb\xbf") and b"\r" not in raw and b"\\u" not in raw
    assert all(set(row) == {"lang", "messages"} for row in rows)
    assert all([set(message) for message in row["messages"]] == [{"role", "content"}] * 2 for row in rows)
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)


def test_counts():
    count = Counter(row["lang"] for row in rows)
    assert set(count) == {"en", "zh"} and len(rows) >= 330 and count["en"] >= 180 and count["zh"] >= 150
    for start in range(0, len(rows) - 40, 40): assert {row["lang"] for row in rows[start:start + 40]} == {"en", "zh"}


def test_form():
    wrong = [turns(row)[1] for row in rows if not form.fullmatch(turns(row)[1])]
    assert not wrong, wrong[:3]
    for lang in ("en", "zh"):
        count = Counter(form.fullmatch(turns(row)[1])["topic"] for row in rows if row["lang"] == lang)
        assert set(count) == set(topics) and min(count.values()) >= 10, count
    assert not any(mark in part for row in rows for part in (turns(row)[0], sentence(row)) for mark in ("[RWKV]", ">>", "<<"))


def test_form_is_a_quarter_of_the_bytes():
    for lang in ("en", "zh"):
        chosen = [row for row in rows if row["lang"] == lang]
        total = sum(len(turns(row)[1].encode()) for row in chosen)
        assert 1 - sum(len(sentence(row).encode()) for row in chosen) / total > .25


def test_language():
    for row in rows:
        question, said = turns(row)[0], sentence(row)
        if row["lang"] == "en": assert (question + said).isascii() and question.endswith("?") and said.endswith("."), row
        else:
            assert question.endswith("？") and said.endswith("。"), row
            assert all(re.search("[\u4e00-\u9fff]{2}", part) for part in (question, said)), row
            (question + said).encode("gb2312")  # holds simplified characters only
            assert not re.search("[,;:!?]", question + said), row


def test_lengths():
    for row in rows:
        question, answer = turns(row)
        assert len(question.encode()) <= 90 if row["lang"] == "en" else len(question) <= 30, row
        assert 60 <= len(answer.encode()) <= 140, row
        assert 30 <= len(sentence(row).encode()) <= 80 if row["lang"] == "en" else 10 <= len(sentence(row)) <= 25, row


def test_openings_vary():
    for lang, share in (("en", .3), ("zh", .1)):
        count = Counter(turns(row)[0].split()[0] if lang == "en" else turns(row)[0][:2] for row in rows if row["lang"] == lang)
        assert len(count) >= 12 and count.most_common(1)[0][1] < share * count.total(), count.most_common(3)


def test_nothing_twice():
    for part in (lambda row: turns(row)[0], sentence):
        twice = [text for text, n in Counter(part(row).lower() for row in rows).items() if n > 1]
        assert not twice, twice


@pytest.mark.parametrize("lang, near, far, shared", [
    ("en", ("What does the rank of an adapter control now?", "What does the rank of an adapter limit now?"), "How many rows do I need for one style?", 3 / 5),
    ("zh", ("秩决定更新能够使用多少个方向吗", "秩决定更新能够使用几个方向吗"), "数据最好用什么样的文件存放", 5 / 10)])
def test_likeness_sees_a_near_copy(lang, near, far, shared):
    one, other = (grams(text, lang) for text in near)
    assert likeness(one, one) == 1 and likeness(one, grams(far, lang)) == 0
    assert likeness(one, other) == likeness(other, one) == shared


def test_no_two_rows_alike():
    for lang in ("en", "zh"):
        sets = [(turns(row)[0], grams(turns(row)[0] + " " + sentence(row), lang)) for row in rows if row["lang"] == lang]
        assert min(len(found) for _, found in sets) >= 5
        alike = [(a, b) for (a, one), (b, other) in combinations(sets, 2) if likeness(one, other) > .5]
        assert not alike, alike


def test_no_addresses():
    assert not re.search(r"https?:|www\.|\.(com|org|io|cn)\b|@", path.read_text(encoding="utf-8"))
