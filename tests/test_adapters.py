"Adapter folders: to Hugging Face and back, round trips, and what a damaged or foreign folder gets."
import copy
import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_peft.model.linear import Linear
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.state import load_state
from rwkv_peft.peft.adapters import AdapterError, attach, detach, load_adapter, merge, read_adapter, save_adapter, trained_parameters
from rwkv_peft.peft.lora import LoRA, linears
from rwkv_peft.peft.parts import Train
from rwkv_peft.peft.state_tuning import StateTuning

SIZES = dict(n_layer=3, n_embd=32, head_size=8, vocab_size=31, dim_ffn=80, w_rank=4, a_rank=4, v_rank=4, g_rank=8)
X = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(1))


def new_model(seed=0, **sizes):
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(**SIZES | sizes))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.15 * torch.randn_like(p))
        model.emb.weight.normal_()
    return model


def steps(model, parameters=None, n=4):
    optimiser = torch.optim.Adam(list(trained_parameters(model).values()) if parameters is None else parameters, lr=2e-2)
    for _ in range(n):
        optimiser.zero_grad()
        model(X[:, :-1], targets=X[:, 1:])[0].backward()
        optimiser.step()
    return model


def trained(*methods, targets=None): return steps(attach(new_model(), *methods, targets=targets))


@torch.no_grad()
def logits(model): return model(X)[0]


def rel(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def peft():
    import peft
    return peft


# ---- Hugging Face


@pytest.mark.parametrize("methods, targets", [
    ((LoRA(r=4, alpha=8),), None),
    ((LoRA(r=4, alpha=8, dropout=0.1),), ["att.key", "blocks.1.ffn.value", "head"]),
    ((LoRA(r=3), Train(["ln", "emb", "head"])), "att"),
    ((LoRA(r=3), Train([r"blocks\.1\.ln1", r"ln_x", r"ffn\.value"])), "att.key"),
])
def test_our_folder_in_hugging_face(tmp_path, peft, methods, targets):
    model = trained(*methods, targets=targets).eval()
    save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(new_model(), str(tmp_path / "a"))
    assert rel(logits(theirs), logits(model)) < 1e-5 and rel(logits(new_model()), logits(model)) > 1e-2
    whole, merged = theirs.merge_and_unload(), merge(model)
    assert {n for n, _ in whole.named_parameters()} == {n for n, _ in merged.named_parameters()}
    for n, p in merged.named_parameters(): assert rel(whole.get_parameter(n), p) < 1e-6, n


def test_hugging_face_trains_our_folder_on(tmp_path, peft):
    model = trained(LoRA(r=4, alpha=8), targets="att")
    save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(new_model(), str(tmp_path / "a"), is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    steps(theirs.base_model.model, parameters)
    theirs.save_pretrained(str(tmp_path / "b"))
    steps(model)
    assert rel(logits(load_adapter(new_model(), tmp_path / "b")), logits(model)) < 1e-4


@pytest.mark.parametrize("settings", [
    dict(r=4, lora_alpha=8, target_modules=["receptance", "key", "value", "output"]),
    dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["att.key"], modules_to_save=["ln1", "head"]),
    dict(r=4, lora_alpha=8, target_modules=r".*\.att\.(key|value)", rank_pattern={"blocks.1.att.key": 7}, alpha_pattern={r"blocks\.\d+\.att\.value": 3}),
    dict(r=4, lora_alpha=4, target_modules="all-linear"),
])
def test_hugging_faces_folder_in_ours(tmp_path, peft, settings):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(new_model(), peft.LoraConfig(**settings))
    steps(theirs.base_model.model, [p for p in theirs.parameters() if p.requires_grad])
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapter(new_model(), tmp_path / "theirs")
    assert rel(logits(ours), logits(theirs)) < 1e-5 and rel(logits(new_model()), logits(theirs)) > 1e-2
    save_adapter(ours, tmp_path / "ours")     # and out again, ranks and scales by matrix included
    again = peft.PeftModel.from_pretrained(new_model(), str(tmp_path / "ours"))
    assert rel(logits(again), logits(theirs)) < 1e-5
    whole = theirs.merge_and_unload()
    for n, p in merge(ours).named_parameters(): assert rel(whole.get_parameter(n), p) < 1e-6, n


def test_hugging_face_warns_of_what_it_cannot_read(tmp_path, peft):
    save_adapter(trained(LoRA(r=2), StateTuning(), Train("time")), tmp_path / "a")
    with pytest.warns(UserWarning, match="rwkv_peft_needs_also_trained.safetensors_and_state.pth"): peft.PeftModel.from_pretrained(new_model(), str(tmp_path / "a"))


@pytest.mark.parametrize("settings, says", [
    (dict(init_lora_weights="pissa"), "changes the base as well"), (dict(bias="all"), "biases"), (dict(trainable_token_indices={"emb": [1, 2]}), "trainable_token_indices"),
])
def test_variants_that_are_not_plain_lora_are_refused(tmp_path, peft, settings, says):
    theirs = peft.get_peft_model(new_model(), peft.LoraConfig(r=4, target_modules=["att.key"], **settings))
    theirs.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match=says): load_adapter(new_model(), tmp_path / "a")


