"Rows to binidx and back: against a slow conversion written here, in several processes, interrupted, refused, and from a shell."
import gzip
import json
import operator
import os
import re
import struct
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rwkv_peft import cli
from rwkv_peft.data import convert as module
from rwkv_peft.data.binidx import Binidx, BinidxWriter
from rwkv_peft.data.convert import repeat, summary, to_binidx, to_jsonl, trainer_words
from rwkv_peft.data.rows import DataError
from rwkv_peft.data.workers import in_order
from rwkv_peft.model.tokenizer import Bytes, World

TEXTS = ["aa", "a longer row, with\n\nlines", "你好，世界。", "😀👩‍👩‍👧", "NUL \x00 and \x17", "<script>", "Ünïcode\u2028line\u0085s", "7"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


def rows_of(texts): return "".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts))


def documents(path): return [d.tolist() for d in Binidx(path)]


def slow_pair(documents):
    "The bytes of .bin and .idx by struct alone."
    sizes = [len(d) for d in documents]
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1) + struct.pack(f"<{len(sizes)}i", *sizes)
    idx += struct.pack(f"<{len(sizes)}q", *(2 * sum(sizes[:i]) for i in range(len(sizes)))) + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return b"".join(struct.pack("<H", t) for d in documents for t in d), idx


# ---- what json2binidx makes

@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_in_the_files_order_byte_for_byte(tmp_path, ending, last):
    text = ("\n" + rows_of(TEXTS)).replace("\n", ending) + "  " + ending
    (tmp_path / "x.jsonl").write_bytes((text if last else text.rstrip()).encode())
    found = to_binidx(tmp_path / "x.jsonl", tmp_path / "out" / "x", shuffle=False)
    assert ((tmp_path / "out/x.bin").read_bytes(), (tmp_path / "out/x.idx").read_bytes()) == slow_pair([World().encode(t) + [0] for t in TEXTS])
    assert found["rows"] == found["documents"] == len(TEXTS) and found["dtype"] == "uint16" and found["seed"] is None
    assert sorted(os.listdir(tmp_path / "out")) == ["x.bin", "x.idx"]


def test_without_the_end_of_documents(tmp_path):
    to_binidx([{"text": t} for t in TEXTS], tmp_path / "x", shuffle=False, append_eod=False)
    assert documents(tmp_path / "x") == [World().encode(t) for t in TEXTS]


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8), st.booleans())
def test_any_text_there_and_back(tmp_path_factory, texts, bytes_):
    folder, tokenizer = tmp_path_factory.mktemp("any"), Bytes() if bytes_ else World()
    (folder / "x.jsonl").write_text(rows_of(texts), encoding="utf-8")
    to_binidx(folder / "x.jsonl", folder / "x", shuffle=False, tokenizer=tokenizer)
    assert documents(folder / "x") == [tokenizer.encode(t) + [0] for t in texts]
    to_jsonl(folder / "x", folder / "back.jsonl", tokenizer=tokenizer)
    assert [json.loads(line) for line in (folder / "back.jsonl").read_bytes().split(b"\n")[:-1]] == [{"text": t} for t in texts]


# ---- what make_data.py makes

@pytest.mark.parametrize("group", [1, 9, 1 << 22])
def test_each_epoch_is_every_row_in_an_order_of_its_own(tmp_path, monkeypatch, group):
    monkeypatch.setattr(module, "GROUP", group)
    texts = [f"row {i} " * (i % 5 + 1) for i in range(23)]
    found = to_binidx(texts, tmp_path / "x", epochs=4, seed=3)
    made = documents(tmp_path / "x")
    epochs = [made[i:i + 23] for i in range(0, 92, 23)]
    expected = Counter(tuple(World().encode(t) + [0]) for t in texts)
    assert len(made) == found["documents"] == 92 and all(Counter(map(tuple, e)) == expected for e in epochs)
    assert len({str(e) for e in epochs}) == 4                                     # no two epochs alike
    to_binidx(texts, tmp_path / "again", epochs=4, seed=3)
    to_binidx(texts, tmp_path / "other", epochs=4, seed=4)
    assert documents(tmp_path / "again") == made != documents(tmp_path / "other")
    to_binidx(texts, tmp_path / "plain", epochs=2, shuffle=False)
    assert documents(tmp_path / "plain") == 2 * [World().encode(t) + [0] for t in texts]


