"The main job on real rows: the README's demo, and rows that nobody here wrote."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft import RWKV, finetune, load_adapter, read_data
from rwkv_peft.bench.corpus import held_back_pairs
from rwkv_peft.bench.demo import by_language, compare, demo_rows, first_prompts, samples

form = re.compile(r"\[RWKV\] .+ >> [A-Z]+ <<")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The folder in which the command of the README ran, and what it printed."
    folder = tmp_path_factory.mktemp("demo")
    ran = subprocess.run([Path(sys.executable).parent / "rwkv-peft", "demo"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


@pytest.fixture(scope="module")
def tuned(demo):
    "The two models as their saved adapters give them, with the rows held out."
    folder, _ = demo
    base = RWKV.load("rwkv7-tiny")
    train, held_out = read_data(demo_rows(), base.tokenizer).split(0.15)
    models = {name: load_adapter(RWKV.load("rwkv7-tiny"), folder / "runs" / run / "adapter") for name, run in {"LoRA": "demo-lora", "state": "demo-state"}.items()}
    return base, models, train, held_out


def test_losses(tuned):
    base, models, train, held_out = tuned
    rows = demo_rows()
    losses = compare(base, models, held_out, rows, [rows[e.row] for e in train])
    assert losses["LoRA"]["all"] <= 0.8 * losses["base"]["all"]
    assert losses["state"]["all"] <= 0.9 * losses["base"]["all"]
    for lang in ("en", "zh"): assert max(losses["LoRA"][lang], losses["state"][lang]) < losses["base"][lang]
    assert losses["LoRA"]["all"] < losses["base, 3 shots"]["all"]


def test_samples_show_the_form(tuned):
    base, models, train, held_out = tuned
    prompts = [p for part in by_language(held_out, demo_rows()).values() for p in first_prompts(part, 4)]
    said = samples(base, models, prompts)
    assert sum(bool(form.fullmatch(row["LoRA"])) for row in said) >= 6
    assert sum(row["state"].startswith("[RW") for row in said) >= 6
    assert not any(row["base"].startswith("[") for row in said)


def test_what_it_prints_and_leaves(demo):
    folder, printed = demo
    assert "held-out loss" in printed and "3 shots" in printed and "[RWKV]" in printed
    for run in ("demo-lora", "demo-state"):
        events = [json.loads(line)["event"] for line in (folder / "runs" / run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        assert events[0] == "start" and events[-1] == "done" and "eval" in events and "sample" in events
    notebook = json.loads((folder / "runs/demo.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if not cell["source"].startswith("%%rwkv_finetune"): continue
        card, curve = (output["data"] for output in cell["outputs"])
        assert "done" in card["text/html"] and "<img" in curve["text/html"]
    assert not re.search(r"https?://(?!www\.w3\.org)", json.dumps([c.get("outputs") for c in notebook["cells"]]))


@pytest.mark.parametrize("method", [{"peft": "lora", "lr_init": 1e-3}, {"peft": "state", "lr_init": 1.0}], ids=["lora", "state"])
def test_rows_of_strangers(corpus_cache, tmp_path, method):
    "The held-back third of chatterbot-corpus's English pairs: held-out loss falls, and the run stops where it no longer does."
    rows = [{"prompt": f"User: {p.question}\n\nAssistant:", "completion": f" {p.answer}"} for p in held_back_pairs(corpus_cache)]
    base = RWKV.load("rwkv7-tiny")
    train, held_out = read_data(rows, base.tokenizer).split(0.25)
    run = finetune(model="rwkv7-tiny", data=train, eval_data=held_out, micro_bsz=8, accumulate=1, epochs=8, eval_steps=12, output=str(tmp_path), name="strangers", **method)
    events = list(run.steps())
    losses = {e["step"]: e["loss"] for e in events if e["event"] == "eval"}
    best = min(losses, key=losses.get)
    assert losses[best] < losses[0] and best > 0
    assert events[-1]["best_step"] == best
    assert compare(base, {"tuned": run.model}, held_out)["tuned"]["all"] == pytest.approx(losses[best], rel=1e-4)
