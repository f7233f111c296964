"Settings: every refusal is one sentence that names the setting, before anything heavy happens; what is written can be read."
import inspect
import subprocess
import sys
import numpy as np
import pytest
from rwkv_peft.peft.inits import EVA, LoftQ, MiLoRA, OLoRA, PiSSA
from rwkv_peft.peft.lisa import LISA
from rwkv_peft.peft.lora import LoRA
from rwkv_peft.peft.magnitude import DoRA
from rwkv_peft.peft.parts import Train
from rwkv_peft.peft.shards import Bone, MiSS
from rwkv_peft.peft.state_tuning import StateTuning
from rwkv_peft.train.config import Config, ConfigError, settings_table
from rwkv_peft.train.optim import methods_of

ROWS = [{"text": "hello"}]


def make(**settings): return Config(**({"model": "rwkv7-tiny", "data": ROWS} | settings))


def refused(**settings):
    with pytest.raises((ConfigError, FileNotFoundError)) as caught: make(**settings)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 500, said
    return said


@pytest.mark.parametrize("settings, words", [
    (dict(lr="x"), ["lr:", "lr_init"]), (dict(learning_rate=1), ["learning_rate:", "lr_init"]), (dict(micro_batch=1), ["micro_batch:", "micro_bsz"]), (dict(epoch=1), ["epoch:", "'epochs'"]),
    (dict(lr_init="abc"), ["lr_init: expected a number, got 'abc'"]), (dict(lr_init="1e-4"), ["expected a number"]), (dict(lr_init=float("inf")), ["lr_init", "finite"]), (dict(lr_init=float("nan")), ["lr_init", "nan"]),
    (dict(lr_init=-1.0), ["lr_init", "greater than or equal to 0", "-1.0"]), (dict(micro_bsz=2.5), ["micro_bsz: expected a whole number, got 2.5"]), (dict(micro_bsz=0), ["micro_bsz", "greater than 0"]),
    (dict(micro_bsz=True), ["micro_bsz: expected a whole number, got True"]), (dict(seed="0"), ["seed: expected a whole number"]), (dict(dropout=1.0), ["dropout", "less than 1"]),
    (dict(sample_prompts=[1]), ["sample_prompts: expected a list of texts"]), (dict(resume="yes"), ["resume: expected true or false"]), (dict(grad_cp="on"), ["grad_cp: expected true or false or 'auto', got 'on'"]),
    (dict(lr_schedule="cosine"), ["lr_schedule: 'cosine'", "did you mean 'cos'", "wsd, linear, exp, constant"]), (dict(peft="loar"), ["peft: 'loar'", "did you mean 'lora'", "lora, rslora, pissa", "miss, lisa, state, none"]),
    (dict(peft=3), ["peft: expected a word", "LoRA(r=8)"]), (dict(peft={"r": 8}), ["peft:", "method"]), (dict(peft=["lora", "none"]), ["peft: 'none'"]), (dict(optim="sgd"), ["optim: 'sgd'", "allowed: adamw"]),
    (dict(epochs=1.0, max_steps=3), ["epochs and max_steps"]), (dict(peft="state", r=8), ["r: peft = 'state'"]), (dict(peft="none", dropout=.1), ["dropout: peft = 'none'"]),
    (dict(peft=LoRA(r=4), r=8), ["r: with a method object"]), (dict(peft="none", train_parts=["ln"]), ["train_parts:"]), (dict(model=None), ["model: is missing"]), (dict(data=None), ["data: is missing"]),
    (dict(model=3), ["model: expected"]), (dict(data=3), ["data: expected"]), (dict(data="no.jsonl"), ["data: there is no file 'no.jsonl'"]), (dict(eval_data="no.jsonl"), ["eval_data: there is no file"]),
    (dict(adapter="nowhere"), ["adapter: there is no 'nowhere'"]), (dict(name="../up"), ["name: '../up'"]), (dict(name=".."), ["name:"]), (dict(resume=True), ["resume: which run"]),
    (dict(precision="bf16", peft="none"), ["precision", "not in this version yet"]), (dict(precision="fp16", peft="none"), ["precision = 'fp16'", "masters"]), (dict(precision="fp16", device="cpu"), ["precision: 'fp16' is for CUDA GPUs", "'fp32' or 'auto'"]),
    (dict(peft="bone", alpha=8.), ["alpha: peft = 'bone' has no alpha"]), (dict(peft="miss", dropout=.1), ["dropout: peft = 'miss' has no dropout"]), (dict(peft="dora", rslora=True), ["rslora: peft = 'dora'"]), (dict(peft="lisa", r=8), ["r: peft = 'lisa'"]),
    (dict(peft="bat", ranks={"ffn": 4}), ["ranks: peft = 'bat'"]), (dict(peft="pisa"), ["did you mean 'pissa'"]), (dict(peft="train"), ["peft: 'train' is not known"]), (dict(peft=LoRA), ["LoRA(r=8)"]), (dict(ranks=8), ["ranks: expected a table"]),
    (dict(peft="loftq"), ["peft:", "quant = 'nf4'"]), (dict(peft=LoftQ(kind="fp4"), quant="nf4"), ["quant: LoftQ is made for a base packed as fp4"]), (dict(peft={"method": "pissa", "rounds": 1, "kind": "4bit"}, quant="int8"), ["PiSSA is made for a base packed as nf4"]),
    (dict(peft=LoftQ(kind="fp4")), ["peft:", "quant = 'fp4'"]), (dict(peft="none", quant="nf4"), ["packed matrices can't train"]), (dict(peft="lisa", quant="nf4"), ["quant: packed", "LISA"]), (dict(peft=["state", LISA()], quant="int8"), ["quant: packed", "LISA"]),
    (dict(quant="nf5"), ["quant: 'nf5'", "did you mean 'nf4'"]), (dict(quant="int4"), ["quant: 'int4'"]), (dict(optim="lora_plus"), ["did you mean 'loraplus'"]), (dict(peft="bone", optim="lorafa"), ["optim: 'lorafa'", "'bone' has none"]),
    (dict(peft=[MiSS(), "state"], optim="loraplus"), ["'miss' and 'state' has none"]), (dict(train_type="state", optim="lorafa"), ["'state' has none"]), (dict(peft="none", optim="loraplus"), ["optim: 'loraplus'"]),
    (dict(loraplus_lr_ratio=8.0), ["loraplus_lr_ratio", "optim = 'loraplus'"]), (dict(optim="loraplus", loraplus_lr_ratio=0.0), ["loraplus_lr_ratio", "greater than 0"]), (dict(int8_matmul="fast", quant="nf4"), ["int8_matmul"]),
    (dict(peft={"library": "peft"}), ["peft: expected a word"]), (dict(peft=["lora", "bone"]), ["'lora' and 'bone'", "choose one of them"]), (dict(peft=[PiSSA(), OLoRA()]), ["'pissa' and 'olora'"]), (dict(peft=["lisa", DoRA()]), ["'lisa'", "'dora'"]),
])
def test_refusal(settings, words):
    said = refused(**settings)
    assert all(w in said for w in words), said