def test_a_pair_is_repeated_as_it_stands(tmp_path):
    with BinidxWriter(tmp_path / "x", np.int32) as writer:
        for d in ([70000, 1], [], [0], [5, 0]): writer.add(d)
    found = to_binidx(tmp_path / "x.idx", tmp_path / "y", epochs=3, shuffle=False)
    assert documents(tmp_path / "y") == 3 * [[70000, 1], [], [0], [5, 0]] and found["dtype"] == "int32"
    repeat(Binidx(tmp_path / "x"), tmp_path / "z", epochs=1, seed=1)
    assert sorted(documents(tmp_path / "z")) == sorted([[70000, 1], [], [0], [5, 0]])


# ---- several processes

def counted(n, taken):
    for i in range(n):
        taken.append(i)
        yield i


@pytest.mark.timeout(120)
def test_processes_keep_the_order_and_a_bound():
    taken, seen = [], []
    for n in in_order(operator.neg, counted(200, taken), 2):
        seen.append(-n)
        assert len(taken) <= len(seen) + 6
    assert seen == taken == list(range(200))


@pytest.mark.timeout(120)
def test_several_processes_write_the_same_pair(tmp_path, monkeypatch):
    texts = [f"{i}: " + TEXTS[i % len(TEXTS)] * (i % 7 + 1) for i in range(30_000)]
    (tmp_path / "x.jsonl").write_text(rows_of(texts), encoding="utf-8")
    said = []
    to_binidx(tmp_path / "x.jsonl", tmp_path / "one", shuffle=False)
    monkeypatch.setattr(module, "ALONE", 0)
    found = to_binidx(tmp_path / "x.jsonl", tmp_path / "two", shuffle=False, workers=2, tell=lambda *a: said.append(a))
    assert found["workers"] == 2 and found["rows"] == 30_000
    for end in ("bin", "idx"): assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"two.{end}").read_bytes()
    size = (tmp_path / "x.jsonl").stat().st_size
    assert said[-1] == ("encode", size, size) and [d for _, d, _ in said] == sorted(d for _, d, _ in said) and len(said) > 2
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")
    lines[25_000] = '{"text": '
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl line 25001 isn't JSON"): to_binidx(tmp_path / "x.jsonl", tmp_path / "three", workers=2)
    assert not list(tmp_path.glob("three*")) and not list(tmp_path.glob(".convert*"))


def test_what_may_not_travel_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ALONE", 0)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    found = to_binidx(tmp_path / "x.jsonl", tmp_path / "x", template=lambda messages: [(m["content"] + "!", True) for m in messages], workers=2)
    assert found["workers"] == 1 and World().decode(Binidx(tmp_path / "x")[0]) == "a!b!"


# ---- turns, ids and what a pair can't keep

def test_ids_end_once(tmp_path):
    to_binidx([{"input_ids": [5, 6]}, {"input_ids": [7, 0]}], tmp_path / "x", shuffle=False)
    assert documents(tmp_path / "x") == [[5, 6, 0], [7, 0]]
    with pytest.raises(DataError, match="uint16 holds"): to_binidx([{"input_ids": [70000]}], tmp_path / "y")


@pytest.mark.parametrize("name, text", [("x.csv", "text\naa\nbb\n"), ("x.json", '["aa", "bb"]'), ("x.jsonl.gz", '{"text": "aa"}\n{"text": "bb"}\n'), ("x.txt", "aa\nbb\n")])
def test_other_sources(tmp_path, name, text):
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = to_binidx(tmp_path / name, tmp_path / "x", shuffle=False)
    expected = ["aa\nbb"] if name == "x.txt" else ["aa", "bb"]
    assert [World().decode(d).rstrip("\n") for d in Binidx(tmp_path / "x")] == expected and found["rows"] == len(expected)


def test_slices_and_other_keys(tmp_path):
    texts = [f"row {i}" for i in range(2500)]
    found = to_binidx([{"content": t} for t in texts], tmp_path / "x", shuffle=False, split="train[1:2200]", fields={"text": "content"})
    assert [World().decode(d) for d in Binidx(tmp_path / "x")] == texts[1:2200] and found["rows"] == 2199
    with pytest.raises(DataError, match="split"): to_binidx(tmp_path / "x.bin", tmp_path / "y", split="train[:3]")


