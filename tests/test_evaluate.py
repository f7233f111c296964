"Held-out loss and its interval against torch, scipy and a distribution written down whole; forgetting; what a run keeps, reports and draws of them."
import json
import math
import shutil
from html.parser import HTMLParser
from itertools import product
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from markup import Markup
from rwkv_peft.data.batches import idle
from rwkv_peft.data.masks import Example
from rwkv_peft.data.records import read_data
from rwkv_peft.look.report import judgement_table, kept_row, progress_of, report
from rwkv_peft.look.tokens import loss_ribbon
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.tokenizer import Bytes, World
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.evaluate import LONGEST, by_document, change_of, document_losses, evaluate, general_rows, keep_losses, paired_bootstrap, read_general, row_to_show, trained_bytes
from rwkv_peft.train.events import EventLog, read_lines
from rwkv_peft.train.loop import Run, finetune
from rwkv_peft.train.loss import on_device

torch.set_num_threads(1)
ROWS = [{"prompt": f"{i} + {i % 7} =", "completion": f" {i + i % 7}{'!' * (i % 5)}"} for i in range(40)]
GENERAL = [{"text": "The sea is wide."}, {"text": "A whale is large, and the sea is larger."}]


def tiny(seed=0):
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    torch.set_rng_state(state)
    return model


def make(folder, **settings):
    base = dict(model=tiny(), data=ROWS, forget_data=GENERAL, r=4, lr_init=1e-2, micro_bsz=2, accumulate=2, max_steps=6, eval_split=.2, eval_steps=2, output=str(folder), name="run")
    return finetune(**{k: v for k, v in (base | settings).items() if v is not None})


def of(events, kind): return [e for e in events if e["event"] == kind]


def loss_of_row(model, e):
    "By PyTorch, from full logits, weight by weight."
    with torch.no_grad(): logits = model(e.tokens[None, :-1])[0][0]
    return (F.cross_entropy(logits, e.tokens[1:], reduction="none") * e.weights[1:]).double().sum().item()


# --- the losses of documents ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("micro_bsz", [1, 3, 50])
def test_losses_are_pytorchs_and_in_order(micro_bsz):
    model, data = tiny(), read_data([{"messages": [{"role": "user", "content": f"{'a' * i}"}, {"role": "assistant", "content": "b" * (i % 4 + 1), "weight": i % 3 / 2 + .25}]} for i in range(1, 8)], Bytes())
    assert document_losses(model.train(), data, micro_bsz) == pytest.approx([loss_of_row(model, e) for e in data], rel=1e-5) and model.training
    assert document_losses(model, data, micro_bsz, stop=lambda: True) is None


def test_processes_share_the_work():
    "Three ranks and four batches, one after the other: each sees a part, together all; those with nothing left read an idle batch, so that all read equally often."
    class Rank:
        num_processes, device = 3, "cpu"
        def __init__(self, rank): self.process_index = rank
        def reduce(self, nats, how): assert how == "sum"; return nats
    model, data, calls = tiny(), read_data(ROWS[:7], Bytes()), []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["tokens"].shape[0]), with_kwargs=True)
    parts = []
    for rank in range(3):
        calls.clear()
        parts.append(document_losses(model, data, 2, accelerator=Rank(rank)))
        assert len(calls) == 2
    whole = document_losses(model, data, 2)
    assert np.sum(parts, 0) == pytest.approx(whole, rel=1e-6) and np.count_nonzero(parts, 0).tolist() == [1] * 7


def test_rows_read_in_pieces_have_the_same_losses():
    from rwkv_peft.train.infctx import infctx
    model, data = tiny(), read_data(ROWS[:5], Bytes())
    whole = document_losses(model, data, 3)
    assert document_losses(infctx(model, 4), data, 3) == pytest.approx(whole, rel=1e-5)