@pytest.mark.parametrize("settings, words", [
    (dict(nodes=2), "master: 2 hosts need a place to meet"), (dict(nodes=2, master="10.0.0.1"), "master: 2 hosts need"), (dict(nodes=2, node_rank=2, master="a:1"), "node_rank: 2 of 2 hosts"),
    (dict(node_rank=1), "node_rank: 1 of 1 host"), (dict(master="a:1"), "master: is where several hosts meet"), (dict(devices=2, device="cpu:0"), "device: 'cpu:0' is one device"), (dict(devices=0), "devices: should be greater than 0")])
def test_devices_and_hosts_fit_together(settings, words):
    assert words in refused(**settings)


def test_several_errors_are_all_named():
    said = refused(lr_init="a", epochs="b", foo=1)
    assert all(name in said for name in ("lr_init:", "epochs:", "foo:"))


def test_every_setting_of_the_design_has_a_description_and_a_default():
    table = {row["name"]: row for row in settings_table()}
    assert set(table) == set(Config.model_fields)
    wanted = """model data eval_data adapter state template loss_mask dataload ctx_len chunk_ctx micro_bsz accumulate epochs max_steps peft r alpha dropout targets train_parts quant int8_matmul train_type bptt
        lr_init lr_final lr_schedule warmup_steps optim weight_decay grad_clip grad_cp precision device backend strategy devices eval_split eval_steps save_steps keep sample_prompts seed name output log_with resume
        early_stop layerwise_lr l2wrap z_loss mask_id sft_field sft_split magic_prime nodes node_rank master""".split()
    assert set(wanted) <= set(table)
    assert all(len(row["description"]) > 5 and row["group"] for row in table.values())
    got = {n: table[n]["default"] for n in ("peft", "r", "dropout", "lr_schedule", "optim", "weight_decay", "grad_clip", "eval_split", "keep", "seed", "output", "early_stop", "resume", "dataload")}
    assert got == dict(peft="lora", r=16, dropout=0, lr_schedule="cos", optim="adamw", weight_decay=0, grad_clip=1, eval_split=.02, keep=3, seed=0, output="runs", early_stop=3, resume=False, dataload="bucket")


