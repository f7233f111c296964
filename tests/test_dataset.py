"What the views of a data set say, against figures computed another way, and the same views in the terminal."
import json
import re
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from markup import Markup
from rwkv_peft import cli
from rwkv_peft.data.masks import Example, encode_segments
from rwkv_peft.data.records import Dataset, load_encoded, read_data, save_encoded
from rwkv_peft.data.rows import DataError
from rwkv_peft.data.stored import Stored
from rwkv_peft.data.views import LOOKED_AT, minhash, normal, padding_efficiency, percentile, repeats, sample_of, shingles, show_text, visible
from rwkv_peft.model.tokenizer import Bytes, World

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
PAIRS = [{"prompt": f"What is {a} + {b}?", "completion": " " + str(a + b) * (1 + a)} for a in range(6) for b in range(5)]


def pair(*said): return [{"prompt": p, "completion": c} for p, c in said]


def both(rows, tmp_path, **told):
    "The same rows as a list and from disk."
    return read_data(rows, World(), **told), read_data(rows, World(), cache=tmp_path, workers=1, **told)


def problems(data, *rest): return [(p["row"], p["problem"]) for p in data.check(*rest)]


def test_a_list_and_the_disk_say_the_same(tmp_path):
    rows = PAIRS + PAIRS[:2] + pair(("What is LoRA?", "A thin one"), ("a", " \ufffd"))
    for told in ({}, {"loss_mask": "all"}, {"ctx_len": 9, "long": "cut"}, {"ctx_len": 12, "long": "drop"}):
        listed, kept = both(rows, tmp_path, **told)
        assert isinstance(kept.examples, Stored) and isinstance(listed.examples, list)
        assert {**listed.report(), "source": 0} == {**kept.report(), "source": 0} and listed.check() == kept.check() and listed.fingerprint() == kept.fingerprint()
        assert listed.contents() == kept.contents() and listed.tokens == kept.tokens and listed.trained == kept.trained and repr(listed) == repr(kept)
        assert [listed.show(i) for i in range(len(listed))] == [kept.show(i) for i in range(len(kept))] and [listed.where(i) for i in (0, -1)] == [kept.where(i) for i in (0, -1)]
        for a, b in ((listed.split(.2, 3), kept.split(.2, 3)), ((listed.dedup(),), (kept.dedup(),)), ((listed[2:9:2],), (kept[2:9:2],))):
            assert [x.fingerprint() for x in a] == [x.fingerprint() for x in b] and [x.facts.get("repeated") for x in a] == [x.facts.get("repeated") for x in b]
    json.dumps(kept.report())


def test_figures_by_hand():
    data = read_data(PAIRS, Bytes())
    lengths = sorted(len(p["prompt"]) + len(p["completion"]) + 1 for p in PAIRS)
    report = data.report(micro_bsz=4, rows_per_step=7)
    assert report["tokens"] == sum(lengths) and report["trained_tokens"] == sum(len(p["completion"]) + 1 for p in PAIRS)
    assert (report["length_p50"], report["length_p95"], report["length_max"]) == (lengths[14], lengths[28], lengths[-1])
    assert (report["steps_per_epoch"], report["empty"], report["bad_characters"], report["duplicates"]) == (5, 0, 0, 0)


def test_a_report_says_in_words_what_is_there_and_in_one_line_what_isnt():
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d \ufffd"}, {"prompt": "a", "completion": " b", "lang": 1}]
    said, told = repr(read_data(rows, Bytes()).report()), repr(read_data(rows, Bytes()).report(2, 4))
    assert re.search(r"^checked +no empty rows, no rows that can't be used, no unknown roles, no bytes that aren't UTF-8$", said, re.M) and not re.search(r" 0$", said, re.M)
    assert re.search(r"^duplicates +1$", said, re.M) and re.search(r"^rows with lost characters +1$", said, re.M) and "keys that aren't used: lang" in said
    assert "of a batch, if micro_bsz = 8" in said and "if 16 rows a step" in said and "of a batch, with micro_bsz = 2" in told and "with 4 rows a step" in told and " if " not in told
    assert re.search(r"^median length +4 tokens$", said, re.M) and "lengths, 0 to 8 tokens" in said


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=50), st.integers(1, 9), st.floats(0, 1))
def test_percentiles_and_padding_by_a_slow_way(lengths, micro_bsz, q):
    ordered, real, all_ = sorted(lengths), 0, 0
    for i in range(0, len(ordered), micro_bsz):
        group = ordered[i:i + micro_bsz]
        real, all_ = real + sum(group), all_ + len(group) * max(group)
    assert padding_efficiency(lengths, micro_bsz) == pytest.approx(real / max(1, all_))
    assert percentile(lengths, q) == next(n for n in ordered if sum(m <= n for m in ordered) >= q * len(ordered))