# ---- round trips


@pytest.mark.parametrize("methods", [(LoRA(r=4, alpha=7, dropout=0.2),), (StateTuning(),), (Train("time"),), (Train("all"),),
                                     (LoRA(r=3), StateTuning()), (LoRA(r=2), StateTuning(), Train(["ln", "time", "emb"]))])
def test_a_folder_alone_brings_everything_back(tmp_path, methods):
    model = trained(*methods).eval()
    save_adapter(model, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    again = load_adapter(new_model().eval(), tmp_path / "elsewhere")
    ours, theirs = trained_parameters(again), trained_parameters(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(p, theirs[n]) and p.dtype == torch.float32 for n, p in ours.items())
    assert torch.equal(logits(again), logits(model)) and again.attached.base == model.attached.base
    save_adapter(again, tmp_path / "b")
    assert all((tmp_path / "b" / f.name).exists() for f in (tmp_path / "elsewhere").iterdir())
    assert [getattr(m.adapter, "dropout", None) for m in linears(again).values()] == [getattr(m.adapter, "dropout", None) for m in linears(model).values()]
    steps(again.train()), steps(model.train())
    if not any(isinstance(m, LoRA) and m.dropout for m in methods): assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_layout_is_hugging_faces(tmp_path):
    model = trained(LoRA(r=4, alpha=8), StateTuning(), Train("ln"))
    save_adapter(model, tmp_path / "a")
    tensors, config = load_file(tmp_path / "a" / "adapter_model.safetensors"), json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert tensors["base_model.model.blocks.2.att.key.lora_A.weight"].shape == (4, 32) and tensors["base_model.model.blocks.0.ffn.key.lora_B.weight"].shape == (80, 4)
    assert "base_model.model.blocks.0.ln0.bias" in tensors and not any("state" in n or "adapter" in n for n in tensors)
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"], config["task_type"], config["inference_mode"]) == ("LORA", 4, 8, "none", None, True)
    assert config["target_modules"] == ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
    assert list(load_state(tmp_path / "a" / "state.pth", model.config)) == [f"blocks.{i}.att.time_state" for i in range(3)]
    about = json.loads((tmp_path / "a" / "rwkv_peft.json").read_text())
    assert [m["method"] for m in about["methods"]] == ["LoRA", "StateTuning", "Train"] and len(about["base"]["fingerprint"]) == 64
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "state.pth", "rwkv_peft.json"}


def test_a_loaded_adapter_detaches_to_the_base(tmp_path):
    save_adapter(trained(LoRA(r=4), StateTuning()), tmp_path / "a")
    model = new_model()
    before = logits(model)
    assert torch.equal(logits(detach(load_adapter(model, tmp_path / "a"))), before)


# ---- writing


def folder_bytes(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_full_disk_leaves_the_older_adapter_whole(tmp_path):
    resource = pytest.importorskip("resource")
    save_adapter(trained(LoRA(r=2)), tmp_path / "a")
    before, bigger = folder_bytes(tmp_path / "a"), trained(LoRA(r=16), StateTuning())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))     # every write beyond it fails as on a full disk
    try:
        with pytest.raises(AdapterError, match="was not written .*; make|was not written .*: make room") as e: save_adapter(bigger, tmp_path / "a")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value) and folder_bytes(tmp_path / "a") == before and os.listdir(tmp_path) == ["a"]
    save_adapter(bigger, tmp_path / "a")
    assert torch.equal(logits(load_adapter(new_model(), tmp_path / "a")), logits(bigger))