def test_toml_round_trip(tmp_path):
    config = make(data=str(rows_file(tmp_path)), r=8, lr_init=3e-4, sample_prompts=["a \"b\"", "早上好"], targets=["att.key"], grad_cp=True)
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(path) == config and Config.from_toml(path, r=4).r == 4


def test_toml_errors_name_the_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f"model = 'rwkv7-tiny'\ndata = '{rows_file(tmp_path)}'\n# a comment\nlr_init = 'fast'\n")
    with pytest.raises(ConfigError, match=r"run.toml line 4: lr_init: expected a number"): Config.from_toml(path)
    path.write_text("model = \n")
    with pytest.raises(ConfigError, match="not valid TOML.*line 1"): Config.from_toml(path)
    with pytest.raises(FileNotFoundError): Config.from_toml(tmp_path / "none.toml")


def test_method_objects_survive_as_tables(tmp_path):
    data = str(rows_file(tmp_path))
    path = tmp_path / "run.toml"
    for given in ([LoRA(r=4, dropout=.1), StateTuning(), Train(["ln"])], LoRA(rslora=True, ranks={"ffn": 2}), PiSSA(4, rounds=2, kind="nf4"), OLoRA(4), MiLoRA(4), EVA(4, rho=1.5), LoftQ(4, kind="nf4"), DoRA(4, 8), Bone(8), MiSS(8), LISA(1, 3, emb=True)):
        config = make(data=data, peft=given, quant="nf4" if getattr(given, "kind", None) else "none")
        path.write_text(config.to_toml())
        again = Config.from_toml(path)
        assert methods_of(again) == methods_of(config) == (given if isinstance(given, list) else [given]) and Config.from_toml(path).to_toml() == again.to_toml() == config.to_toml()


@pytest.mark.parametrize("settings, expected", [
    ({}, [LoRA()]), (dict(r=4, alpha=8., dropout=.1), [LoRA(4, 8., .1)]), (dict(peft="state"), [StateTuning()]), (dict(train_type="state"), [StateTuning()]), (dict(peft="none"), []),
    (dict(peft="lora", train_type="state"), [LoRA(), StateTuning()]), (dict(train_parts="ln"), [LoRA(), Train(["ln"])]), (dict(peft=["lora", "state"]), [LoRA(), StateTuning()]), (dict(peft={"method": "lora", "r": 2}), [LoRA(2)]),
    (dict(peft="rslora", r=4), [LoRA(4, rslora=True)]), (dict(rslora=True, ranks={"ffn": 4}), [LoRA(rslora=True, ranks={"ffn": 4})]), (dict(peft="pissa", r=4, alpha=8.), [PiSSA(4, 8.)]), (dict(peft="olora"), [OLoRA()]), (dict(peft="milora"), [MiLoRA()]),
    (dict(peft="eva", r=4), [EVA(4)]), (dict(peft="loftq", quant="fp4"), [LoftQ(kind="fp4")]), (dict(peft="dora", dropout=.1), [DoRA(dropout=.1)]), (dict(peft="bone", r=8), [Bone(8)]), (dict(peft="bat"), [Bone()]), (dict(peft="miss", r=8), [MiSS(8)]),
    (dict(peft="lisa"), [LISA()]), (dict(peft=["dora", "state"]), [DoRA(), StateTuning()]), (dict(peft=["miss", {"method": "train", "parts": ["ln"]}]), [MiSS(), Train(["ln"])])])
def test_methods(settings, expected): assert methods_of(make(**settings)) == expected


def test_plain_values_are_accepted(tmp_path):
    config = make(micro_bsz=np.int64(4), lr_init=np.float32(.5), output=tmp_path, targets=("att.key",), epochs=2, grad_cp=1)
    assert (config.micro_bsz, config.lr_init, config.output, config.targets, config.epochs, config.grad_cp) == (4, .5, str(tmp_path), ["att.key"], 2, True)
    with pytest.raises(Exception): config.r = 3
    assert config.changed(micro_bsz=None).micro_bsz is None


def test_config_loads_nothing_heavy():
    "Settings are checked without torch: in a shell a typo costs no start of PyTorch."
    code = "import sys; from rwkv_peft.train.config import Config; print([m for m in ('accelerate', 'peft', 'transformers', 'matplotlib', 'IPython', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def rows_file(folder):
    path = folder / "rows.jsonl"
    path.write_text('{"text": "hello"}\n')
    return path
