"Loaders against a slow reader of a binidx file and lists of numbers; order over ranks and interrupts; pack against documents apart; runs that are stopped."
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rwkv_peft.data.batches import LOADERS, Loader, batches, collate, first_fit, idle
from rwkv_peft.data.binidx import Binidx
from rwkv_peft.data.chat import raw
from rwkv_peft.data.masks import LOSS_MASKS, Example, encode_row
from rwkv_peft.data.records import Dataset, read_data
from rwkv_peft.data.rows import DataError
from rwkv_peft.data.sources import read_rows
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.peft.adapters import attach
from rwkv_peft.peft.state_tuning import StateTuning
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.events import timeline
from rwkv_peft.train.loop import Feed, Run, finetune, in_windows

torch.set_num_threads(1)
TURNS = [[("What is this?", "A row.")], [("Hi", "Hello"), ("And now?", "The end of a longer talk, which no window of 24 holds."), ("Bye", "B")], [("你好", "😀")], [("x", "y")], [("Once more, with a question that is long", "no")]]


def conversations(): return [{"messages": [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]} for turns in TURNS]


def text_of(turns): return "\n\n".join(f"User: {q}\n\nAssistant: {a}" for q, a in turns)


def numbers(count): return [Example(torch.arange(n + 1), torch.ones(n + 1), i) for i, n in enumerate(count)]


# ---- a binidx file as RWKV-PEFT reads it, from the format's description: struct and slices

def write_pair(prefix, documents):
    sizes = [len(d) for d in documents]
    at = [2 * sum(sizes[:i]) for i in range(len(sizes))]
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(d)}H", *d) for d in documents))
    n = len(sizes)
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, n, n + 1) + struct.pack(f"<{n}i", *sizes) + struct.pack(f"<{n}q", *at) + struct.pack(f"<{n + 1}q", *range(n + 1)))


class SlowPair:
    def __init__(self, prefix):
        self.bin, idx = prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()
        n, = struct.unpack_from("<Q", idx, 18)
        self.sizes, self.pointers = struct.unpack_from(f"<{n}i", idx, 34), struct.unpack_from(f"<{n}q", idx, 34 + 4 * n)

    def from_buffer(self, pointer, count): return list(struct.unpack_from(f"<{count}H", self.bin, pointer))         # struct.error past the end, as numpy's ValueError
    def get(self, i, offset, length): return self.from_buffer(self.pointers[i] + 2 * offset, length)
    def only(self, i, length): return self.from_buffer(self.pointers[i], min(self.sizes[i], length))

    def pad(self, i, length):
        try: return self.from_buffer(self.pointers[i], length), min(self.sizes[i], length)
        except struct.error: return self.from_buffer(self.pointers[i], self.sizes[i]) + self.from_buffer(self.pointers[0], length - self.sizes[i]), min(self.sizes[i], length)


def corpus(mask, bos):
    if mask in ("assistant", "last"): return read_data(conversations(), Bytes(), loss_mask=mask, bos=bos)
    texts, marks = [text_of(t) for t in TURNS], {"mask0": "User:", "mask1": "Assistant:"}
    if mask == "se": return Dataset([encode_row(row, raw, mask, Bytes(), mask_id=marks, bos=bos) for row in read_rows(texts)], Bytes(), {"loss_mask": mask})
    return read_data(texts, Bytes(), loss_mask=mask, bos=bos)


def trained(window, weights): return [(tuple(window[:t]), window[t], weights[t]) for t in range(1, len(window)) if weights[t]]