def test_a_model_gives_the_loss_of_each_row():
    "In float64, with weights, an adapter on the head, and a row without a trained token; the gradient of their sum is that of the plain sum."
    from rwkv_peft.peft.adapters import attach
    from rwkv_peft.peft.lora import LoRA
    for targets in (None, ["head"]):
        model = tiny().double()
        if targets: attach(model, LoRA(4), targets=targets)
        tokens, weights = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(1)), torch.rand(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        weights[1] = 0
        told = dict(targets=tokens[:, 1:], weights=weights)
        rows, whole = model(tokens[:, :-1], **told, by_row=True)[0], model(tokens[:, :-1], **told)[0]
        assert rows.shape == (3,) and rows[1] == 0 and rows.sum().item() == pytest.approx(whole.item(), rel=1e-12)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for a, b in zip(torch.autograd.grad(rows.sum(), parameters, allow_unused=True), torch.autograd.grad(whole, parameters, allow_unused=True)):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12))
    assert tiny()(**on_device(idle(), "cpu"), by_row=True)[0].sum() == 0


# --- the interval ---------------------------------------------------------------------------------------------------------------

def numbers(n, seed):
    random = np.random.default_rng(seed)
    before = random.gamma(4, 20, n)
    return before, before - random.normal(3, 6, n), random.integers(1, 90, n).astype(float)


@pytest.mark.parametrize("n", [2, 13, 60])
def test_the_interval_is_scipys(n):
    from scipy.stats import bootstrap
    before, after, sizes = numbers(n, n)
    change, low, high = paired_bootstrap(before, after, sizes, resamples=20_000)
    ratio = lambda b, a, s, axis=-1: (a - b).sum(axis) / s.sum(axis)
    theirs = bootstrap((before, after, sizes), ratio, paired=True, vectorized=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)).confidence_interval
    assert change == pytest.approx(ratio(before, after, sizes)) and (low, high) == pytest.approx(tuple(theirs), abs=.04 * (theirs.high - theirs.low))


def test_the_interval_of_four_documents_is_that_of_all_256_draws():
    before, after, sizes = numbers(4, 9)
    every = np.sort([(after - before)[list(d)].sum() / sizes[list(d)].sum() for d in product(range(4), repeat=4)])
    _, low, high = paired_bootstrap(before, after, sizes, resamples=40_000)
    below, up_to = lambda x: np.mean(every < x - 1e-12), lambda x: np.mean(every <= x + 1e-12)
    assert below(low) < .03 and up_to(low) > .02 and below(high) < .98 and up_to(high) > .97      # what a quantile of steps is, and room for chance


def test_the_interval_covers():
    "Of 200 worlds in which the documents' mean change is -3 over 45 tokens, about 95 % have it in their interval."
    random, hits = np.random.default_rng(3), 0
    for _ in range(200):
        change, sizes = random.normal(-3, 6, 50), np.full(50, 45.)
        _, low, high = paired_bootstrap(np.zeros(50), change, sizes, resamples=400)
        hits += low <= -3 / 45 <= high
    assert 180 <= hits <= 198


def test_odd_cases():
    assert paired_bootstrap([3.], [2.], [4]) == [-.25, None, None]
    assert paired_bootstrap([3., 0.], [2., 0.], [4, 0]) == [-.25, None, None]          # the second has nothing to learn
    same = paired_bootstrap([1., 2., 3.], [1., 2., 3.], [1, 1, 1])
    assert same == [0, 0, 0] and paired_bootstrap(*numbers(9, 1)) == paired_bootstrap(*numbers(9, 1))


def test_windows_of_a_document_are_one():
    one = lambda row: Example(torch.zeros(3, dtype=torch.int64), torch.ones(3), row)
    examples = [one(r) for r in (0, 0, 0, 7, -1, -1, 9)]                                # -1: a row that nobody numbered is a document of its own
    assert by_document(examples, [1, 2, 3, 4, 5, 6, 7]) == [[6, 4, 5, 6, 7]]
    found = change_of([1.] * 7, [2.] * 7, examples, [0.] * 7)
    assert found["documents"] == 5 and found["bits_per_byte"] is None and found["loss"] == [.5, .5, .5]


# --- a run ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("runs"), sample_prompts=["1 + 1 =<b>"])
    base, general = tiny(), read_data(GENERAL, Bytes())
    return run.fit(), base, evaluate(base, general)