# ---- the mask doctor

@pytest.mark.parametrize("rows, told, row, said", [
    (pair(("", "all of it"), ("a", " b")), {}, "row 0", "every token is trained"),
    (pair(("", "all of it")), {"loss_mask": "all"}, None, None),
    ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}], {}, "all rows", "end is never trained"),
    (pair(("a", " b")), {"eos": False}, "all rows", "eos=False"),
    (pair(("a", " b c d e f g h")), {"ctx_len": 6, "long": "cut"}, "row 0", "breaks off"),
    (pair(("a", " b"), ("a", " b")), {}, "row 1", "the same as row 0"),
    ([{"input_ids": [0, 5, 65_531, 0]}], {}, "row 0", "the id 65531"),
    (pair(("a", " b")), {}, None, None),
])
def test_each_ailment_has_its_row(tmp_path, rows, told, row, said):
    for data in both(rows, tmp_path, **told):
        found = problems(data)
        if row is None: assert found == []
        else: assert [where for where, problem in found if said in problem] == [row], found


def test_untrained_rows_and_ids_below_zero_in_a_data_set_made_by_hand():
    data = Dataset([Example(torch.tensor([0, 5, 0]), torch.zeros(3), 1), Example(torch.tensor([0, -1, 0]), torch.tensor([0., 1., 1.]), 2)], World())
    assert [(row, problem[:19]) for row, problem in problems(data) if "id" not in problem.split()[:1]][0] == ("row 1", "no token is trained")
    assert any(row == "row 2" and "the id -1" in problem for row, problem in problems(data))


def test_rows_that_are_held_out_too(tmp_path):
    for train in both(PAIRS[:10], tmp_path):
        for held in both(PAIRS[8:14], tmp_path):
            assert [row for row, problem in problems(train, held) if "held out too" in problem] == ["row 8", "row 9"] and "(row 0)" in dict(problems(train, held))["row 8"]
            assert problems(train, held[2:]) == []


def test_a_sample_is_said(monkeypatch):
    from rwkv_peft.data import views
    assert sample_of(5).tolist() == [0, 1, 2, 3, 4] and len(sample_of(10 * LOOKED_AT)) == LOOKED_AT and sample_of(10 * LOOKED_AT)[-1] == 10 * LOOKED_AT - 1
    data = read_data(pair(*[(str(n), f" {n}\ufffd") for n in range(100)]), World())
    monkeypatch.setattr(views, "sample_of", lambda n, most=0: np.arange(0, n, 10))
    report, found = data.report(), data.check()
    assert report["bad_characters"] == 10 and "10 of 100 rows" in report["notes"][-1] and len(found) == 10 and "10 of 100 rows" in found.notes[0] and "10 of 100 rows" in repr(found) and "10 of 100" in found._repr_html_()


# ---- repeats

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a b", "a  b", " a b\n", "ａ b", "A b", "ﬁ", "fi", "", " ", "é", "e\u0301", "①", "1"]), max_size=12))
def test_exact_repeats(texts):
    seen, wanted = [], []
    for i, text in enumerate(texts):
        key = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
        if key in [k for k, _ in seen]: wanted.append((i, dict(seen)[key]))
        else: seen.append((key, i))
    assert repeats(texts) == wanted


def jaccard(a, b):
    runs = lambda t: {t[i:i + 5] for i in range(max(1, len(t) - 4))}
    a, b = runs(normal(a)), runs(normal(b))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("near", [.5, .65, .8, .95])
def test_near_repeats_against_all_pairs(near):
    random = np.random.default_rng(1)
    words = [f"w{i}x" for i in range(300)]
    base = [[words[k] for k in random.integers(0, 300, 40)] for _ in range(30)]
    texts = [" ".join(t) for t in base]
    for t in base:
        for changes in (1, 3, 8): texts.append(" ".join(words[random.integers(0, 300)] if i in set(random.integers(0, 40, changes).tolist()) else w for i, w in enumerate(t)))
    kept, wanted = [], set()
    for i, text in enumerate(texts):
        if any(jaccard(text, texts[j]) >= near for j in kept): wanted.add(i)
        else: kept.append(i)
    found = repeats(texts, near)
    assert all(jaccard(texts[i], texts[j]) >= near for i, j in found)      # what is found is alike, whatever the sampling did
    assert len(wanted ^ {i for i, _ in found}) <= len(wanted) // 20 and len(wanted) > 10


def test_minhash_is_a_fair_sample():
    random = np.random.default_rng(0)
    for share in (.1, .5, .9):
        n, same = 2000, int(2000 * share)
        ids = np.unique(random.integers(0, 2**31 - 1, 5000).astype(np.uint64))
        a, b = ids[:n], np.concatenate([ids[:same], ids[n:2 * n - same]])
        assert abs((minhash(a) == minhash(b)).mean() - same / (2 * n - same)) < .2


