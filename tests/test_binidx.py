"The pair .bin and .idx against bytes packed by hand, every refusal, worker processes, and the official order of windows."
import math
import pickle
import random
import struct

import numpy as np
import pytest
import sympy
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from rwkv_peft.data.binidx import Binidx, BinidxWriter, magic_order, magic_prime, read_index
from rwkv_peft.data.rows import DataError

LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "d", 8: "H"}
DOCUMENTS = [[1, 2, 0], [5, 0], [0], [7, 7, 7, 7, 7, 7, 0], [100, 0]]


def packed(documents, code=8, boundaries=None, letter=None):
    "The pair's bytes as the format says, with nothing but struct."
    letter = letter or LETTERS[code]
    size, sizes = struct.calcsize("<" + letter), [len(d) for d in documents]
    pointers = [sum(sizes[:i]) * size for i in range(len(sizes))]
    boundaries = list(range(len(sizes) + 1)) if boundaries is None else boundaries
    idx = b"MMIDIDX" + b"\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(boundaries))
    idx += b"".join(struct.pack("<i", s) for s in sizes) + b"".join(struct.pack("<q", p) for p in pointers) + b"".join(struct.pack("<q", b) for b in boundaries)
    return b"".join(struct.pack("<" + letter, t) for d in documents for t in d), idx


def put(folder, bin, idx, name="pair"):
    (folder / f"{name}.bin").write_bytes(bin)
    (folder / f"{name}.idx").write_bytes(idx)
    return folder / name


@pytest.mark.parametrize("code, letter", [*LETTERS.items(), (7, "f")])
def test_every_type_is_read_exactly(tmp_path, code, letter):
    path = put(tmp_path, *packed(DOCUMENTS, code, letter=letter))
    for name in (path, f"{path}.bin", f"{path}.idx", str(path)):
        pair = Binidx(name)
        assert [d.tolist() for d in pair] == DOCUMENTS and pair.stream.tolist() == sum(DOCUMENTS, []) and len(pair) == 5
    assert pair.dtype == np.dtype("<" + letter) and pair.sizes.tolist() == [3, 2, 1, 7, 2] and pair.docs.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("code, top", [(1, 255), (2, 127), (3, 2**15 - 1), (4, 2**31 - 1), (5, 2**63 - 1), (8, 65535)])
def test_written_bytes_are_the_formats(tmp_path, code, top):
    documents = [*DOCUMENTS, [top], [], [0, top]]
    with BinidxWriter(tmp_path / "deep" / "ours.v2", np.dtype(LETTERS[code])) as writer:
        for d in documents[:3]: writer.add(d)
        writer.extend(np.array(sum(documents[3:], []), np.int64), [len(d) for d in documents[3:]])
    bin, idx = packed(documents, code)
    assert (tmp_path / "deep/ours.v2.bin").read_bytes() == bin and (tmp_path / "deep/ours.v2.idx").read_bytes() == idx
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["ours.v2.bin", "ours.v2.idx"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=12), st.data())
def test_any_documents_there_and_back(tmp_path_factory, documents, data):
    folder = tmp_path_factory.mktemp("any")
    with BinidxWriter(folder / "x") as writer:
        for d in documents: writer.add(d)
    assert ((folder / "x.bin").read_bytes(), (folder / "x.idx").read_bytes()) == packed(documents)
    pair, stream = Binidx(folder / "x"), sum(documents, [])
    assert [d.tolist() for d in pair] == documents and pair.stream.tolist() == stream
    if documents:
        i = data.draw(st.integers(0, len(documents) - 1))
        start = sum(map(len, documents[:i]))
        offset = data.draw(st.integers(0, len(stream) - start))
        length = data.draw(st.integers(0, len(stream) - start - offset))
        assert pair.get(i, offset, length).tolist() == stream[start + offset:start + offset + length]


def test_a_window_ends_with_the_stream(tmp_path):
    pair = Binidx(put(tmp_path, *packed(DOCUMENTS)))
    assert pair.get(3, 2).tolist() == [7, 7, 7, 7, 0] and pair.get(-1).tolist() == [100, 0] and pair.get(0, 0, 15).tolist() == sum(DOCUMENTS, [])
    for wrong in [(5,), (-6,), (0, 0, 16), (0, -1, 2), (4, 3), (0, 2, -1)]:
        with pytest.raises(IndexError, match="pair.bin"): pair.get(*wrong)