def seen(batch):
    "What every trained target of a batch is, with all that the model has read of its document or window before it."
    found = []
    for tokens, targets, weights, resets in zip(*(x.tolist() for x in (batch.tokens, batch.targets, batch.weights, batch.resets))):
        start = 0
        for t, target in enumerate(targets):
            if resets[t]: start = t
            if weights[t]: found.append((tuple(tokens[start:t + 1]), target, weights[t]))
    return found


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("mask", LOSS_MASKS)
@pytest.mark.parametrize("dataload", LOADERS)
def test_the_trained_tokens_are_those_of_a_slow_reader(tmp_path, dataload, mask, bos):
    data, ctx = corpus(mask, bos), 24
    documents, weights = [e.tokens.tolist() for e in data], [e.weights.tolist() for e in data]
    write_pair(tmp_path / "pair", documents)
    slow, n = SlowPair(tmp_path / "pair"), sum(map(len, documents))
    stream, heads = [t for d in documents for t in d], np.cumsum([0, *map(len, documents)]).tolist()
    if dataload in ("bucket", "pack"): ctx = max(map(len, documents)) - 1
    loader, wanted, tail = Loader(data, 2, dataload, ctx, seed=3), [], 1.0 if mask == "none" else 0.0
    for epoch in range(2):
        order = loader.order(epoch)
        got = [x for item in order for x in seen(loader.batch(item))]
        wanted = []
        for i in (i for item in order for i in item):
            if dataload == "get":
                window, d = slow.get(0, i, ctx + 1), max(d for d in range(len(documents)) if heads[d] <= i)
                assert window == stream[i:i + ctx + 1]
                wanted += trained(window, [weights[d][i + t - heads[d]] if i + t < heads[d + 1] else tail for t in range(ctx + 1)])
            elif dataload == "pad":
                window, own = slow.pad(i, ctx + 1)
                wanted += trained(window, weights[i][:own] + [tail] * (ctx + 1 - own))
            elif dataload == "only": wanted += trained(slow.only(i, ctx + 1), weights[i])
        if dataload in ("bucket", "pack"): wanted = [x for d, w in zip(documents, weights) for x in trained(d, w)]
        else: assert len(order) == -(-(-(-n // ctx) if dataload == "get" else len(data)) // 2)
        assert Counter(got) == Counter(wanted) and got
        rows = [i for item in order for i in loader.rows(item)]
        if dataload != "get": assert sorted(rows) == list(range(len(data)))
    lost = {"pad": ctx + 1, "only": ctx + 1}.get(dataload, n)
    assert loader.cuts == [(i, len(d) - lost) for i, d in enumerate(documents) if len(d) > lost]
    assert (len(loader.cuts) > 1) == (dataload in ("pad", "only"))


@pytest.mark.parametrize("mask", ["none", "pad", "all", "assistant", "last"])
def test_the_masks_of_that_corpus_are_what_is_written_here(mask):
    for e, turns in zip(corpus(mask, True), TURNS):
        pieces = [p for k, (q, a) in enumerate(turns) for p in ((f"User: {q}\n\nAssistant:", False), (f" {a}" + "\n\n" * (k < len(turns) - 1), mask == "assistant" or k == len(turns) - 1))]
        if mask in ("none", "pad", "all"): pieces = [(text_of(turns), True)]
        tokens, on = [0], [False]
        for text, trains in pieces: tokens, on = tokens + [b + 1 for b in text.encode()], on + [trains] * len(text.encode())
        assert e.tokens.tolist() == tokens + [0] and (e.weights > 0).tolist() == on + [pieces[-1][1]]


class Mapped:
    "Documents in a pair of files, all of them trained; nothing is in memory."
    facts = {"loss_mask": "none"}

    def __init__(self, prefix):
        self.ids = Binidx(prefix)
        self.lengths = self.ids.sizes - 1

    def __len__(self): return len(self.ids)
    def __iter__(self): return map(self.__getitem__, range(len(self)))
    def __getitem__(self, i): return Example(torch.from_numpy(self.ids[i].astype(np.int64)), torch.tensor([0.] + [1.] * int(self.lengths[i])), i)


@pytest.mark.parametrize("dataload", LOADERS)
def test_a_pair_of_files_gives_the_batches_of_a_list(tmp_path, dataload):
    data = corpus("none", False)
    write_pair(tmp_path / "pair", [e.tokens.tolist() for e in data])
    mapped, told = Mapped(tmp_path / "pair"), (2, dataload, 1, 2)
    ctx = max(data.lengths) if dataload in ("bucket", "pack") else 24
    for a, b in zip(batches(mapped, *told, ctx_len=ctx), batches(data, *told, ctx_len=ctx)):
        assert a.rows == b.rows and a.read == b.read and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "targets", "weights", "resets"))
    mapped.ids.close()


def test_a_corpus_smaller_than_a_window_goes_round_and_round():
    data = read_data(["ab", "c"], Bytes(), bos=False)
    [batch] = batches(data, 2, "pad", ctx_len=11)
    rows = {i: [t, *u][:12] for i, t, u in zip(batch.rows, batch.tokens[:, 0].tolist(), batch.targets.tolist())}
    a, b, c = (Bytes().encode(x)[0] for x in "abc")
    assert rows == {0: [a, b, 0, a, b, 0, c, 0, a, b, 0, c], 1: [c, 0, a, b, 0, c, 0, a, b, 0, c, 0]}


# ---- order

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.sampled_from(LOADERS), st.integers(1, 7), st.integers(1, 6), st.integers(-9, 2**70), st.integers(0, 99), st.data())
def test_ranks_share_an_epoch_and_a_stopped_one_goes_on(lengths, dataload, micro_bsz, world, seed, epoch, draw):
    data, ctx = numbers(lengths), max(lengths)
    loader = Loader(data, micro_bsz, dataload, ctx, seed)
    order, again = loader.order(epoch), Loader(data, micro_bsz, dataload, ctx, seed).order(epoch)
    assert order == again and len(order) == len(loader) and sorted(map(len, order))[1:] == [micro_bsz] * (len(order) - 1)
    if dataload != "get": assert sorted(i for item in order for i in loader.rows(item)) == list(range(len(lengths)))
    start, told = draw.draw(st.integers(0, len(loader))), (micro_bsz, dataload, seed, epoch)
    whole = [b for b in batches(data, *told, ctx_len=ctx)]
    ranks = [list(batches(data, *told, start, ctx_len=ctx, rank=r, world=world)) for r in range(world)]
    turns = [ranks[k % world][k // world] for k in range(len(ranks[0]) * world)]
    assert len({len(r) for r in ranks}) == 1 and len(ranks[0]) == -(-(len(loader) - start) // world)
    left = whole[start:]
    assert all(torch.equal(x.tokens, y.tokens) and torch.equal(x.weights, y.weights) and x.rows == y.rows for x, y in zip(turns, left))
    assert all(b.rows == [] and b.weights.sum() == 0 for b in turns[len(left):])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from(LOADERS), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 4))
def test_the_rows_of_a_step_do_not_depend_on_the_ranks(lengths, dataload, micro_bsz, steps, world):
    loader = Loader(numbers(lengths), micro_bsz, dataload, 9 if dataload != "get" else 1)
    alone, ranks = Feed(loader), [Feed(loader, rank=r, world=world) for r in range(world)]
    for n in steps:
        whole, shares = alone.take(n), [f.take(n) for f in ranks]
        assert alone.rows == [i for b in whole for i in b.rows] and all(f.rows == alone.rows and (f.epoch, f.start) == (alone.epoch, alone.start) for f in ranks)
        assert len({len(s) for s in shares}) == 1 and sorted(tuple(b.rows) for s in shares for b in s if b.rows) == sorted(tuple(b.rows) for b in whole)
    resumed = Feed(loader, alone.epoch, alone.start)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(alone.take(7), resumed.take(7)))


