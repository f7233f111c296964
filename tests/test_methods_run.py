"Every word of `peft` through finetune(): trained, saved, read again with equal outputs, and resumed to the same losses."
import json
import pytest
import torch
from rwkv_peft import RWKV, LoRA, finetune
from rwkv_peft.model.quant import quantize
from rwkv_peft.peft import EVA, LoftQ, PiSSA
from rwkv_peft.peft.adapters import detach, load_adapter
from rwkv_peft.peft.lora import linears
from rwkv_peft.model.checkpoint import load
from rwkv_peft.train.config import METHODS, METHOD_WORDS, Config, ConfigError, settings_table
from rwkv_peft.train.loop import Run
from rwkv_peft.train.optim import method_of, methods_of

torch.set_num_threads(1)
ROWS = [{"prompt": f"{i} + {i % 7} =", "completion": f" {i + i % 7}{'!' * (i % 5)}"} for i in range(12)]
WORDS = [w for w in METHOD_WORDS if w != "none"]
QUANT = {"loftq": "nf4", "dora": "int8", "miss": "nf4", "bone": "fp4"}
TOKENS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def settings(tmp_path, word, **more):
    told = dict(model="rwkv7-tiny", device="cpu", precision="fp32", data=ROWS, peft=word, lr_init=1e-2 if word == "state" else 1e-3, micro_bsz=2, accumulate=1, max_steps=2, eval_split=.2, eval_steps=1, output=str(tmp_path), name=f"run-{word}")
    if word not in ("lisa", "state", "none"): told["r"] = 4
    if word in QUANT: told["quant"] = QUANT[word]
    return told | more


def losses(run): return [e["loss"] for e in run.events if e["event"] == "step"]


@torch.no_grad()
def said(model): return model.eval()(TOKENS)[0]


def same(run, quant="none", weights=None):
    "The adapter on a base that was loaded anew says what the run's model does."
    model = quantize(load_adapter(load("rwkv7-tiny", device="cpu", dtype=torch.float32), run.folder / "adapter"), quant)
    return (said(model) - said(run.model)).norm() <= 1e-6 * said(run.model).norm()


@pytest.mark.parametrize("word", WORDS)
def test_every_word_trains_and_its_adapter_is_read_again(tmp_path, word):
    run = finetune(**settings(tmp_path, word)).fit()
    events = run.events
    assert events[-1]["event"] == "done" and len(losses(run)) == 2 and type(run.methods[0]).__name__ == METHODS[word]
    assert any(x.grad is not None or x.requires_grad for x in run.trained.values())
    assert (run.folder / "config.toml").read_text().count("quant") == (word in QUANT)
    with torch.no_grad(): base = said(load("rwkv7-tiny", device="cpu", dtype=torch.float32))
    assert (said(run.model) - base).norm() > 1e-4 * base.norm()
    assert same(run, QUANT.get(word, "none"))