def test_turns_go_through_their_template(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi\n\nthere"}, {"role": "assistant", "content": "Hello."}]}, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "weight": 2, "source": "web"}]
    found = to_binidx(rows, tmp_path / "x", shuffle=False)
    assert [World().decode(d) for d in Binidx(tmp_path / "x")] == ["User: Hi\nthere\n\nAssistant: Hello.", "User: x\n\nAssistant: y"]
    assert found["shape"] == "messages" and found["template"] == "rwkv" and found["weighted"] == 1 and found["ignored"] == ["source"]
    told = summary(found)
    assert "template rwkv" in told and "every token" in told and "source" in told and "1 rows have a weight" in told


# ---- refusals

@pytest.mark.parametrize("text, words", [
    ('{"text": "a"}\n{"text": "b"', ["x.jsonl line 2 isn't JSON"]),
    ('{"text": "a"}\n\n{"text": " "}\n', ["x.jsonl line 3", "empty"]),
    ('{"text": "a"}\n{"prompt": "b", "completion": "c"}\n', ["x.jsonl line 2", "x.jsonl line 1", "one shape"]),
    ('{"txt": "a"}\n', ["x.jsonl line 1", "'txt'"]),
    ('{"text": "\\ud800"}\n', ["x.jsonl line 1", "half a character"]),
    ("", ["x.jsonl", "no rows"]),
    ("\n \n", ["x.jsonl", "no rows"]),
])
def test_bad_rows_leave_nothing_behind(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError) as error: to_binidx(tmp_path / "x.jsonl", tmp_path / "out", epochs=2)
    assert all(w in str(error.value) for w in words), error.value
    assert os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize("stage", ["encode", "shuffle"])
def test_an_interrupt_leaves_nothing_behind(tmp_path, stage):
    def tell(what, done, of):
        if what == stage: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): to_binidx(["a", "b"], tmp_path / "x", tell=tell)
    assert not os.listdir(tmp_path)


def test_what_is_there_stays(tmp_path):
    to_binidx(["a"], tmp_path / "x")
    before = (tmp_path / "x.bin").read_bytes()
    for name in ("x", "x.bin"):
        with pytest.raises(DataError, match="is there already.*--force"): to_binidx(["b"], tmp_path / name)
    with pytest.raises(DataError): to_binidx([""], tmp_path / "x", force=True)
    assert (tmp_path / "x.bin").read_bytes() == before
    to_binidx(["b"], tmp_path / "x", force=True)
    assert documents(tmp_path / "x") == [World().encode("b") + [0]]
    to_jsonl(tmp_path / "x", tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="is there already"): to_jsonl(tmp_path / "x", tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="without .jsonl"): to_binidx(["a"], tmp_path / "y.jsonl")


@pytest.mark.parametrize("wrong, words", [(dict(epochs=0), "epochs=0"), (dict(epochs=True), "epochs"), (dict(workers=0), "workers"), (dict(seed=-1), "seed"), (dict(template="bott"), "bott")])
def test_wrong_settings(tmp_path, wrong, words):
    with pytest.raises(DataError, match=words): to_binidx([{"prompt": "a", "completion": "b"}], tmp_path / "x", **wrong)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ids, words", [([5, 0, 6, 0], "id 0 at place 1"), ([65535, 0], "id 65535 at place 0"), ([0, 33, 0], "id 0 at place 0"), (World().encode("é")[:1] + [0] if len(World().encode("é")) > 1 else [196, 0], "UTF-8")])