def test_epochs_and_seeds_differ():
    data = numbers([3, 5, 7, 2, 9, 4, 6, 8, 1] * 5)
    for dataload in LOADERS:
        orders = [str(Loader(data, 2, dataload, 9, seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1)]
        assert len(set(orders)) == 4, dataload


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(40, 90))
def test_first_fit_is_first_fit(lengths, room):
    rows, ends = first_fit(np.array(lengths), room, seed=1)
    got = [sorted(lengths[i] for i in rows[a:b]) for a, b in zip(ends, ends[1:])]
    bins = []
    for n in sorted(lengths, reverse=True):
        fitting = next((b for b in bins if sum(b) + n <= room), None)
        if fitting is None: bins.append([n])
        else: fitting.append(n)
    assert sorted(rows.tolist()) == list(range(len(lengths))) and sorted(got) == sorted(map(sorted, bins))


def test_pools_of_pack_lose_nothing():
    lengths = torch.randint(1, 300, (2500,), generator=torch.Generator().manual_seed(0)).numpy()
    rows, ends = first_fit(lengths, 512, seed=2)
    assert sorted(rows.tolist()) == list(range(2500)) and ends[0] == 0 and ends[-1] == 2500 and all(0 < lengths[rows[a:b]].sum() <= 512 for a, b in zip(ends, ends[1:]))


def test_the_magic_prime_reads_every_window_once_and_lists_the_rest():
    data, ctx, prime = numbers([10, 3, 25, 8, 30, 12, 2, 17, 40]), 7, 17          # 156 tokens, 22 windows; 17 = 2 mod 3
    stream = [(d, t) for d, e in enumerate(data) for t in range(len(e.tokens))]
    for epoch in (0, 3):
        loader = Loader(data, 4, "get", ctx, magic_prime=prime)
        places = [i for item in loader.order(epoch) for i in item]
        assert sorted(places) == [k * ctx for k in range(prime)] and len(loader) == 5
        f = int(prime * ((5 ** .5 - 1) / 2))
        assert places == [f * i ** 3 % prime * ctx for i in range(1 + epoch * prime, 1 + (epoch + 1) * prime)]
    read = {stream[i] for p in places for i in range(p, p + ctx + 1)}
    assert dict(loader.cuts) == Counter(d for d, _ in set(stream) - read) and "magic prime" in loader.notes()[0]


