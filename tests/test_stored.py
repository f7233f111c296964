"Rows on disk are the rows: any weights, views and cuts, worker processes, and a cache that never finds the wrong thing."
import json
import pickle
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rwkv_peft.data import stored as module
from rwkv_peft.data.chat import raw, rwkv
from rwkv_peft.data.masks import Example
from rwkv_peft.data.records import Dataset, load_encoded, read_data, save_encoded
from rwkv_peft.data.rows import DataError
from rwkv_peft.data.stored import Recipe, Stored, StoredWriter, blocks_of, content_key, cut_to, encode_task, lengths_of, rows_of, take, trained_of
from rwkv_peft.data.workers import in_order
from rwkv_peft.model.tokenizer import Bytes, World

root = Path(__file__).parent.parent
WEIGHT = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 3e-7])
ROW = st.lists(st.tuples(st.integers(0, 256), WEIGHT), max_size=20)


def examples_of(rows): return [Example(torch.tensor([t for t, _ in row], dtype=torch.int64), torch.tensor([w for _, w in row], dtype=torch.float32), 3 * i + 1) for i, row in enumerate(rows)]


def written(folder, examples, tokenizer=None, together=3):
    with StoredWriter(folder, 257) as writer:
        for block in blocks_of(examples, tokenizer, together): writer.extend(block)
    return Stored(folder, tokenizer)


def same(a, b): return torch.equal(a.tokens, b.tokens) and torch.equal(a.weights, b.weights) and a.row == b.row and a.tokens.dtype == b.tokens.dtype and a.weights.dtype == b.weights.dtype


def alike(one, other): return len(one) == len(other) and all(map(same, one, other))


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, max_size=8), st.data())
def test_any_tokens_and_weights_come_back(tmp_path_factory, rows, draw):
    examples, folder = examples_of(rows), tmp_path_factory.mktemp("s")
    stored = written(folder, examples)
    n = len(examples)
    assert alike(stored, examples) and list(lengths_of(stored)) == [e.length for e in examples] and list(trained_of(stored)) == [e.trained for e in examples] and list(rows_of(stored)) == [e.row for e in examples]
    a, b, c = draw.draw(st.integers(-n - 1, n + 1)), draw.draw(st.integers(-n - 1, n + 1)), draw.draw(st.sampled_from([1, 2, -1, -3, None]))
    assert alike(stored[a:b:c], examples[a:b:c])
    index = draw.draw(st.lists(st.integers(0, n - 1), max_size=6)) if n else []
    assert alike(take(stored, index), [examples[i] for i in index])
    most = draw.draw(st.integers(1, 12))
    short = [Example(e.tokens[:most + 1], e.weights[:most + 1], e.row) for e in examples]
    for view, wanted in ((cut_to(stored, most), short), (cut_to(take(stored, index), most), [short[i] for i in index]), (cut_to(cut_to(stored, most), most + 3), short)):
        assert alike(view, wanted) and list(lengths_of(view)) == [e.length for e in wanted] and list(trained_of(view)) == [e.trained for e in wanted]
    assert alike(written(folder / "again", cut_to(take(stored, index), most)), [short[i] for i in index])      # a view is written as it is seen
    assert alike(pickle.loads(pickle.dumps(cut_to(stored, most))), short)


def test_places_outside_are_index_errors(tmp_path):
    stored = written(tmp_path, examples_of([[(0, 0.), (5, 1.)]] * 3))
    assert same(stored[-1], stored[2]) and same(stored[np.int64(1)], stored[1])
    for i in (3, -4):
        with pytest.raises(IndexError): stored[i]
    with pytest.raises(IndexError): take(stored, [0])[1]