def test_a_process_that_died_between_two_renames_loses_nothing(tmp_path):
    model = trained(LoRA(r=2))
    save_adapter(model, tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / ".a.old")
    assert torch.equal(logits(load_adapter(new_model(), tmp_path / "a")), logits(model)) and os.listdir(tmp_path) == ["a"]
    shutil.copytree(tmp_path / "a", tmp_path / ".a.old")     # died after the second
    save_adapter(trained(StateTuning()), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and {f.name for f in (tmp_path / "a").iterdir()} == {"state.pth", "rwkv_peft.json"}


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(AdapterError, match="thesis.tex"): save_adapter(trained(LoRA(r=2)), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(AdapterError): save_adapter(trained(LoRA(r=2)), tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="nothing is attached"): save_adapter(new_model(), tmp_path / "new")


# ---- reading what is not right


def edit(change):
    "A change to the tensors of adapter_model.safetensors, as a change to a folder."
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return apply


def configure(**values):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return apply


K = "base_model.model.blocks.1.att.key.lora_"


@pytest.mark.parametrize("damage, says", [
    (lambda f: shutil.rmtree(f), "is no folder"),
    (lambda f: [p.unlink() for p in f.iterdir()], "holds no adapter"),
    (lambda f: (f / "adapter_config.json").unlink(), "only one of"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "can't be read as json"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "holds a list"),
    (lambda f: os.truncate(f / "adapter_model.safetensors", 3000), "cut short"),
    (configure(peft_type="MISS"), "type 'MISS'"),
    (configure(target_modules=["att.key", "att.value", "ffn.key"]), "should adapt blocks.0.ffn.key"),
    (edit(lambda t: t.pop(K + "B.weight")), "only lora_A for blocks.1.att.key"),
    (edit(lambda t: t.update({K + "A.weight": torch.zeros(4, 31)})), r"blocks.1.att.key.lora_A has shape \(4, 31\) and the model needs \(4, 32\)"),
    (edit(lambda t: t.update({K + "B.weight": torch.zeros(32, 5)})), r"lora_B has shape \(32, 5\)"),
    (edit(lambda t: t.update({"base_model.model.blocks.7.att.key.lora_A.weight": torch.zeros(4, 32), "base_model.model.blocks.7.att.key.lora_B.weight": torch.zeros(32, 4)})), "blocks.7.att.key, which is no matrix"),
    (edit(lambda t: t.update({"base_model.model.surprise": torch.zeros(3)})), "'surprise'"),
    (lambda f: save_file({"blocks.0.att.w0": torch.zeros(5)}, f / "trained.safetensors"), r"blocks.0.att.w0 has shape \(5,\)"),
    (lambda f: torch.save({"blocks.0.att.time_state": torch.zeros(4, 8, 8)}, f / "state.pth"), "1 layers"),
    (lambda f: torch.save(Linear, f / "state.pth"), "more than tensors"),
])
def test_damage_is_told_by_name_and_the_model_is_left_alone(tmp_path, damage, says):
    save_adapter(trained(LoRA(r=4), targets=["att.key", "att.value"]), tmp_path / "a")
    damage(tmp_path / "a")
    model = new_model()
    with pytest.raises(AdapterError, match=says) as e: load_adapter(model, tmp_path / "a")
    assert "\n" not in str(e.value) and getattr(model, "attached", None) is None
    assert all(m.adapter is None for m in linears(model).values()) and all(p.requires_grad for p in model.parameters()) and torch.equal(logits(model), logits(new_model()))


def test_another_base_is_refused_unless_wanted(tmp_path):
    save_adapter(trained(LoRA(r=4)), tmp_path / "a")
    with pytest.raises(AdapterError, match="another base"): load_adapter(new_model(seed=1), tmp_path / "a")
    with pytest.raises(AdapterError, match="another base"): load_adapter(new_model(n_layer=2), tmp_path / "a")
    with pytest.raises(AdapterError, match="no matrix of this model"): load_adapter(new_model(n_layer=2), tmp_path / "a", check_base=False)
    assert load_adapter(new_model(seed=1), tmp_path / "a", check_base=False).blocks[0].att.key.adapter is not None
    with pytest.raises(AdapterError, match="detach"): load_adapter(load_adapter(new_model(), tmp_path / "a"), tmp_path / "a")


def test_reading_needs_no_model_and_copies_survive(tmp_path):
    model = trained(LoRA(r=4, alpha=2))
    save_adapter(model, tmp_path / "a")
    found = read_adapter(tmp_path / "a")
    assert found.scale("blocks.0.att.key") == 0.5 and len(found.lora) == 18 and not found.weights and not found.states
    twin = copy.deepcopy(model)
    detach(twin)
    assert model.blocks[0].att.key.adapter is not None and torch.equal(logits(twin), logits(new_model()))