def test_a_run_reports_change_and_forgetting(ran):
    run, base, general = ran
    found, held_out, n_bytes = run.report(), run.held_out, [trained_bytes([e], Bytes()) for e in run.held_out]
    assert found["best_step"] > 0 and found["evaluations"] == 4
    before, after = [loss_of_row(base, e) for e in held_out], [loss_of_row(run.model.eval(), e) for e in held_out]
    want = change_of(before, after, held_out, n_bytes)
    for key in ("loss", "bits_per_byte"): assert found["change"][key] == pytest.approx(want[key], abs=1e-5)
    assert found["change"]["loss"][0] == pytest.approx(found["after"]["loss"] - found["before"]["loss"], abs=1e-6) and found["change"]["documents"] == 8
    assert found["change"]["bits_per_byte"][0] == pytest.approx(found["after"]["bits_per_byte"] - found["before"]["bits_per_byte"], abs=1e-6)
    forgot = found["forgetting"]
    assert forgot["before"]["loss"] == pytest.approx(general["loss"], abs=1e-6) and forgot["after"]["loss"] == pytest.approx(evaluate(run.model, read_data(GENERAL, Bytes()))["loss"], abs=1e-6)
    assert forgot["change"] == pytest.approx(forgot["after"]["loss"] - forgot["before"]["loss"]) and found["samples"][0]["base"] is not None
    lines = EventLog(run.folder / "eval.jsonl").events
    assert [x["step"] for x in lines] == [0, 2, 4, 6] and lines[0]["nats"] == pytest.approx(before, rel=1e-5)
    assert of(run.events, "eval")[0]["change"] is None and json.loads(json.dumps(found)) == found


def test_a_run_keeps_the_losses_of_one_row_token_by_token(ran, tmp_path):
    "Against the model's own scores, before training and as it came out; the report needs the folder alone."
    run, base, _ = ran
    i = run.shown
    lengths = sorted(e.length for e in run.held_out)
    example, kept = run.held_out[i], {line["step"]: line["row"] for line in read_lines(run.folder / "eval.jsonl")}
    assert example.length == lengths[len(lengths) // 2] and {row["i"] for row in kept.values()} == {i}
    best = run.report()["best_step"]
    for step, model in ((0, base), (best, run.model.eval())):
        with torch.no_grad(): p = model(example.tokens[None, :-1])[0][0].double().log_softmax(-1)
        assert kept[step]["nats"] == pytest.approx((-p[range(example.length), example.tokens[1:]]).tolist(), rel=1e-3)
    name, (first, before), (last, after) = kept_row(run.folder, progress_of(run.events))
    assert (name, first, last) == (run.held_out.where(i), 0, best) and before.loss > after.loss and before.ids == example.tokens.tolist()
    seen = Markup(report(run.folder)).text
    assert f"before (step 0) and after (step {best})" in seen and "blue: easier now" in seen and "blue: easier now" not in Markup(report(run.events)).text
    alone = Markup(loss_ribbon(before))                                                                  # losses were kept, and no more
    assert "rank " not in " ".join([seen, *alone.values("title")]) and f"{before.loss:.3f} nats each" in alone.text
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/data/held_out")
    assert report(tmp_path / "run").replace(str(tmp_path / "run"), str(run.folder)) == report(run.events)                                                # a row that can't be read is left out


def test_the_row_that_is_shown_is_an_ordinary_one_and_trains_something():
    rows = read_data([{"prompt": "q", "completion": "a" * n} for n in (9, 1, 4, 30, 2)], Bytes())
    assert row_to_show(rows) == 2 and row_to_show([]) is None
    silent = [Example(e.tokens, torch.zeros_like(e.weights)) if i == 2 else e for i, e in enumerate(rows)]
    assert row_to_show(silent) == 0 and row_to_show([silent[2]]) is None
    late = torch.zeros(LONGEST + 9)
    late[-1] = 1
    assert row_to_show([Example(torch.ones(LONGEST + 9, dtype=torch.int64), late)]) is None               # beyond what is read


class Cells(HTMLParser):
    "The texts of table cells and paragraphs."
    def __init__(self, html):
        super().__init__()
        self.cells, self.tags = [], []
        self.feed(html)
    def handle_starttag(self, tag, attrs): self.tags.append(tag)
    def handle_data(self, data): self.cells.append(data)


def test_the_report_draws_the_same_numbers(ran):
    run, *_ = ran
    found, cells = run.report(), Cells(judgement_table(progress_of(run.events))).cells
    def row(name): return cells[cells.index(name) + 1:cells.index(name) + 5]
    before, after, change, between = row("held-out loss, nats a token")
    low, high = map(float, between.split(" to "))
    assert [float(before), float(after)] == pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=6e-5)
    assert [float(change), low, high] == pytest.approx(found["change"]["loss"], abs=6e-5)
    assert float(row("general text, nats a token")[2]) == pytest.approx(found["forgetting"]["change"], abs=6e-5)
    assert f"after (step {found['best_step']})" in cells and any("8 documents" in c and "best of 4 evaluations" in c for c in cells)
    html = report(run.folder)
    assert "Did it get better?" in html and "<b>" not in judgement_table(progress_of(run.events)) and "1 + 1 =&lt;b&gt;" in html