def test_the_files_are_what_the_page_says(tmp_path):
    "Read with struct alone."
    written(tmp_path, [Example(torch.tensor([0, 7, 8, 9, 0]), torch.tensor([0, 0, 1., 1., .5]), 41)])
    assert struct.unpack("<5H", (tmp_path / "tokens.bin").read_bytes()) == (0, 7, 8, 9, 0)
    assert struct.unpack("<IfIfIf", (tmp_path / "spans.bin").read_bytes()) == (2, 0, 2, 1, 1, .5)
    assert struct.unpack("<qqqf", (tmp_path / "rows.bin").read_bytes()) == (41, 3, 3, 0)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    examples = [Example(torch.tensor([0, 70_000]), torch.tensor([0., 1.]))]
    with StoredWriter(tmp_path / "a", None) as writer: writer.extend(next(blocks_of(examples)))
    assert Stored(tmp_path / "a")[0].tokens.tolist() == [0, 70_000]
    with pytest.raises(DataError, match="int32"):
        with StoredWriter(tmp_path / "b", 65536) as writer: writer.extend(next(blocks_of(examples)))
    assert list((tmp_path / "b").iterdir()) == []


def test_a_binidx_is_rows_of_which_everything_counts(tmp_path):
    docs = [[5, 6, 0], [7, 0], [9, 9, 9, 9, 0]]
    (tmp_path / "d.bin").write_bytes(b"".join(struct.pack(f"<{len(d)}H", *d) for d in docs))
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ3i3q4q", 1, 8, 3, 4, 3, 2, 5, 0, 6, 10, 0, 1, 2, 3))
    for name in ("d", "d.bin", "d.idx"):
        data = read_data(tmp_path / name, World())
        assert [e.tokens.tolist() for e in data] == docs and [e.weights.tolist() for e in data] == [[0.] + [1.] * (len(d) - 1) for d in docs]
        assert (list(data.lengths), data.trained, data.where(2), data.facts["loss_mask"]) == ([2, 1, 4], 7, "document 2", "none")
    assert [e.tokens.tolist() for e in read_data(tmp_path / "d", World(), ctx_len=2, long="cut")] == [[5, 6, 0], [7, 0], [9, 9, 9]]
    save_encoded(data, tmp_path / "kept")
    assert load_encoded(tmp_path / "kept").fingerprint() == data.fingerprint()
    with pytest.raises(DataError, match="ids already"): read_data(tmp_path / "d", World(), template="rwkv")


def test_masks_by_ids_reach_a_binidx(tmp_path, capsys):
    world = World()
    ids = world.encode("User: hi\n\nAssistant: yes\n\n") + [0]
    (tmp_path / "d.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, len(ids), 0, 0, 1))
    [e] = read_data(tmp_path / "d.bin", world, loss_mask="qa", cache=tmp_path / "cache")
    assert world.decode(e.tokens[e.weights > 0].tolist()) == "Assistant: yes\n\n" and e.weights[-1] == 1


# ---- worker processes

ROWS = [{"prompt": f"{n}²?", "completion": f" {n * n}"} for n in range(1500)]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")
    return path


def test_workers_give_what_one_process_gives(rows_file, tmp_path, capsys, monkeypatch):
    from rwkv_peft.data.sources import Source
    monkeypatch.setattr(Source, "blocks", lambda self, size=1 << 20, blocks=Source.blocks: blocks(self, 3000))
    listed = read_data(rows_file, World())
    two = read_data(rows_file, World(), cache=tmp_path, workers=2)
    assert isinstance(two.examples, Stored) and "with 2 processes" in capsys.readouterr().out and alike(two.examples, listed.examples) and [e.segments for e in two] == [e.segments for e in listed]
    again = read_data(rows_file, World(), cache=tmp_path, workers=2, long="cut", ctx_len=5)
    assert capsys.readouterr().out == "" and again.fingerprint() == read_data(rows_file, World(), long="cut", ctx_len=5).fingerprint()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows_file.read_text(encoding="utf-8") + '{"prompt": "a", "completion": 5}\n{"prompt"', encoding="utf-8")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DataError) as e: read_data(bad, World(), cache=tmp_path, workers=2)
    with pytest.raises(DataError) as one: read_data(bad, World())
    assert str(e.value) == str(one.value) and "line 1501" in str(e.value) and sorted(p.name for p in tmp_path.iterdir()) == before      # nothing half-made is left