def test_dedup_counts_what_went_and_lists_it():
    data = read_data(PAIRS[:3] + PAIRS[:2], World())
    once = data.dedup()
    assert len(once) == 3 and once.facts["repeated"] == [3, 4] and "2 rows that repeat another were left out: 3, 4" in repr(once.report())
    assert ("row 3", "repeats another row and was left out") in problems(once) and once.dedup().facts == once.facts and data.facts.get("repeated") is None
    for near in (.3, 1.2):
        with pytest.raises(DataError, match="0.5 to 1"): data.dedup(near)
    with pytest.raises(DataError, match="tokenizer"): Dataset(data.examples).dedup()
    assert shingles("").size and not len(repeats(["", "x"], .8))


# ---- the terminal

@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_nothing_in_a_row_moves_the_cursor(text):
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\u200d"] and shown.count("\n") == text.count("\n")
    assert visible("plain 你好 😀") == "plain 你好 😀" and visible("\x1b[2J\u202e\x9b") == "\\x1b[2J\\u202e\\x9b"


def test_reports_and_problems_are_plain_text_that_moves_nothing():
    data = read_data([{"text": "\x1b[2J\u202eשלוםمرحبا\x1b[0m", "\x1b[31m\u2066key": "b"}] * 2, World())
    data.facts.update(source="\x1b]0;x\x07 \u202efile", place="\x1b[1mשורה")
    for said in (repr(data.report()), repr(data.check())):
        assert not [c for c in said if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"], said
    assert "שורה" in repr(data.check()) and "\\u202efile" in repr(data.report())                 # letters that run from right to left stay
    assert "\\x1b[2J\\u202eשלוםمرحبا" in show_text(data[0], World())


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT)
def test_the_terminal_underlines_what_is_trained(prompt, answer):
    e = encode_segments([(prompt, 0), (answer, 1)], World())
    plain, coloured = (show_text(e, World(), "row 1", colour=c) for c in (False, True))
    trained = re.findall("\x1b\\[4;34m(.*?)\x1b\\[0m", coloured, re.S)
    assert trained == [visible(answer) + "∎"] and coloured.replace("\x1b[4;34m", "").replace("\x1b[0m", "").split("\nrow 1:")[0] == "∎" + visible(prompt) + visible(answer) + "∎"
    assert "\x1b" not in plain


def shell(capsys, *words):
    with pytest.raises(SystemExit) as end: cli.main(list(words))
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_data_verbs(capsys, tmp_path):
    file, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in PAIRS[:4]), encoding="utf-8")
    other.write_text(json.dumps(PAIRS[2]) + "\n" + json.dumps({"prompt": "x\u001b[2J", "completion": " y\u001b]0;z\u0007"}) + "\n", encoding="utf-8")
    code, out, err = shell(capsys, "data", "report", str(file), "--ctx-len", "7")
    assert code == 0 and re.search(r"^rows +4$", out, re.M) and "were cut" in out
    assert shell(capsys, "data", "check", str(file)) == (0, "no problems found\n", "")
    code, out, err = shell(capsys, "data", "check", str(file), "--held-out", str(other))
    assert code == 1 and out.count("\n") == 1 and "line 3: is held out too" in out
    code, out, err = shell(capsys, "data", "show", str(other), "--row", "2")
    assert code == 0 and "\x1b" not in out and "\\x1b[2J" in out and "⟦" in out and "line 2" in out
    for words, said in ((("show", str(file), "--row", "9"), "1 to 4"), (("report", "nowhere.jsonl"), "nowhere.jsonl"), (("check", str(file), "--loss-mask", "asistant"), "assistant"), (("report", str(file), "--tokenizer", "gpt"), "gpt")):
        code, out, err = shell(capsys, "data", *words)
        assert code == 2 and said in err and err.count("\n") == 1


BAD = [("line 2", b'{"prompt": "a", "compl'), ("line 3", b'{"prompt": "a", "completion": "caf\xe9"}'), ("line 5", b'{"messages": [{"role": "asistant", "content": "b"}]}'), ("line 6", b'{"prompt": "a", "completion": ""}'),
       ("line 7", b'{"text": "another shape"}'), ("line 9", b"7")]


def with_bad_rows(path):
    lines = {int(where.split()[1]): line for where, line in BAD}
    path.write_bytes(b"\n".join(lines.get(n) or json.dumps(PAIRS[n]).encode() for n in range(1, 11)) + b"\n")
    return path