def test_a_report_says_when_nothing_is_shown():
    evals = [{"event": "eval", "step": s, "loss": x, "bits_per_byte": x / 2, "change": c} for s, x, c in [(0, 2., None), (1, 1.9, {"loss": [-.1, -.3, .1], "bits_per_byte": [-.05, -.15, .05], "documents": 7})]]
    assert "it holds 0, so that no change is shown" in judgement_table(progress_of(evals)) and judgement_table(progress_of(evals[:1])) == ""
    worse = [evals[0], {**evals[1], "loss": 2.5}]
    assert "Training did not lower the held-out loss" in judgement_table(progress_of(worse))
    old = [{"event": "eval", "step": s, "loss": x} for s, x in [(0, 3.), (5, "nan"), (9, 2.)]]                     # a run of an earlier version
    assert "after (step 9)" in judgement_table(progress_of(old)) and "95 % interval" in judgement_table(progress_of(old))


def test_a_resumed_run_compares_with_the_first_evaluation_on_the_same_text(tmp_path):
    "The general text was an object: the folder holds it, and the losses before training."
    run, steps = make(tmp_path), 0
    for e in run.steps():
        steps += e["event"] == "step"
        if steps == 3: run.stop()
    again = Run.resume(tmp_path / "run", model=tiny()).fit()
    whole = make(tmp_path, name="whole").fit()
    assert again.general.fingerprint() == whole.general.fingerprint() and (tmp_path / "run/data/general").is_dir()
    a, b = again.report(), whole.report()
    assert a["change"]["loss"] == pytest.approx(b["change"]["loss"], abs=1e-6) and a["forgetting"]["change"] == pytest.approx(b["forgetting"]["change"], abs=1e-6)
    assert [e["step"] for e in EventLog(tmp_path / "run/eval.jsonl").events] == [0, 2, 4, 6]


def test_none_stays_none(tmp_path):
    run = make(tmp_path, forget_data="none", max_steps=2)
    next(events := run.steps())
    events.close()
    again = Run.resume(tmp_path / "run", model=tiny()).fit()
    assert again.general is None and again.report()["forgetting"] is None and again.report()["change"]["documents"] == 8


def test_the_bundled_text_is_the_default(tmp_path):
    text = read_general(None, World())
    assert len(text) == len(general_rows()) == 13 and {r["source"] for r in general_rows()} == {"speeches", "novel"}
    run = make(tmp_path, forget_data=None, max_steps=1)
    run.plan()
    assert len(run.general) == 13 and not run.folder.exists()


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="forget_data: there is no file"): make(tmp_path, forget_data="nowhere.jsonl")
    with pytest.raises(ConfigError, match="forget_data: expected"): make(tmp_path, forget_data=3)
    with pytest.raises(ConfigError, match="forget_data: this Dataset was encoded for the tokenizer 'world'"): make(tmp_path, forget_data=read_data(GENERAL, World())).plan()
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps(GENERAL[0]))
    assert Config(model="rwkv7-tiny", data=ROWS, forget_data=path).forget_data == str(path)


def test_losses_of_a_killed_write_are_passed_over(tmp_path):
    first = keep_losses(tmp_path, 0, [1.5, math.pi * 1e5])
    with open(tmp_path / "eval.jsonl", "a") as f: f.write('{"step": 1, "na')
    assert keep_losses(tmp_path, 1, [1., 2.]) == first == [1.5, 314159.265] and len(EventLog(tmp_path / "eval.jsonl").events) == 2
