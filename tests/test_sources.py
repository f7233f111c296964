"Sources and rows: every format gives the same rows, every slice is Python's, every refusal names its place."
import bz2
import csv
import gzip
import io
import json
import lzma
import math
import pickle
import re
import tracemalloc

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from rwkv_peft.data.chat import rwkv, segments_of
from rwkv_peft.data.rows import DataError, check_row
from rwkv_peft.data.sources import FORMATS, bounds_of, iter_rows, open_source, parse_block, parse_split, read_rows, sniff

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PAIRS = [{"prompt": "q" * i, "completion": f"答 {i}\n😀"} for i in range(7)]


def refused(*said): return pytest.raises(DataError, match=re.compile(".*".join(map(re.escape, said))))


def contents(source, **options): return [r.content for r in read_rows(source, **options)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows): return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def as_csv(rows, **options):
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), **options)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


# ---- one content, every source

def every_source(folder):
    table = pd.DataFrame(PAIRS)
    table.to_parquet(folder / "a.parquet", row_group_size=3)
    files = {"a.jsonl": jsonl(PAIRS), "bom.jsonl": "\ufeff" + jsonl(PAIRS), "dos.jsonl": jsonl(PAIRS).replace("\n", "\r\n"), "array.jsonl": json.dumps(PAIRS), "lines.txt": jsonl(PAIRS), "unknown": jsonl(PAIRS), "lines.json": jsonl(PAIRS),
             "a.json": json.dumps(PAIRS, indent=1), "data.json": json.dumps({"version": 1, "data": PAIRS}), "a.csv": as_csv(PAIRS), "bom.csv": "\ufeff" + as_csv(PAIRS), "semicolon.csv": as_csv(PAIRS, delimiter=";"),
             "a.tsv": as_csv(PAIRS, delimiter="\t"), "pandas.csv": table.to_csv(index=False), "a.jsonl.gz": gzip.compress(jsonl(PAIRS).encode()), "a.csv.bz2": bz2.compress(as_csv(PAIRS).encode()), "a.json.xz": lzma.compress(json.dumps(PAIRS).encode())}
    for name, content in files.items(): yield name, lambda path=write(folder / name, content): path
    yield "parquet", lambda: folder / "a.parquet"
    yield "text path", lambda: str(folder / "a.jsonl")
    yield "list", lambda: PAIRS
    yield "tuple", lambda: tuple(PAIRS)
    yield "iterator", lambda: iter(PAIRS)
    yield "generator", lambda: (r for r in PAIRS)
    yield "values", lambda: {i: r for i, r in enumerate(PAIRS)}.values()
    yield "array", lambda: np.array(PAIRS, dtype=object)
    yield "pandas", lambda: table
    yield "odd index", lambda: table.set_index(pd.Index([3, 1, 2, 9, 9, 5, 0]))
    yield "datasets", lambda: datasets.Dataset.from_list(PAIRS)
    yield "formatted", lambda: datasets.Dataset.from_list(PAIRS).with_format("numpy")
    yield "stream", lambda: datasets.Dataset.from_list(PAIRS).to_iterable_dataset()
    yield "dict of splits", lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS), test=datasets.Dataset.from_list(PAIRS[:1]))
    yield "one split", lambda: datasets.DatasetDict(validation=datasets.Dataset.from_list(PAIRS))


def test_every_source_gives_the_same_rows(tmp_path):
    wanted = [(r["prompt"], r["completion"]) for r in PAIRS]
    for name, get in every_source(tmp_path):
        assert contents(get()) == wanted, name
        numbers, place = [n for n, _ in open_source(get())], open_source(get()).place
        assert numbers == sorted(set(numbers)) and (min(numbers) >= 1 if place.endswith("line") else numbers == list(range(len(PAIRS)))), name      # an editor's lines, Python's indices
        for split, kept in {"[2:5]": wanted[2:5], "[:1]": wanted[:1], "[5:]": wanted[5:], "[6:99]": wanted[6:]}.items():
            assert contents(get(), split=split) == kept, (name, split)
            assert [n for n, _ in open_source(get(), split=split)] == numbers[slice(*bounds_of(*parse_split(split)[1:]))], name