# ---- only what a batch needs is read

class Lazy:
    facts = {"loss_mask": "none"}

    def __init__(self, n): self.lengths, self.asked = np.full(n, 9), []
    def __len__(self): return len(self.lengths)
    def __iter__(self): return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i):
        self.asked.append(i)
        return Example(torch.arange(10) + i, torch.ones(10), i)


@pytest.mark.parametrize("dataload, most", [("bucket", 2), ("only", 2), ("pad", 8), ("get", 10), ("pack", 6)])
def test_a_batch_reads_its_own_documents(dataload, most):
    data = Lazy(10 ** 5)
    loader = Loader(data, 2, dataload, 30)
    item = loader.table(1)[5]
    assert len(data.asked) <= 1                            # one to see that something is trained
    data.asked.clear()
    assert loader.batch(item).read >= 18 and len(set(data.asked)) <= most


# ---- pack

@pytest.fixture(scope="module")
def tiny(): return RWKV.load("rwkv7-tiny", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("tuned", [False, True])
def test_packed_documents_have_the_loss_and_the_gradient_of_documents_apart(tiny, tuned):
    model = RWKV.load("rwkv7-tiny", device="cpu", dtype=torch.float32)
    if tuned:
        attach(model, StateTuning())
        for n, p in model.named_parameters():
            if n.endswith("time_state"): p.data.normal_(std=.3, generator=torch.Generator().manual_seed(len(n)))
    model.requires_grad_(True)
    data = read_data([{"prompt": f"Number {i}:", "completion": " one" * (i + 1)} for i in range(7)], model.tokenizer)
    def learn(parts):
        model.zero_grad()
        total = sum(model(b.tokens, resets=b.resets, targets=b.targets, weights=b.weights)[0] for b in parts)
        total.backward()
        return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loader = Loader(data, 2, "pack", 40)
    parts = [loader.batch(i) for i in loader.order(1)]
    assert any(b.resets[0, 1:].any() for b in parts)
    (loss, grads), (apart, wanted) = learn(parts), learn([collate([e]) for e in data])
    assert abs(loss - apart) < 1e-5 * apart and set(grads) == set(wanted) and any(n.endswith("time_state") for n in grads) == tuned
    assert all((grads[n] - wanted[n]).norm() <= 1e-5 * wanted[n].norm() + 1e-6 for n in grads)


def test_an_idle_batch_changes_nothing(tiny):
    tiny.requires_grad_(True).zero_grad()
    b = idle()
    loss, _ = tiny(b.tokens, resets=b.resets, targets=b.targets, weights=b.weights)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in tiny.parameters())


# ---- runs

ROWS = [{"text": f"Row {i} says {'on and on ' * (i % 4)}{i}."} for i in range(12)]


@pytest.mark.parametrize("told", [dict(dataload="pack", ctx_len=48), dict(dataload="get", ctx_len=12), dict(dataload="get", ctx_len=8, magic_prime=5), dict(dataload="pad", ctx_len=16)])
def test_a_stopped_run_goes_on_with_the_batches_that_were_left(tmp_path, told):
    told = dict(model="rwkv7-tiny", forget_data="none", data=ROWS, r=2, micro_bsz=2, accumulate=2, max_steps=5, save_steps=50, eval_steps=50, eval_split=.1, device="cpu", output=str(tmp_path)) | told
    steps = lambda run: [(e["step"], e["loss"], e["rows"], e["tokens"]) for e in timeline(run.events) if e["event"] == "step"]
    whole, broken = finetune(name="whole", **told).fit(), finetune(name="broken", **told)
    for e in broken.steps():
        if e["event"] == "step" and e["step"] == 2: broken.stop()
    assert len(steps(broken)) == 2
    assert steps(Run.resume(broken.folder).fit()) == steps(whole) and len(steps(whole)) == 5
    assert whole.plan()["steps"] == 5 and whole.data.facts["loss_mask"] == "none"