def test_sentences_of_a_document_stay_items(tmp_path):
    pair = Binidx(put(tmp_path, *packed(DOCUMENTS, boundaries=[0, 2, 2, 5])))
    assert len(pair) == 5 and pair.docs.tolist() == [0, 2, 2, 5]


# ---- refusals: (change of .bin, change of .idx, what the sentence holds)

def patched(at, form, value): return lambda blob: blob[:at] + struct.pack(form, value) + blob[at + struct.calcsize(form):]


@pytest.mark.parametrize("end, change, words", [
    ("bin", lambda b: None, ["pair.bin is missing beside pair.idx"]),
    ("idx", lambda b: None, ["pair.idx is missing beside pair.bin"]),
    ("bin", lambda b: b[:-3], ["pair.bin has 27 bytes", "15 tokens of 2 bytes", "truncated"]),
    ("bin", lambda b: b + b"\0\0", ["pair.bin has 32 bytes", "15 tokens"]),
    ("bin", lambda b: b"", ["pair.bin has 0 bytes"]),
    ("idx", lambda b: b"", ["pair.idx isn't the index"]),
    ("idx", lambda b: b"TNTIDX\0\0" + b[8:], ["pair.idx isn't the index", "TNTIDX"]),
    ("idx", lambda b: b[:20], ["pair.idx ends after 20 bytes"]),
    ("idx", lambda b: b[:-1], ["pair.idx has 141 bytes", "142"]),
    ("idx", lambda b: b + b"\0", ["pair.idx has 143 bytes", "142"]),
    ("idx", patched(9, "<Q", 2), ["pair.idx has version 2"]),
    ("idx", patched(17, "<B", 0), ["pair.idx has type code 0"]),
    ("idx", patched(17, "<B", 9), ["pair.idx has type code 9", "1, 2, 3"]),
    ("idx", patched(17, "<B", 4), ["pair.bin has 30 bytes", "4 bytes"]),
    ("idx", patched(18, "<Q", 2**63), ["pair.idx has 142 bytes"]),
    ("idx", patched(26, "<Q", 7), ["pair.idx has 142 bytes"]),
    ("idx", patched(34, "<i", 4), ["pair.bin has 30 bytes", "16 tokens"]),
    ("idx", lambda b: b[:34] + struct.pack("<2i", -1, 6) + b[42:], ["pair.idx: item 0 has -1 tokens"]),
    ("idx", lambda b: b[:34] + struct.pack("<2i", 4, 1) + b[42:], ["pair.idx: item 1", "byte 8"]),
    ("idx", patched(54 + 8 * 3, "<q", 10**9), ["pair.idx: item 3", "byte 1,000,000,000"]),
    ("idx", patched(54, "<q", -2), ["pair.idx: item 0", "byte -2"]),
    ("idx", patched(94 + 8 * 2, "<q", 4), ["pair.idx: the boundaries"]),
    ("idx", patched(94 + 8 * 5, "<q", 6), ["pair.idx: the boundaries", "5 items"]),
    ("idx", patched(94, "<q", -1), ["pair.idx: the boundaries"]),
])
def test_broken_pairs_are_refused_with_their_file(tmp_path, end, change, words):
    blobs = dict(zip(("bin", "idx"), packed(DOCUMENTS)))
    for e, blob in blobs.items():
        blob = change(blob) if e == end else blob
        if blob is not None: (tmp_path / f"pair.{e}").write_bytes(blob)
    with pytest.raises(DataError) as error: Binidx(tmp_path / "pair")
    assert all(word in str(error.value) for word in words), error.value
    assert "again" in str(error.value) or "give" in str(error.value)


def test_a_pair_that_is_nowhere(tmp_path):
    with pytest.raises(DataError, match="not there"): Binidx(tmp_path / "nothing")
    with pytest.raises(DataError, match="not there"): Binidx(tmp_path)


