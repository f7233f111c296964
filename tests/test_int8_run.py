"Runs over packed matrices: as good as over floats, for LoRA and for states; resumed; refused where matrices train."
import pytest
import torch
from rwkv_peft import RWKV, finetune, merge
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.kernels.int8 import int8_status
from rwkv_peft.train.config import ConfigError

needs_vnni = pytest.mark.skipif(not int8_status()[0], reason=int8_status()[1])
common = dict(model="rwkv7-tiny", forget_data="none", accumulate=2, seed=3, eval_split=0.1)


def held_out(tmp_path, name, **settings):
    run = finetune(data=demo_rows()[:200], name=name, output=str(tmp_path), **{**common, **settings})
    events = list(run.steps())
    return [e["loss"] for e in events if e["event"] == "eval"], run


@needs_vnni
def test_two_hundred_steps_are_as_good_as_over_floats(tmp_path):
    settings = dict(peft="lora", lr_init=4e-3, max_steps=200, eval_steps=200, early_stop=0)
    floats, _ = held_out(tmp_path, "floats", **settings)
    fast, run = held_out(tmp_path, "fast", quant="int8", int8_matmul="fast", **settings)
    assert run.model.blocks[0].att.key.storage.matmul == "fast" and run.model.head.storage is not None
    assert floats[-1] < .8 * floats[0] and abs(fast[-1] - floats[-1]) < .02 * floats[-1], (floats, fast)


@needs_vnni
@pytest.mark.parametrize("matmul", ["dequant", "exact", "fast"])
def test_states_are_tuned_over_packed_matrices(tmp_path, matmul):
    settings = dict(peft="state", lr_init=1.0, max_steps=6, eval_steps=6, data=None)
    losses = {}
    for name, more in (("floats", {}), ("packed", dict(quant="int8", int8_matmul=matmul))):
        run = finetune(name=name, output=str(tmp_path), **{**common, **settings, **more, "data": demo_rows()[:40]})
        losses[name] = [e["loss"] for e in run.steps() if e["event"] == "step"]
    assert losses["packed"][-1] < losses["packed"][0] and losses["packed"] == pytest.approx(losses["floats"], rel=.02)


@needs_vnni
def test_a_packed_run_resumes_to_the_same_losses(tmp_path):
    settings = dict(common, data=demo_rows()[:40], peft="lora", lr_init=2e-3, max_steps=6, save_steps=3, quant="int8", int8_matmul="fast", output=str(tmp_path))
    whole = [e["loss"] for e in finetune(name="whole", **settings).steps() if e["event"] == "step"]
    run = finetune(name="cut", **settings)
    for event in run.steps():
        if event["event"] == "step" and event["step"] == 3: run.stop()
    rest = [e["loss"] for e in finetune(name="cut", output=str(tmp_path), resume=True).steps() if e["event"] == "step"]
    assert rest == whole[-len(rest):] and len(rest) >= 2


def test_what_cant_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="packed matrices can't train"): finetune(model="rwkv7-tiny", data=demo_rows()[:20], peft="none", quant="int8")
    with pytest.raises(ConfigError, match="say quant = 'int8'"): finetune(model="rwkv7-tiny", data=demo_rows()[:20], int8_matmul="fast")
    model = RWKV.load("rwkv7-tiny", quant="int8")
    with pytest.raises(ConfigError, match="its matrices are packed"): finetune(model=model, data=demo_rows()[:20], peft="none", max_steps=1, output=str(tmp_path)).plan()
    run = finetune(name="lora", **{**common, "data": demo_rows()[:20], "quant": "int8", "max_steps": 1, "output": str(tmp_path)})
    run.fit()
    tokens = torch.arange(1, 40)[None]
    tuned = run.model.eval()(tokens)[0].detach()
    merged = merge(run.model)(tokens)[0]      # into the dequantised weights that training saw: dense, and the same
    assert run.model.blocks[0].att.key.storage is None and (merged - tuned).norm() / tuned.norm() < 1e-4