def test_what_is_cut_is_said_and_a_step_without_trained_tokens_changes_nothing(tmp_path):
    rows = [{"prompt": "A long question, longer than the row:", "completion": " no"}, {"prompt": "", "completion": "yes"}]
    run = finetune(model="rwkv7-tiny", data=rows, r=2, lr_init=1e-2, weight_decay=.1, micro_bsz=1, accumulate=1, epochs=2, eval_split=0., dataload="only", ctx_len=4, device="cpu", output=str(tmp_path), name="cut")
    states = {}
    for e in run.steps():
        if e["event"] == "step": states[e["step"]] = [p.detach().clone() for p in run.trained.values()]
    steps = [e for e in run.events if e["event"] == "step"]
    assert any("row 0" in e["message"] and "never read" in e["message"] for e in run.events if e["event"] == "warning")
    for e in steps:
        assert (e["loss"] == 0) == (e["rows"] == [0]) and e["tokens"] <= 4
        if e["step"] > 1: assert all(map(torch.equal, states[e["step"]], states[e["step"] - 1])) == (e["rows"] == [0])
    assert sorted(e["rows"] for e in steps) == [[0], [0], [1], [1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 2**40))
def test_held_out_rows_in_windows_count_every_trained_token_once(lengths, ctx, bits):
    data = Dataset([Example(torch.arange(n + 1) + 100 * i, torch.tensor([0.] + [float(bits >> t & 1) for t in range(n)]), i) for i, n in enumerate(lengths)], Bytes())
    cut = in_windows(data, ctx)
    count = lambda d: Counter((e.row, t) for e in d for t, w in zip(e.tokens.tolist(), e.weights.tolist()) if w)
    assert count(cut) == count(data) and all(e.length <= ctx for e in cut)


def test_two_columns_of_other_names(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(4)]
    told = dict(model="rwkv7-tiny", device="cpu", output=str(tmp_path), eval_split=0.)
    run = finetune(data=rows, sft_field=["question", "answer"], name="a", **told)
    assert run.plan()["rows"] == 4 and run.data.fingerprint() == read_data([{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(4)], run.tokenizer).fingerprint()


# ---- refusals

@pytest.mark.parametrize("told, said", [
    (dict(dataload="buket"), ["'buket'", "did you mean 'bucket'"]), (dict(dataload=None), ["use one of bucket, pack, only, pad, get"]), (dict(ctx_len=0, dataload="pad"), ["ctx_len=0"]), (dict(ctx_len=2.0, dataload="pad"), ["ctx_len=2.0"]),
    (dict(dataload="pack", ctx_len=8), ["row 2 has 9 tokens", "ctx_len=8", "long='cut'"]), (dict(dataload="bucket", ctx_len=8), ["row 2 has 9 tokens"]), (dict(dataload="get", ctx_len=20), ["21 tokens", "has 20"]),
    (dict(dataload="pad", magic_prime=5), ["dataload='get'"]), (dict(dataload="get", ctx_len=2, magic_prime=9), ["isn't a prime"]), (dict(dataload="get", ctx_len=2, magic_prime=7), ["magic_prime=7 leaves 1"]), (dict(dataload="get", ctx_len=4, magic_prime=5), ["21 tokens", "magic_prime=5"]),
    (dict(rank=1), ["rank=1", "world=1"]), (dict(world=0), ["world=0"]), (dict(rank=-1), ["rank=-1"]), (dict(start=4), ["start=4", "3 batches"])])
def test_refusals(told, said):
    with pytest.raises(DataError) as caught: batches(numbers([3, 5, 9]), **told)
    assert all(word in str(caught.value) for word in said) and "\n" not in str(caught.value), str(caught.value)


def test_a_row_of_one_token_is_refused():
    with pytest.raises(DataError, match="row 1 has fewer than two tokens"): batches([*numbers([3]), Example(torch.arange(1), torch.ones(1))])
    with pytest.raises(DataError, match="nothing to train"): batches([], dataload="get")


@pytest.mark.parametrize("told, said", [
    (dict(sft_field=["a"]), ["sft_field: two columns"]), (dict(mask_id={"mask0": "a", "mask1": "b"}), ["mask_id:", "'qa' or 'se'"]), (dict(loss_mask="se"), ["loss_mask: se", "mask_id"]), (dict(magic_prime=5), ["magic_prime:", "'get'"]), (dict(dataload="pac"), ["did you mean 'pack'"])])
def test_settings_that_need_one_another(told, said):
    with pytest.raises(ConfigError) as caught: Config(model="rwkv7-tiny", data=ROWS, **told)
    assert all(word in str(caught.value) for word in said), str(caught.value)