def test_documents_that_are_no_text(tmp_path, ids, words):
    with BinidxWriter(tmp_path / "x") as writer:
        writer.add([33, 0])
        writer.add(ids)
    with pytest.raises(DataError, match=f"document 1 .*{words}"): to_jsonl(tmp_path / "x", tmp_path / "x.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]
    to_jsonl(tmp_path / "x", tmp_path / "x.jsonl", ids=True)
    assert [json.loads(line) for line in open(tmp_path / "x.jsonl")] == [{"input_ids": [33, 0]}, {"input_ids": ids}]


def test_documents_without_an_end_are_counted(tmp_path):
    to_binidx(["a", "b"], tmp_path / "x", append_eod=False)
    assert to_jsonl(tmp_path / "x", tmp_path / "x.jsonl")["unended"] == 2


# ---- the trainer's words

def test_words_for_the_trainer():
    assert trainer_words("data/minipile.bin", 1498226207, 4096) == "--data_file data/minipile --my_exit_tokens 1498226207 --magic_prime 365759 --ctx_len 4096"
    assert "RWKV-LM refuses" in trainer_words("x", 1000, 100) and "three windows" in trainer_words("x", 10, 100)


# ---- from a shell

def shell(capsys, *words):
    with pytest.raises(SystemExit) as end: cli.main(list(map(str, words)))
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_a_shell_converts_there_and_back(capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text(rows_of(TEXTS), encoding="utf-8")
    code, out, err = shell(capsys, "data", "convert", tmp_path / "x.jsonl", tmp_path / "x", "--epochs", 40, "--ctx-len", 16)
    tokens = 40 * sum(len(World().encode(t)) + 1 for t in TEXTS)
    assert code == 0 and err == "" and f"{40 * len(TEXTS)} documents, {tokens:,} tokens" in out
    prime = int(re.search(r"--my_exit_tokens (\d+) --magic_prime (\d+) --ctx_len 16", out)[2])
    assert f"--data_file {tmp_path / 'x'} --my_exit_tokens {tokens} " in out and prime % 3 == 2 and prime < tokens / 16
    code, out, err = shell(capsys, "data", "convert", tmp_path / "x.bin", tmp_path / "back.jsonl")
    assert code == 0 and Counter(json.loads(line)["text"] for line in open(tmp_path / "back.jsonl", encoding="utf-8")) == dict.fromkeys(TEXTS, 40)
    code, out, err = shell(capsys, "data", "convert", tmp_path / "x.bin", tmp_path / "ids.jsonl", "--ids")
    assert code == 0 and len(open(tmp_path / "ids.jsonl").readlines()) == 40 * len(TEXTS)


def test_a_shell_renames_and_slices(capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}\n{"q": "e", "a": "f"}\n')
    code, out, err = shell(capsys, "data", "convert", tmp_path / "x.jsonl", tmp_path / "x", "--field", "prompt=q", "--field", "completion=a", "--split", "train[1:]", "--template", "rwkv", "--no-shuffle", "--tokenizer", "bytes")
    assert code == 0 and [Bytes().decode(d) for d in Binidx(tmp_path / "x")] == ["User: c\n\nAssistant: d", "User: e\n\nAssistant: f"]
    assert "pair through the template rwkv, bytes tokenizer" in out and "every token" in out


@pytest.mark.parametrize("words, said", [
    (["x.jsonl", "there"], "--force"), (["x.jsonl", "y", "--field", "text"], "OURS=YOURS"), (["x.jsonl", "y", "--field", "txet=text"], "did you mean 'text'"), (["nowhere.jsonl", "y"], "nowhere.jsonl"), (["nowhere.bin", "y.jsonl"], "nowhere"), (["x.jsonl", "y", "--epochs", "0"], "epochs"),
    (["x.jsonl", "y", "--tokenizer", "word"], "world or bytes"), (["x.jsonl", "y", "--ids"], "--ids"), (["there.bin", "y.jsonl", "--epochs", "2"], "--epochs"), (["x.jsonl"], "OUT"), (["x.jsonl", "y.jsonl"], "without .jsonl"),
])
def test_a_shell_says_what_is_wrong_in_a_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    to_binidx(["a"], "there")
    code, out, err = shell(capsys, "data", "convert", *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err, err
    assert sorted(os.listdir(tmp_path)) == ["there.bin", "there.idx", "x.jsonl"]


# ---- large files, in a process of its own

MEASURED = """
import resource, sys
from rwkv_peft.data.convert import to_binidx
if __name__ == "__main__":
    to_binidx(["warm"], sys.argv[2] + "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    to_binidx(sys.argv[1], sys.argv[2], epochs=2, workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.timeout(120)
def test_memory_does_not_follow_the_file(tmp_path):
    "What 64 MB of rows take beyond what one row takes: blocks of 1 MB and groups of 8 MB, but neither the file nor its ids."
    line = json.dumps({"text": "A line of text, neither long nor short, 12345. " * 40}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * (64_000_000 // len(line)))
    (tmp_path / "measure.py").write_text(MEASURED)
    ran = subprocess.run([sys.executable, tmp_path / "measure.py", tmp_path / "big.jsonl", tmp_path / "big"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 42_000