def test_a_script_without_a_guard_and_a_template_of_its_own(rows_file, tmp_path):
    "What a notebook does too: the main module can't be imported by a worker."
    script = tmp_path / "script.py"
    script.write_text(f"""
from rwkv_peft.data.records import read_data
from rwkv_peft.model.tokenizer import World
print("main")
data = read_data({str(rows_file)!r}, World(), cache={str(tmp_path / "cache")!r}, workers=2)
print(len(data), "encoded" in data.facts)
def mine(messages): return [(m["content"], m["role"] == "assistant") for m in messages]
own = read_data({str(rows_file)!r}, World(), mine, cache={str(tmp_path / "cache")!r}, workers=2)
print(own.facts["encoded"][:14], own.fingerprint() == data.fingerprint())
""", encoding="utf-8")
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=root, env={**__import__("os").environ, "PYTHONPATH": str(root)})
    lines = [line for line in out.stdout.splitlines() if "kept in" not in line]
    assert lines == ["main", f"{len(ROWS)} False", "in one process True"], out.stdout + out.stderr


def test_a_worker_that_dies_is_told():
    recipe = Recipe(World(), rwkv, "assistant", "pair")
    with pytest.raises(DataError, match="workers=1"): list(in_order(partial(encode_task, recipe=recipe), [(1, _Bomb())], 2))


class _Bomb:
    "Ends the process that receives it."
    def __reduce__(self): return __import__("os")._exit, (3,)


# ---- the cache

FACTOR = 2


def helper(text): return text * FACTOR


def own(messages): return [(helper(m["content"]), m["role"] == "assistant") for m in messages]


def test_the_key_tells_apart_what_differs(tmp_path, monkeypatch):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"x" * 3_000_000), other.write_bytes(b"x" * 2_999_999 + b"y")
    recipe = lambda tokenizer=World(), template=rwkv, mask="assistant", **more: Recipe(tokenizer, template, mask, "pair", **more)
    keys = [content_key(file, recipe()), content_key(other, recipe()), content_key(file, recipe(Bytes())), content_key(file, recipe(template=raw)), content_key(file, recipe(mask="all")),
            content_key(file, recipe(bos=False)), content_key(file, recipe(fields={"prompt": "q"})), content_key(file, recipe(mask_id={"mask0": "a", "mask1": "b"})), content_key(file, recipe(), split="train[:3]"),
            content_key(file, recipe(template=own))]
    assert len(set(keys)) == len(keys)
    assert content_key(file, recipe(World(), place="elsewhere line")) == keys[0] and content_key(file, recipe(template=own)) == keys[-1]
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    assert content_key(file, recipe(template=own)) != keys[-1]      # a number that a function uses that the template uses
    monkeypatch.setattr(module.metadata, "version", lambda name: "99")
    assert content_key(file, recipe()) != keys[0]


@pytest.mark.parametrize("make", [lambda k: (lambda messages: [(k, 1)]), lambda k: (lambda messages, n=k: [(n, 1)]), lambda k: (lambda messages: [[(x, k) for x in "a"] for _ in messages]),
                                  lambda k: eval(f"lambda messages: [({k!r}, 1)]")])
def test_templates_are_told_by_what_they_do(make):
    assert module.told(make("a")) == module.told(make("a")) != module.told(make("b"))


def test_what_cannot_be_told_is_never_found_again():
    class Odd:
        def encode(self, text): return []
    assert module.told(Odd()) != module.told(Odd()) and module.told([Odd]) != module.told([Odd])


def test_a_list_and_an_iterator_can_be_kept_on_disk(tmp_path):
    for source in (ROWS[:50], iter(ROWS[:50]), (r for r in ROWS[:50])):
        data = read_data(source, World(), cache=tmp_path, workers=1)
        assert isinstance(data.examples, Stored) and data.fingerprint() == read_data(ROWS[:50], World()).fingerprint()


