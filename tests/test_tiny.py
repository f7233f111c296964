"The bundled model: what it may weigh, what it knows, what it never read, and that its recipe still gives it."
import json
from pathlib import Path

import pytest

import rwkv_peft
from rwkv_peft import RWKV, finetune
from rwkv_peft.bench.corpus import SOURCES, xz_bits
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.bench.tiny import answers, bits_per_byte, known_words, prose, tiny_judges, tiny_model, tiny_rows, tiny_settings

models = Path(rwkv_peft.__file__).parent / "models"
record = json.loads((models / "rwkv7-tiny.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(): return RWKV.load("rwkv7-tiny")


def test_size(model):
    assert (models / "rwkv7-tiny.safetensors").stat().st_size <= 8_000_000
    assert model.config.vocab_size == 257 and model.tokenizer.name == "bytes"


def test_bits_per_byte_on_held_out_documents(model, corpus):
    "At most 2.0, on whole documents, a seventh of them (every seventh, of each source) so that the test stays short; the record speaks of all."
    some = corpus.held_out[::7]
    assert {d.source for d in some} == {"speeches", "novel", "manual"}
    bits = bits_per_byte(model, some)
    assert bits <= 2.0 and bits < xz_bits(some)
    assert record["bits_per_byte"]["all"]["model"] <= 2.0


def test_writes_words(model, corpus):
    text = prose(model, 5000, seed=100)
    assert len(text.encode()) >= 5000
    assert known_words(text, corpus) >= 0.9


def test_answers_end(model, corpus):
    questions = [p.question for p in corpus.held_back[20:40]]
    assert sum(ended for *_, ended in answers(model, questions)) >= 16


def test_never_read(corpus):
    "Neither the demo rows nor the held-back third are in its data."
    read = "\n".join([*(d.text for d in corpus.train), *(p.text for p in corpus.dialogues)])
    asked = {p.question for p in corpus.dialogues}
    assert not [row for row in demo_rows() if row["messages"][1]["content"] in read or row["messages"][0]["content"] in asked]
    assert not asked & {p.question for p in corpus.held_back}


def test_record_names_every_source():
    assert [(s["package"], s["sha256"]) for s in record["sources"]] == [(f"{s.package} {s.version}", s.sha256) for s in SOURCES]
    assert all(s["licence"] for s in record["sources"])


def test_first_fifty_steps(corpus, tmp_path):
    "The recipe, run anew, goes the way that the shipped model went."
    run = finetune(model=tiny_model(), data=tiny_rows(corpus), eval_data=tiny_judges(corpus)[:4], **tiny_settings(tmp_path))
    losses = []
    for event in run.steps():
        if event["event"] == "step": losses.append(event["loss"])
        if len(losses) == 50: break
    assert losses == pytest.approx(record["first_losses"], rel=2e-3)