def test_slices_that_count_rows(tmp_path):
    wanted = [(r["prompt"], r["completion"]) for r in PAIRS]
    for name, get in every_source(tmp_path):
        if name in ("iterator", "generator", "stream", "values"):
            if name != "values":
                with refused("needs the number of rows", "[:1000]"): read_rows(get(), split="[:-1]")
            continue
        assert contents(get(), split="[-2:]") == wanted[-2:] and contents(get(), split="[:50%]") == wanted[:round(7 * .5)], name
        with refused("no rows in split='[7:]'"): read_rows(get(), split="[7:]")


BOUND = st.none() | st.integers(-100, 100)

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), BOUND, BOUND)
def test_slices_are_those_of_datasets_and_of_python(count, start, stop):
    said = lambda unit: f"train[{':'.join('' if b is None else f'{b}{unit}' for b in (start, stop))}]"
    kept = lambda split: list(range(count))[slice(*bounds_of(*parse_split(split)[1:], count))]
    assert kept(said("")) == list(range(count))[start:stop]
    if any(b and b < 0 and not round(b * count / 100) for b in (start, stop)): return      # theirs takes the last 0 rows to be all rows
    [theirs] = datasets.ReadInstruction.from_spec(said("%")).to_absolute({"train": count})
    assert kept(said("%")) == list(range(count))[theirs.from_:theirs.to]


def test_the_last_per_cent_of_a_few_rows_are_none():
    assert bounds_of("-5%", None, 10) == (10, None) and bounds_of("-5%", "-0%", 100) == (95, 0)


@pytest.mark.parametrize("split", ["train[::2]", "train[5]", "train[:120%]", "train[a:]", "train[", "train[:1.5]", "train[5:10%]", "train[5%:10]", 7, "train+test"])
def test_splits_that_are_refused(split):
    with refused("split=", "can't be read", "train[10%:20%]"): open_source(["a"], split=split)


def test_split_names():
    both = datasets.DatasetDict(a=datasets.Dataset.from_list([{"text": "x"}]), b=datasets.Dataset.from_list([{"text": "y"}]))
    assert contents(both, split="b") == ["y"] and contents(["z"], split="train") == ["z"]
    with refused("no split 'train'", "'a', 'b'"): read_rows(both)
    with refused("no split 'c'"): read_rows(both, split="c[:1]")
    with refused("a list of 1 rows has no splits", "'train'"): read_rows(["x"], split="test")
    with refused("is the split 'a' already"): read_rows(datasets.Dataset.from_list([{"text": "x"}], split="a"), split="b")


# ---- blocks

LINE = st.one_of(st.just(""), st.just(" \t"), st.builds(lambda v, end: json.dumps({"text": v}, ensure_ascii=False) + end, ANY, st.sampled_from(["", "\r", " "])))

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE, max_size=30), st.integers(1, 200), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_blocks_cut_anywhere_give_the_same_lines(tmp_path, lines, size, start, more, bom):
    path = write(tmp_path / "a.jsonl", ("\ufeff" if bom else "") + "\n".join(lines))
    wanted = [(i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip()]
    assert list(open_source(path)) == wanted
    for split, kept in ((None, wanted), (f"[{start}:{start + more}]", wanted[start:start + more])):
        source = open_source(path, split=split)
        blocks = list(source.blocks(size))
        assert [pair for first, blob in blocks for pair in parse_block(first, blob, source.place)] == kept
        if split is None: assert b"".join(b for _, b in blocks) == "\n".join(lines).encode()
    assert source.count() == len(wanted)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["", "  ", "a", "b c", "长\u2028x"]), max_size=20), st.integers(1, 40), st.sampled_from(["\n", "\r\n"]))
def test_text_files(tmp_path, lines, size, end):
    path = write(tmp_path / "a.txt", end.join(lines))
    whole = "\n".join(lines)
    groups = []
    for i, line in enumerate(lines, 1):
        if line.strip() and i - 1 in [g[-1][0] for g in groups]: groups[-1].append((i, line))
        elif line.strip(): groups.append([(i, line)])
    for format, wanted in {"txt": [(1, whole)] if whole.strip() else [], "lines": [(i, l) for i, l in enumerate(lines, 1) if l.strip()], "paragraphs": [(g[0][0], "\n".join(l for _, l in g)) for g in groups]}.items():
        source = open_source(path, format=format)
        assert list(source) == wanted, format
        assert [pair for first, blob in source.blocks(size) for pair in parse_block(first, blob, source.place, format)] == wanted, format