def test_bounded_memory_while_saving_and_loading(tmp_path, monkeypatch):
    "Nothing asks for all rows at once: a view of a million rows is copied a thousand rows at a time."
    stored = written(tmp_path / "a", examples_of([[(0, 0.), (n % 200 + 1, 1.), (0, 1.)] for n in range(2500)]), together=1000)
    seen = []
    monkeypatch.setattr(StoredWriter, "extend", lambda self, block, extend=StoredWriter.extend: (seen.append(len(block.sizes)), extend(self, block))[1])
    save_encoded(Dataset(stored[1:], Bytes(), {}), tmp_path / "b")
    assert seen == [1000, 1000, 499] and len(load_encoded(tmp_path / "b")) == 2499


def test_only_the_first_rows_are_written_out_for_people(tmp_path, monkeypatch):
    from rwkv_peft.data import records
    monkeypatch.setattr(records, "RENDERED", 3)
    save_encoded(read_data(ROWS[:5], World()), tmp_path)
    assert len((tmp_path / "rendered.jsonl").read_text(encoding="utf-8").splitlines()) == 3 and json.loads((tmp_path / "dataset.json").read_text())["rendered_rows"] == 3
    assert len(load_encoded(tmp_path)) == 5


def test_a_damaged_cache_is_named(tmp_path):
    read_data(ROWS[:5], World(), cache=tmp_path / "c", workers=1)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS[:9]), encoding="utf-8")
    data = read_data(file, World(), cache=tmp_path)
    (Path(data.facts["kept"]) / "spans.bin").unlink()
    with pytest.raises(DataError, match="delete it"): read_data(file, World(), cache=tmp_path)


def test_an_unread_index_counts_too(tmp_path):
    "Two pairs of the same tokens and other documents are other data."
    for name, sizes in (("a", (2, 3)), ("b", (3, 2))):
        (tmp_path / f"{name}.bin").write_bytes(struct.pack("<5H", 5, 6, 7, 8, 0))
        (tmp_path / f"{name}.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 8, 2, 3, *sizes, 0, 2 * sizes[0], 0, 1, 2))
    recipe = Recipe(World(), None, "qa", "ids", format="binidx")
    assert content_key(tmp_path / "a.bin", recipe) != content_key(tmp_path / "b.bin", recipe)


def test_batches_of_rows_on_disk_are_those_of_the_list(tmp_path):
    from rwkv_peft.data.batches import batches
    listed, kept = read_data(ROWS[:60], World()), read_data(ROWS[:60], World(), cache=tmp_path, workers=1)
    for a, b in zip(batches(listed, 4, seed=3), batches(kept, 4, seed=3), strict=True):
        assert a.rows == b.rows and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "targets", "weights", "resets"))


def test_a_loader_with_spawned_workers_reads_the_same_rows(tmp_path):
    kept = read_data(ROWS[:20], World(), cache=tmp_path, workers=1)
    loader = torch.utils.data.DataLoader(kept.split(.2)[0].examples, batch_size=None, num_workers=1, multiprocessing_context="spawn", collate_fn=_tokens_of)
    assert list(loader) == [e.tokens.tolist() for e in kept.split(.2)[0]]


def _tokens_of(e): return e.tokens.tolist()


def test_a_run_over_rows_on_disk_is_that_of_the_list_and_goes_on_as_if_never_stopped(rows_file, tmp_path):
    from rwkv_peft.train.loop import Run, finetune
    told = dict(model="rwkv7-tiny", forget_data="none", max_steps=4, micro_bsz=4, accumulate=1, eval_steps=4, save_steps=2, r=2)
    def losses(run, until=9):
        found = []
        for e in run.steps():
            found += [e["loss"]] if e["event"] == "step" else []
            if len(found) == until and e["event"] == "saved": break
        return found
    kept = read_data(rows_file, Bytes(), cache=tmp_path / "cache", workers=1)[:60]
    assert isinstance(kept.examples, Stored)
    listed, whole = (losses(finetune(data=data, output=str(tmp_path), name=name, **told)) for data, name in ((read_data(rows_file, Bytes())[:60], "listed"), (kept, "whole")))
    first = losses(finetune(data=kept, output=str(tmp_path), name="parts", **told), 2)
    resumed = Run.resume(tmp_path / "parts")
    assert len(whole) == 4 and listed == whole == first + losses(resumed) and isinstance(resumed.data.examples, Stored)