def test_every_bad_row_is_listed_when_told_to_go_on(tmp_path):
    file, good = with_bad_rows(tmp_path / "bad.jsonl"), [PAIRS[n] for n in (1, 4, 8, 10)]
    with pytest.raises(DataError, match="line 2 isn't JSON"): read_data(file, World())
    wanted = read_data(good, World())
    for told in ({}, {"cache": tmp_path / "cache", "workers": 1}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "other", "workers": 2}):
        data, report = (d := read_data(file, World(), bad="drop", **told)), d.report()
        assert [e.row for e in data] == [1, 4, 8, 10] and data.contents() == wanted.contents()
        assert (report["rows"], report["bad_rows"], report["odd_roles"], report["invalid_utf8"]) == (4, 6, 1, 1) and "6 rows that can't be used" in repr(report)
        found = [p for p in problems(data) if "left out" in p[1]]
        assert [row for row, _ in found] == [f"{file} {where}" for where, _ in BAD]
        for (_, problem), word in zip(found, ("isn't JSON", "isn't UTF-8", "'asistant'", "is empty", "one shape", "int"), strict=True): assert word in problem and str(file) + " line " + problem not in problem
    with pytest.raises(DataError, match="line 2 isn't JSON"): read_data(file, World(), cache=tmp_path / "cache")      # what was kept is another reading
    save_encoded(data, tmp_path / "kept")
    assert load_encoded(tmp_path / "kept").check() == data.check()


@pytest.mark.parametrize("rows", [[7, {"prompt": "a"}], (r for r in [7])])
def test_nothing_but_bad_rows(rows):
    with pytest.raises(DataError, match="no row that can be used.*row 0 is int"): read_data(rows, World(), bad="drop")


def test_bad_lines_of_a_table_and_of_an_iterator(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,completion\na,b\nc\nd,e\n")
    data = read_data(tmp_path / "t.csv", World(), bad="drop")
    assert [e.row for e in data] == [2, 4] and "1 cells for 2 columns" in data.facts["bad"][0][1]
    data = read_data(iter([7, PAIRS[0], {}, PAIRS[1]]), World(), bad="drop")
    assert [e.row for e in data] == [1, 3] and [n for n, _ in data.facts["bad"]] == [0, 2] and data.where(1) == "row 3"
    with pytest.raises(DataError, match="bad='skip'"): read_data(PAIRS, World(), bad="skip")


def test_a_shell_lists_bad_rows(capsys, tmp_path):
    file = with_bad_rows(tmp_path / "bad.jsonl")
    code, out, _ = shell(capsys, "data", "check", str(file))
    assert code == 1 and [line.split(": ")[0] for line in out.splitlines()] == [f"{file} {where}" for where, _ in BAD]
    code, out, _ = shell(capsys, "data", "report", str(file))
    assert code == 0 and re.search(r"^rows that can't be used +6$", out, re.M) and re.search(r"^unknown roles +1$", out, re.M)
    code, out, err = shell(capsys, "data", "show", str(file), "--row", "5")
    assert code == 2 and "'asistant'" in err


def test_slow_encoding_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    from rwkv_peft.data import records
    said, now = [], iter(range(0, 1000, 4))
    monkeypatch.setattr(records.time, "monotonic", lambda: next(now))
    tell = records.lines_of(5)
    for done in range(10): tell("encode", done, 10)
    assert capsys.readouterr().out == "encode: 10% after 8 s\nencode: 30% after 16 s\nencode: 70% after 32 s\n"
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    read_data(tmp_path / "r.jsonl", World(), cache=tmp_path / "cache", tell=lambda *a: said.append(a))
    size = (tmp_path / "r.jsonl").stat().st_size
    assert said == [("encode", size, size)]


def test_a_page_of_markup_stays_text(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    for data in both(pair((evil, evil)), tmp_path):
        for html in (data.show(0), data.report()._repr_html_(), data.check()._repr_html_()):
            assert not set(Markup(html).tags) & {"script", "img"}
        assert evil in Markup(data.show(0)).text


# ---- the benchmark

def test_bench_data_measures_a_process_of_its_own(capsys, tmp_path, monkeypatch):
    from rwkv_peft.bench import data as bench
    count = bench.make_rows(tmp_path / "r.jsonl", 50_000)
    rows = [json.loads(line)["text"] for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(set(rows)) == len(rows) == count and 50_000 <= (tmp_path / "r.jsonl").stat().st_size < 54_000
    monkeypatch.setattr(bench, "measure_file", lambda size, workers: {"bytes": size, "rows": 2, "tokens": 3, "seconds": size / 25e6, "own": 2**28, "worker": 0, "workers": 1, "peak": 2**28 + size / 100, "mb_per_second": 25.0})
    code, out, _ = shell(capsys, "bench", "data", "--size", "1000", "--check")
    assert code == 0 and "25.0" in out and "2 hold, 0 fail" in out