@pytest.mark.parametrize("ids", [[65536], [-1], [1.5], np.array([2**40])])
def test_ids_that_do_not_fit_leave_the_old_pair(tmp_path, ids):
    bin, idx = packed(DOCUMENTS)
    put(tmp_path, bin, idx)
    with pytest.raises(DataError, match="uint16 holds whole numbers"):
        with BinidxWriter(tmp_path / "pair") as writer:
            writer.add([1, 0])
            writer.add(ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair.bin", "pair.idx"] and (tmp_path / "pair.bin").read_bytes() == bin


def test_wrong_types_and_sizes(tmp_path):
    for dtype in (np.float64, np.uint32, bool):
        with pytest.raises(DataError, match="isn't a type of ids"): BinidxWriter(tmp_path / "x", dtype)
    with pytest.raises(DataError, match="sizes add up to 4"): BinidxWriter(tmp_path / "x").extend([1, 2, 3], [2, 2])


def test_a_closed_pair_says_so(tmp_path):
    pair = Binidx(put(tmp_path, *packed(DOCUMENTS)))
    kept = pair[3]
    pair.close()
    pair.close()
    assert kept.tolist() == DOCUMENTS[3] and "closed" in repr(pair)
    for use in (lambda: pair[0], lambda: len(pair), lambda: pair.stream):
        with pytest.raises(DataError, match="pair.bin was closed"): use()


def test_an_index_of_many_items_is_checked_to_its_end(tmp_path, monkeypatch):
    "The check goes in steps; a fault at each border of a step is found."
    monkeypatch.setattr("rwkv_peft.data.binidx._STEP", 4)
    documents = [[1] * (i % 3) for i in range(11)]
    bin, idx = packed(documents)
    read_index(put(tmp_path, bin, idx))
    for i in range(11):
        with pytest.raises(DataError, match=f"item {i} "): read_index(put(tmp_path, bin, patched(34 + 11 * 4 + 8 * i, "<q", 1)(idx)))
    for i in range(12):
        with pytest.raises(DataError, match="boundaries"): read_index(put(tmp_path, bin, patched(34 + 11 * 12 + 8 * i, "<q", 12)(idx)))


def collect(batch): return [d.tolist() for d in batch]


@pytest.mark.timeout(120)
def test_spawned_workers_read_the_same(tmp_path, monkeypatch):
    "A pair given by a relative path is found by workers; what they read is what is there."
    put(tmp_path, *packed(DOCUMENTS))
    monkeypatch.chdir(tmp_path)
    pair = Binidx("pair")
    assert pickle.loads(pickle.dumps(pair)).stream.tolist() == pair.stream.tolist()
    loader = DataLoader(pair, batch_size=2, num_workers=2, multiprocessing_context="spawn", collate_fn=collect)
    assert sum(loader, []) == DOCUMENTS


# ---- the magic prime

@pytest.mark.parametrize("n_tokens, ctx_len", [(3, 1), (12, 4), (100, 1), (4096 * 3, 4096), (99_999, 7), (1_498_226_207, 512), (332_115_325_534, 4096), (10**12, 1)])
def test_the_magic_prime_is_the_largest_of_its_kind(n_tokens, ctx_len):
    p = sympy.prevprime(n_tokens // ctx_len)
    while p % 3 != 2: p = sympy.prevprime(p)
    assert magic_prime(n_tokens, ctx_len) == p


@pytest.mark.parametrize("ctx_len, prime", [(512, 2926181), (2048, 731531), (4096, 365759)])
def test_the_published_primes(ctx_len, prime):
    "Those that RWKV-LM's scripts give for minipile, 1498226207 tokens."
    assert magic_prime(1498226207, ctx_len) == prime


@pytest.mark.parametrize("wrong", [(2, 1), (11, 4), (100, 0), (0, 512)])
def test_too_little_for_a_prime(wrong):
    with pytest.raises(DataError, match="three windows"): magic_prime(*wrong)


@pytest.mark.parametrize("p", [2, 5, 11, 101, 1013])
def test_every_window_once(p):
    for start in (0, 1, p // 2): assert sorted(magic_order(p, p, start)) == list(range(p))


@pytest.mark.parametrize("p", [3, 7, 13, 9973, 4])
def test_primes_that_leave_windows_out_are_refused(p):
    with pytest.raises(DataError, match="must leave 2"): magic_order(p, 3)


def test_the_order_is_the_official_trainers():
    "Step ii of its __getitem__, spelt out with Python's whole numbers, over epochs of 40320 samples and two ranks."
    p, rng = 2926181, random.Random(0)
    for _ in range(200):
        epoch, idx, rank, world = rng.randrange(90), rng.randrange(20160), rng.randrange(2), 2
        ii = 1 + epoch * 40320 + idx * world + rank
        window = (int(p * (math.sqrt(5) - 1) / 2) * ii * ii * ii) % p
        assert magic_order(p, 1, ii - 1).tolist() == [window]
    assert magic_order(p, 5, 100).tolist() == magic_order(p, 105)[100:].tolist()
