"The corpus of the tiny model: cleaning, splitting and reading archives, on small inputs. Nothing here touches the network."
import io
import re
import tarfile
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest

from rwkv_peft.bench import corpus as C


def test_every_source_says_what_it_is_and_may_be():
    for s in C.SOURCES:
        assert all(getattr(s, f.name) for f in fields(s)), s
        assert re.fullmatch(r"[0-9a-f]{64}", s.sha256) and s.client in ("pip", "npm")
        assert re.search(r"CC0|BSD|MIT|Apache|public domain", s.licence), s
        assert s.version in s.archive
    assert len({s.name for s in C.SOURCES}) == len(C.SOURCES)


def test_plain_keeps_letters_and_simplifies_marks():
    assert C.plain("“It’s”\r\n fine…\x02 — naïve\u00a0中文。") == "\"It's\" fine... - naïve 中文。"
    assert C.plain("cafe\u0301") == "café"


def test_paragraphs_lose_nothing_and_stay_short():
    text = "One two three four, five. " * 400 + "\n\nShort one\nwrapped here."
    got = C.paragraphs(text)
    assert " ".join(got) == " ".join(text.split())
    assert got[-1] == "Short one wrapped here." and all(len(p) < 1100 for p in got)


@pytest.mark.parametrize("text, prose", [
    ("The cache is emptied when the server starts, so nothing old is served.", True),
    ("The `save` method of the form stores the row and returns it to you.", True),
    ("for row in rows of the table that we made before lunch today.", False),
    ("Use settings.MY_LONG_NAME = True when the server must start in that mode.", False),
    ("See the following list of all the names that you can use here:", False),
    ("Too short.", False),
    ("Visit http://example.org for more about all of the things said here.", False),
])
def test_is_prose(text, prose):
    assert bool(C.is_prose(text)) is prose


def test_rst_prose_drops_markup_code_and_tables():
    page = """
=====
Title
=====

.. versionadded:: 1.2
    :option: value

Roles like :class:`~django.db.Model` and :doc:`the guide </intro/x>` become **plain**
words, and a `link <http://there>`_ keeps only what it says.

Code follows, and this line goes away because it leads nowhere::

    x = compute(1, 2)

* The first item of the list is a full sentence with its stop.

====  =====
a     table
====  =====
"""
    assert C.rst_prose(page).split("\n\n") == [
        "Roles like `Model` and the guide become plain words, and a link keeps only what it says.",
        "The first item of the list is a full sentence with its stop."]


def test_members_reads_sorted_regular_files_only(tmp_path):
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as t:
        for name in ("p/data/b.txt", "p/data/a.txt", "p/../../evil.txt", "p/data/c.py"):
            info = tarfile.TarInfo(name); info.size = 2
            t.addfile(info, io.BytesIO(b"\xe9x"))
        link = tarfile.TarInfo("p/data/link.txt"); link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
    assert list(C.members(path, r"\.txt$")) == [("p/data/a.txt", "\ufffdx"), ("p/data/b.txt", "\ufffdx")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tgz"]


def chat_archive(tmp_path, conversations):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "chat.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data/english/toy.yml", yaml.safe_dump({"categories": ["toy"], "conversations": conversations}))
        z.writestr("x/data/german/toy.yml", "conversations:\n- [Hallo, Guten Tag]\n")
    return path


def test_chat_pairs_once_short_and_without_code(tmp_path):
    path = chat_archive(tmp_path, [["Hi", "Hello."], ["hi!", "Hello"], ["Hi", "Good day."], ["Sort?", "```code```"],
                                   ["Long?", "x" * 300], ["A?", "B.", "C?", "D."], ["lonely"], ["?", "!"]])
    assert [(p.question, p.answer) for p in C.chat_pairs(path)] == [("Hi", "Hello."), ("Hi", "Good day."), ("A?", "B."), ("C?", "D.")]
    assert [p.answer for p in C.chat_pairs(path, "german")] == ["Guten Tag"]


def test_held_back_pairs_never_train():
    pairs = [C.Pair(f"What is thing {i}?", f"Thing {i % 50} is a very small thing.") for i in range(600)]
    training, back = C.split_pairs(pairs)
    assert {C.key(p.question) for p in training}.isdisjoint(C.key(p.question) for p in back)
    assert {p.answer for p in training}.isdisjoint(p.answer for p in back)
    questions = [f"Is {i} a number?" for i in range(3000)]
    assert .30 < np.mean([C.held_back(q) for q in questions]) < .37
    assert all(C.held_back(q) == C.held_back(q.upper() + " ??") for q in questions[:100])


def test_repeats_of_earlier_and_held_out_paragraphs_are_left_out():
    judge = "We shall keep this paragraph away from training because it judges."
    fresh = "This one on the other hand has been written for nothing but training."
    docs = [C.Document("s", "a", f"{judge}\n\n{fresh}"), C.Document("s", "b", fresh), C.Document("s", "c", "Aye.\n\nAye.")]
    assert [d.text for d in C.without_repeats(docs, C._runs(judge))] == [fresh, "Aye.\n\nAye."]


def test_held_out_is_by_name_and_about_one_in_twenty():
    docs = [C.Document("manual", f"page {i}", "") for i in range(4000)]
    assert .04 < np.mean([C.is_held_out(d) for d in docs]) < .06
    assert not any(C.is_held_out(replace(d, source="chinese")) for d in docs)


def test_token_stream_is_the_texts_between_zeros_in_a_seeded_order():
    corpus = C.Corpus([C.Document("s", str(i), f"Text {i} é.") for i in range(5)], [C.Document("s", "h", "hidden")], [C.Pair("Q?", "A.")], [])
    stream = C.token_stream(corpus, passes=2, seed=3)
    texts = [bytes(int(t) - 1 for t in part).decode() for part in np.split(stream, np.flatnonzero(stream == 0))[1:] for part in [part[1:]]]
    assert sorted(texts[:-1]) == sorted([d.text for d in corpus.train] + ["User: Q?\n\nAssistant: A.\n\n"] * 2) and texts[-1] == ""
    assert np.array_equal(stream, C.token_stream(corpus, passes=2, seed=3)) and not np.array_equal(stream, C.token_stream(corpus, passes=2, seed=4))


def test_windows_cover_an_epoch_once():
    feed = C.windows(np.arange(1000), 64, seed=1)
    seen = np.concatenate([next(feed)[:-1] for _ in range(14)])
    assert len(set(seen.tolist())) == len(seen) == 14 * 64
    with pytest.raises(ValueError, match="too short"):
        next(C.windows(np.arange(100), 64))


def test_an_archive_that_is_missing_or_altered_is_named(tmp_path):
    source = C.SOURCES[0]
    with pytest.raises(C.CorpusError, match=re.escape(source.archive)):
        C.documents(tmp_path)
    (tmp_path / source.archive).write_bytes(b"something else")
    with pytest.raises(C.CorpusError, match="SHA-256"):
        C.checked(source, tmp_path)


def test_fetch_without_the_client_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(C.CorpusError, match="npm"):
        C.fetch(tmp_path / "corpus")