def test_blocks_can_be_parsed_elsewhere():
    parse = pickle.loads(pickle.dumps(parse_block))
    with pytest.raises(DataError) as e: list(parse(40, b'"a"\n\n"b', "my.jsonl line"))
    assert str(pickle.loads(pickle.dumps(e.value))).startswith("my.jsonl line 42 isn't JSON")


# ---- tables

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"a": ANY, "b": st.text(st.sampled_from(list("x,;\t\"'\n \r")), max_size=9)}), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]))
def test_csv_cells_come_back_whole(tmp_path, rows, delimiter):
    text = as_csv(rows, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    path = write(tmp_path / "a.csv", text)
    if "\0" in text:
        with refused("NUL"): list(open_source(path))
        return
    got = list(open_source(path, format="tsv" if delimiter == "\t" else None))
    assert [v for _, v in got] == rows
    starts = [1 + as_csv(rows[:i], delimiter=delimiter, quoting=csv.QUOTE_ALL).encode().count(b"\n") if i else 2 for i in range(len(rows))]
    assert [n for n, _ in got] == starts


def test_weights_in_a_csv_file(tmp_path):
    path = write(tmp_path / "a.csv", "\n\ntext,weight,train,id\na,0.5,,7\nb,,false,8\nc,,TRUE,9\n")
    assert [(r.number, r.content, r.weight, r.ignored) for r in read_rows(path)] == [(4, "a", .5, ("id",)), (5, "b", 0, ("id",)), (6, "c", 1, ("id",))]
    with refused("a.csv line 2, key 'weight'", "'much'"): read_rows(write(path, "text,weight\na,much\n"))


def test_missing_cells_of_tables(tmp_path):
    table = pd.DataFrame({"text": ["a", None, "c"], "weight": [.5, np.nan, np.nan], "n": pd.array([1, None, 3], dtype="Int64"), "tags": [["x"], ["y"], []]})
    with refused("row 1, key 'text', is null"): read_rows(table)
    table.to_parquet(tmp_path / "a.parquet")
    for source in (table, tmp_path / "a.parquet"):
        got = [v for _, v in open_source(source)]
        assert got[1]["text"] is None and got[1]["n"] is None and got[1]["weight"] is None
        assert got[2]["text"] == "c" and got[2]["n"] == 3 and math.isclose(got[0]["weight"], .5) and list(got[0]["tags"]) == ["x"]
        assert [r.weight for r in iter_rows(source, split="[2:]")] == [1.0]
    with refused("column 'a' twice"): open_source(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_conversations_in_tables(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "input": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = [{"role": "user", "content": "a", "weight": 1.0}, {"role": "assistant", "content": "b", "weight": 1.0, "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    for source in (rows, tmp_path / "a.parquet", pd.read_parquet(tmp_path / "a.parquet"), datasets.Dataset.from_list(rows)): assert contents(source) == [wanted]
    ids = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}]
    pq.write_table(pa.Table.from_pylist(ids), tmp_path / "i.parquet")
    for source in (ids, tmp_path / "i.parquet", pd.read_parquet(tmp_path / "i.parquet"), datasets.Dataset.from_list(ids).with_format("torch")): assert contents(source) == [([1, 2, 3], [0.0, 1.0, 1.0])]


# ---- the hub: only when it is written

def test_the_hub_is_asked_only_when_written(monkeypatch, tmp_path):
    asked = []
    def load_dataset(*address, split):
        asked.append((*address, split))
        if address[0] == "no/where": raise FileNotFoundError("Dataset 'no/where' doesn't exist\non the Hub")
        return datasets.Dataset.from_list([{"text": str(i)} for i in range(10)])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with refused("owner/name is not there", "hf://datasets/owner/name"): open_source("owner/name")
    for odd in ("hf://owner/name", "hf://datasets/owner", "hf://datasets/a/b/c/d", "hf://datasets//b"):
        with refused("no complete address", "hf://datasets/owner/name"): open_source(odd)
    assert not asked
    assert contents("hf://datasets/owner/name", split="test[10%:30%]") == ["1", "2"] and contents("hf://datasets/owner/name/small")[9] == "9"
    assert asked == [("owner/name", "test"), ("owner/name", "small", "train")]
    with pytest.raises(DataError, match="can't be loaded .*doesn't exist") as e: open_source("hf://datasets/no/where")
    assert "\n" not in str(e.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner/name", '{"text": "mine"}')
    assert contents("owner/name") == ["mine"]
    with refused("format='csv' is for files"): open_source("hf://datasets/owner/name", format="csv")


# ---- what is read once, and what is too big

def test_an_iterator_is_read_once():
    numbers = (str(i) for i in range(9))
    source = open_source(numbers, split="[1:3]")
    assert [v for _, v in source] == ["1", "2"]
    with refused("was read before", "list(...)"): list(source)
    assert next(numbers) == "3"      # nothing more was taken than was asked for
    list(numbers)
    with refused("no rows", "read once"): read_rows(numbers)


def test_a_row_is_there_before_the_next_is_asked_for():
    def rows():
        yield "a"
        raise RuntimeError("asked too early")
    assert next(iter_rows(rows())).content == "a"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "gz"])
def test_memory_is_bounded(tmp_path, kind):
    rows = [{"text": f"{i} " + "word " * 400} for i in range(6000)]      # 12 MB
    path = tmp_path / {"gz": "a.jsonl.gz"}.get(kind, f"a.{kind}")
    if kind == "parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv": write(path, as_csv(rows))
    else: write(path, gzip.compress(jsonl(rows).encode(), 1) if kind == "gz" else jsonl(rows))
    del rows
    tracemalloc.start()
    count = sum(1 for _ in iter_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 6000 and peak < 6e6


def test_a_line_of_ten_megabytes(tmp_path):
    long = "长" * 3_500_000
    rows = [{"text": "a"}, {"text": long}, {"text": "b"}]
    for path in (write(tmp_path / "a.jsonl", jsonl(rows)), write(tmp_path / "a.csv", as_csv(rows))): assert contents(path) == ["a", long, "b"]
    with refused("a.jsonl line 2 isn't JSON"): read_rows(write(tmp_path / "a.jsonl", jsonl(rows)[:3_000_000]))


# ---- shapes of rows

def chat(*turns, key="messages"): return {key: list(turns)}


def says(role, content, weight=1.0, **more): return {"role": role, "content": content, "weight": weight, **more}


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

@pytest.mark.parametrize("row, shape, content", [
    ("a", "text", "a"),
    ({"instruction": "i", "input": "x", "output": "o"}, "instruct", ("i", "x", "o")),
    ({"instruction": "i", "input": None, "output": "o"}, "instruct", ("i", "", "o")),
    ({"instruction": "i", "output": "o"}, "instruct", ("i", "", "o")),
    (chat({"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}, {"from": "observation", "value": "t"}, key="conversations"), "messages", [says("system", "s"), says("user", "u"), says("assistant", "a"), says("tool", "t")]),
    (chat({"from": "user", "value": "u"}, {"from": "model", "value": "a"}), "messages", [says("user", "u"), says("assistant", "a")]),
    (chat({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, key="conversations"), "messages", [says("user", "u"), says("assistant", "a")]),
    (chat({"role": "developer", "content": ""}, {"role": "user", "content": "u", "name": "Ann"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "function", "name": "add", "content": ""}),
     "messages", [says("system", ""), says("user", "u", name="Ann"), says("assistant", "", tool_calls=[{"name": "add", "arguments": '{"a": 1}'}]), says("tool", "", name="add")]),
    (chat({"role": "assistant", "content": "a", "reasoning_content": "r"}, {"role": "assistant", "reasoning": "r"}, {"role": "assistant", "content": "a", "reasoning": ""}),
     "messages", [says("assistant", "a", reasoning="r"), says("assistant", "", reasoning="r"), says("assistant", "a")]),
    (chat({"role": "assistant", "function_call": {"name": "f", "arguments": {"名": [1.5]}}}, {"role": "assistant", "tool_calls": [{"name": "g"}]}),
     "messages", [says("assistant", "", tool_calls=[{"name": "f", "arguments": '{"名": [1.5]}'}]), says("assistant", "", tool_calls=[{"name": "g", "arguments": "{}"}])]),
    (chat({"role": "user", "content": "u", "train": False}, {"role": "assistant", "content": "a", "train": True, "weight": .5}), "messages", [says("user", "u", 0.0), says("assistant", "a", .5)]),
    ({"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]}, "segments", [("q", 0.0), ("a", 1.0)]),
    ({"segments": [["q", 0], ["a", True], ["", .5], {"text": "b", "weight": 2}, {"text": "c", "train": False}, {"text": "d"}]}, "segments", [("q", 0.0), ("a", 1.0), ("", .5), ("b", 2.0), ("c", 0.0), ("d", 1.0)]),
    ({"input_ids": [3, 0], "labels": [-100, 0]}, "ids", ([3, 0], [0.0, 1.0])),
    ({"tokens": [3, 0]}, "ids", ([3, 0], None)),
    ({"tokens": np.array([3, 0], dtype=np.uint16), "weights": [0, .5]}, "ids", ([3, 0], [0.0, .5])),
])
def test_shapes(row, shape, content):
    checked = check_row(row, 1, "row 1")
    assert (checked.shape, checked.content) == (shape, content)


def test_other_names():
    assert contents([{"dialog": [{"from": "human", "value": "a"}]}], fields={"messages": "dialog"}) == [[says("user", "a")]]
    assert contents([{"instruction": "i", "context": "c", "response": "r"}], fields={"input": "context", "output": "response"}) == [("i", "c", "r")]
    assert contents([{"ids": [1], "mask": [0]}], fields={"input_ids": "ids", "weights": "mask"}) == [([1], [0.0])]
    assert contents([{"text": "a", "tokens": 12}]) == ["a"]


def test_what_nobody_reads_is_kept_in_sight():
    row = check_row({"messages": [{"role": "user", "content": "a", "id": 1}, {"role": "tool", "content": "b", "tool_call_id": "x", "mood": None}], "topic": [], "train": True}, 1, "row 1")
    assert row.ignored == ("topic", "messages.id", "messages.tool_call_id") and row.weight == 1


def test_tools_of_a_row_stand_in_its_system_turn():
    "OpenAI keeps `tools` beside the messages; a columnar file fills absent keys with null, and some data sets keep JSON as text."
    tool = {"type": "function", "function": {"name": "add", "description": None, "parameters": {"properties": {"a": {"type": "integer"}, "b": None}, "required": ["a"]}}}
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    for tools in ([tool], json.dumps([tool])):
        for head in ([], [{"role": "system", "content": "Count."}]):
            row = check_row({"messages": head + turns, "tools": tools}, 1, "row 1")
            said = head[0]["content"] + "\n" if head else ""
            assert segments_of(row, rwkv)[0] == (f"System: {said}Tools:\n- add(a: integer)\n\nUser: 1+1?\n\nAssistant:", 0.0) and not row.ignored
    assert check_row({"messages": turns, "tools": []}, 1, "row 1").content == check_row({"messages": turns}, 1, "row 1").content


@pytest.mark.parametrize("row, said", [
    (chat({"role": "user", "content": "a"}) | {"tools": "{"}, ("key 'tools'", "JSON")),
    (chat({"role": "user", "content": "a"}) | {"tools": [{"function": {}}]}, ("key 'tools'", "list of tools")),
    ({"messages": [{"role": "user", "content": "a"}], "conversations": [{"from": "gpt", "value": "b"}]}, ("both 'messages' and 'conversations'", "fields=")),
    ({"Prompt": "a", "completions": "b"}, ("did you mean fields={'prompt': 'Prompt', 'completion': 'completions'}",)),
    ({"conversation": []}, ("did you mean fields={'messages': 'conversation'}",)),
    ({"text": "a", "train": "no"}, ("key 'train'", "'no'", "true or false")),
    (chat({"role": "asistant", "content": "a"}), ("message 1", "'asistant'", "tool", "did you mean 'assistant'")),
    (chat({"role": "humman", "content": "a"}), ("did you mean 'user'",)),
    (chat({"from": "narrator", "value": "a"}), ("message 1", "'narrator'", "system, user, assistant, tool")),
    (chat({"role": ["user"], "content": "a"}), ("message 1", "['user']")),
    (chat({"from": "gpt", "value": ""}), ("message 1", "'value'", "empty")),
    (chat({"role": "assistant", "content": " ", "tool_calls": []}), ("message 1", "'content'", "empty")),
    (chat({"role": "user", "content": "a", "reasoning": "hm"}), ("message 1", "'reasoning'", "only an assistant")),
    (chat({"role": "assistant", "content": "a", "reasoning": "x", "reasoning_content": "y"}), ("message 1", "differ")),
    (chat({"role": "assistant", "tool_calls": [CALL, {"name": "f", "arguments": "{a:1}"}]}), ("message 1 tool call 2", "'arguments'", "JSON")),
    (chat({"role": "assistant", "tool_calls": {"name": "f"}}), ("message 1", "'tool_calls'", "dict", "list")),
    (chat({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1}}}]}), ("tool call 1", "JSON")),
    ({"instruction": "i", "output": ""}, ("key 'output'", "empty")),
    ({"segments": []}, ("'segments'", "no text")),
    ({"segments": "ab"}, ("'segments'", "str", "list of segments")),
    ({"segments": [["a", "b"]]}, ("segment 1", "'weight'", "'b'")),
    ({"segments": [["a", 1], "b"]}, ("segment 2", "'b'", "[text, weight]")),
    ({"segments": [{"text": "a", "label": 1}]}, ("segment 1", "true or false")),
    ({"input_ids": []}, ("'input_ids'", "empty list")),
    ({"input_ids": "12"}, ("'input_ids'", "str", "list of numbers")),
    ({"input_ids": [1, -1]}, ("'input_ids'", "-1 at place 1")),
    ({"input_ids": [1, 2.0]}, ("'input_ids'", "2.0 at place 1")),
    ({"input_ids": [True]}, ("'input_ids'", "True")),
    ({"input_ids": [1, 2], "labels": [1]}, ("'labels'", "1 numbers for 2 tokens")),
    ({"input_ids": [1, 2], "labels": [2, -100]}, ("'labels'", "2 at place 0", "holds 1", "-100")),
    ({"input_ids": [1], "labels": [1], "weights": [1]}, ("both 'labels' and 'weights'",)),
    ({"input_ids": [1, 2], "weights": [1, -1]}, ("'weights', place 1", "-1")),
    ({"input_ids": [1, 0], "attention_mask": [1, 0]}, ("padded", "attention_mask")),
])
def test_rows_that_are_refused(row, said):
    with refused("row 1", *said): check_row(row, 1, "row 1")


def test_fields_that_are_refused():
    with refused("'massages'", "did you mean 'messages'"): read_rows(["a"], {"massages": "x"})
    with refused("fields is list", "'question'"): read_rows(["a"], ["q", "a"])


# ---- files that are refused: line, byte, remedy

@pytest.mark.parametrize("name, content, said", [
    ("half.jsonl", b'{"text": "a"}\n{"text": "b', ("half.jsonl line 2 isn't JSON (Unterminated string starting at column 10)",)),
    ("mixed.jsonl", jsonl([{"text": "a"}, PAIRS[1]]), ("mixed.jsonl line 2 has prompt and completion", "line 1 has text", "one shape")),
    ("bytes.jsonl", b'"a"\n\n"caf\xe9"\n', ("bytes.jsonl line 3 isn't UTF-8 (byte 5 is 0xe9)", "convert")),
    ("bytes.txt", b"one\ntwo\xff\n", ("bytes.txt line 2 isn't UTF-8 (byte 4 is 0xff)",)),
    ("bytes.csv", b"text\na\n\xff\n", ("bytes.csv line 3 isn't UTF-8 (byte 1 is 0xff)",)),
    ("bytes.json", b'[\n"\xff"]', ("bytes.json line 2 isn't UTF-8 (byte 2 is 0xff)",)),
    ("wide.jsonl", "{}\n".encode("utf-16"), ("wide.jsonl line 1", "UTF-16", "UTF-8")),
    ("nul.txt", b"one\nt\0wo", ("nul.txt line 2 holds a NUL (byte 2)",)),
    ("nul.csv", b"text\n\0\n", ("nul.csv line 2 holds a NUL (byte 1)",)),
    ("nul.jsonl", b'{"text": "\0"}', ("nul.jsonl line 1 isn't JSON",)),
    ("object.json", b'{\n"a": 1}', ("object.json is one JSON object", "'a'", "array")),
    ("broken.json", b'[{"text": "a"},\n{"text" "b"}]', ("broken.json isn't JSON", "line 2 column 9", "array of rows")),
    ("number.json", b"7", ("number.json", "int", "array")),
    ("row.json", b'[{"text": "a"}, {"txt": "b"}]', ("row.json row 1", "'txt'")),
    ("twice.csv", b"text,text\na,b\n", ("twice.csv line 1", "'text' twice")),
    ("cells.csv", b'text,id\n"a\nb",1\nc\n', ("cells.csv line 4 has 1 cells for 2 columns", "quote or a comma")),
    ("quote.csv", b'text\na\n"b\nc\n', ("quote.csv line 3 can't be read as csv", "quote missing")),
    ("header.csv", b"text,id\n", ("header.csv has no rows",)),
    ("empty.csv", b"", ("empty.csv has no rows",)),
    ("empty.csv", b"text\n\"\"\n", ("empty.csv line 2, key 'text', is empty",)),
    ("empty.txt", b" \n\n", ("empty.txt has no rows",)),
    ("empty.json", b"[]", ("empty.json has no rows",)),
    ("empty.json", b"", ("empty.json isn't JSON",)),
    ("unknown.dat", b"\x89PNG\r\n", ("unknown.dat", "format='jsonl'")),
    ("cut.jsonl.gz", gzip.compress(jsonl(PAIRS).encode(), mtime=0)[:-12], ("cut.jsonl.gz can't be read", "whole")),
    ("flipped.jsonl.xz", lzma.compress(jsonl(PAIRS).encode())[:-30], ("flipped.jsonl.xz can't be read", "whole")),
    ("cut.parquet", b"PAR1" + bytes(50) + b"PAR1", ("cut.parquet can't be read as parquet", "whole")),
    ("my.bin", b"\0\0", ("my.idx is missing beside", "my.bin", "both files")),
    ("my.idx", b"MMIDIDX\0\0", ("my.bin is missing beside", "my.idx", "both files")),
])
def test_files_that_are_refused(tmp_path, name, content, said):
    with refused(*said) as e: read_rows(write(tmp_path / name, content))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("source, options, said", [
    ("nowhere.jsonl", {}, ("nowhere.jsonl is not there",)), ("my_rows", {}, ("a variable is written without quotes",)), (__file__.replace("sources", "source"), {}, ("not there", "did you mean", "test_sources.py")), ("", {}, ("folder",)), ("a sentence. " * 500, {}, ("not there",)), ("a\0b", {}, ("not there",)), ("nowhere.bin", {}, ("nowhere.bin is not there",)),
    (["a"], {"format": "jsonl"}, ("format='jsonl' is for files", "list")), (["a"], {"format": "jsn"}, ("isn't known", "did you mean 'json'")), ({"a"}, {}, ("no order",)), (str, {}, ("type",)),
    (io.StringIO("text"), {}, ("open file (StringIO)", "path")), (pa.table({"text": ["a"]}), {}, ("Table", "list of rows")),
])
def test_sources_that_are_refused(source, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(*said): open_source(source, **options)


def test_a_binidx_is_recognised(tmp_path):
    for name in ("my.bin", "my.idx"): write(tmp_path / name, b"MMIDIDX\0\0")
    for name in ("my", "my.bin", "my.idx"):
        source = open_source(tmp_path / name)
        assert (source.format, source.path) == ("binidx", tmp_path / "my.bin")
    with refused("tokens, not rows"): list(source)
    with refused("is no binidx"): open_source(write(tmp_path / "a.jsonl", "{}"), format="binidx")


def test_what_a_file_says_it_is_and_what_it_is(tmp_path):
    array, lines = write(tmp_path / "a.jsonl", "\n\n [1]"), write(tmp_path / "b.txt", '{"text": "a"}\n')
    assert sniff(array)[0] == "json" and "a.jsonl is one JSON array" in open_source(array).note
    assert sniff(lines)[0] == "jsonl" and "format='txt'" in open_source(lines).note
    assert contents(lines, format="txt") == ['{"text": "a"}\n'] and open_source(lines, format="txt").note == ""
    assert sniff(write(tmp_path / "c.md", "# Title\n"))[0] == "txt" and sniff(write(tmp_path / "d.txt", '{"name": "no row"}'))[0] == "txt" and sniff(write(tmp_path / "e.txt", "[Verse 1]\n"))[0] == "txt"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | ANY.map(str.encode), st.sampled_from(["", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]), st.sampled_from([b"", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"PAR1", b"[", b"{", b'"', b"\xef\xbb\xbf"]), st.sampled_from([None, *FORMATS[:-1]]))
def test_any_bytes_are_read_or_refused(tmp_path, content, suffix, begin, format):
    path = write(tmp_path / f"a{suffix}", begin + content)
    try: rows = read_rows(path, format=format)
    except DataError as e: assert "a" in str(e) and "\n" not in str(e)
    else: assert all(r.content for r in rows)
