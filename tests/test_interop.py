"Adapters of every method to Hugging Face's peft and back, that library's own methods on our model, and files of older trainers."
import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from rwkv_peft.look.deltas import deltas
from rwkv_peft.model.checkpoint import fingerprint, load, official, save
from rwkv_peft.model.quant import quantize, rounded
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.peft.adapters import AdapterError, attach, detach, load_adapter, merge, read_adapter, save_adapter, trained_parameters
from rwkv_peft.peft.inits import EVA, LoftQ, MiLoRA, OLoRA, PiSSA
from rwkv_peft.peft.interop import CANNOT, import_seed, read_seed
from rwkv_peft.peft.lisa import LISA
from rwkv_peft.peft.lora import LoRA, MethodError, find_linears, linears
from rwkv_peft.peft.magnitude import DoRA
from rwkv_peft.peft.parts import Train
from rwkv_peft.peft.shards import Bone, MiSS
from rwkv_peft.peft.state_tuning import StateTuning
from rwkv_peft.train.config import Config
from rwkv_peft.train.folder import save_checkpoint, save_config

import peft as hf

SIZES = dict(n_layer=2, n_embd=64, head_size=16, vocab_size=31, dim_ffn=128)
LOW = dict(w_rank=4, a_rank=4, v_rank=4, g_rank=8)
X = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(1))
rel = lambda a, b: ((a - b).float().norm() / b.float().norm()).item()


def new_model(seed=0, dtype=torch.float32, **sizes):
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(**SIZES | (LOW if sizes.get("version", "7") == "7" else {}) | sizes))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
        model.emb.weight.normal_()
    return model.to(dtype)


def steps(model, n=3, lr=1e-2):
    optimiser = torch.optim.Adam(trained_parameters(model).values(), lr=lr)
    for _ in range(n):
        optimiser.zero_grad()
        model(X[:, :-1], targets=X[:, 1:])[0].backward()
        optimiser.step()
    return model


@torch.no_grad()
def logits(model): return model(X)[0]


def stir(model, scale=0.02):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trained_parameters(model).values(): p.add_(scale * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory): return save(new_model(), tmp_path_factory.mktemp("base") / "base.pth")


def from_file(file): return load(file, device="cpu", dtype=torch.float32)


ADAPTERS = {"lora": LoRA(r=4, alpha=8), "rslora": LoRA(r=4, alpha=6, rslora=True), "ranks": LoRA(r=4, ranks={"att.key": 7}), "pissa": PiSSA(r=4), "pissa 8": PiSSA(r=4, alpha=8), "olora": OLoRA(r=4), "milora": MiLoRA(r=4),
            "eva": EVA(r=4, batches=[X]), "dora": DoRA(r=4, alpha=8), "miss": MiSS(r=8), "miss 24": MiSS(r=24), "bone": Bone(r=8)}
KNOWN = [name for name in ADAPTERS if name != "bone"]     # to Hugging Face's peft


# ---- ours in theirs, theirs in ours


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KNOWN)
def test_our_folder_in_hugging_face(tmp_path, name, dtype, bound):
    model = attach(new_model(dtype=dtype), ADAPTERS[name])
    (steps(model) if dtype == torch.float32 else stir(model)).eval()
    save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = hf.PeftModel.from_pretrained(new_model(dtype=dtype), str(tmp_path / "a")).eval()
    assert rel(logits(theirs), logits(model)) < bound < 5 * rel(logits(new_model(dtype=dtype)), logits(model))


@pytest.mark.parametrize("config", [
    hf.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["att.key", "ffn.value"]),
    hf.LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules="all-linear", modules_to_save=["ln1"]),
    hf.MissConfig(r=8, target_modules=["att.key", "ffn.value"], init_weights=False),
    hf.MissConfig(r=24, target_modules=["att.key", "ffn.value"], modules_to_save=["head"]),
    hf.MissConfig(r=8, target_modules=["att.key"], init_weights="bat"),
    hf.MissConfig(r=8, mini_r=4, target_modules=["att.key"], init_weights="mini"),
], ids=["dora", "rsdora", "miss", "miss 24", "bat", "mini"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_their_folder_in_ours_and_back(tmp_path, config, dtype, bound):
    torch.manual_seed(3)
    theirs = hf.get_peft_model(new_model(dtype=dtype), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad: p.add_(0.05 * torch.randn_like(p))
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    base = new_model().to(dtype)
    if config.modules_to_save and dtype != torch.float32:
        with pytest.raises(MethodError, match="too coarse"): load_adapter(base, tmp_path / "theirs")
        return
    ours = load_adapter(base.eval(), tmp_path / "theirs")
    assert rel(logits(ours), logits(theirs)) < bound < 5 * rel(logits(new_model(dtype=dtype)), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    again = hf.PeftModel.from_pretrained(new_model(dtype=dtype), str(tmp_path / "ours")).eval()
    assert rel(logits(again), logits(theirs)) < bound
    if dtype == torch.float32:
        whole = theirs.merge_and_unload()
        for n, p in merge(ours).named_parameters(): assert rel(whole.get_parameter(n), p) < 1e-5, n


def test_bone_of_before_0_19_is_a_miss(tmp_path):
    D = {f"blocks.{i}.att.key": 0.1 * torch.randn(8, 64) for i in range(2)}
    save_file({f"base_model.model.{n}.bone_block": x for n, x in D.items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "BONE", "r": 8, "target_modules": ["att.key"], "init_weights": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = merge(load_adapter(new_model(), tmp_path))
    for n, x in D.items(): assert torch.allclose(model.get_parameter(f"{n}.weight"), new_model().get_parameter(f"{n}.weight") + x.T.repeat(1, 8), atol=1e-6)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_weights": "bat"}))
    with pytest.raises(AdapterError, match="by columns"): load_adapter(new_model(), tmp_path)


# ---- every method: a folder, a merge, a detach


@pytest.mark.parametrize("method", [*ADAPTERS.values(), LISA(layers=1), Train("time"), StateTuning()], ids=[*ADAPTERS, "lisa", "train", "state"])
def test_folder_merge_and_detach(tmp_path, file, method):
    model = steps(attach(from_file(file), method))
    save_adapter(model, tmp_path / "a")
    again = load_adapter(from_file(file), tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and again.attached.base == model.attached.base
    assert type(again.attached.methods[0]) is type(method) and again.attached.weights == model.attached.weights
    found, other, untouched = read_adapter(tmp_path / "a"), trained_parameters(again), dict(from_file(file).named_parameters())
    assert all(torch.equal(p, other[n]) for n, p in trained_parameters(model).items()) and len(other) == len(trained_parameters(model))
    assert torch.equal(logits(steps(again, 2)), logits(steps(model, 2)))      # and training goes on to the same bits
    save_adapter(model, tmp_path / "a")
    found, tuned = read_adapter(tmp_path / "a"), logits(model)
    assert torch.equal(official(detach(again))["blocks.0.att.key.weight"], official(from_file(file))["blocks.0.att.key.weight"])
    assert all(torch.equal(p, untouched[n]) for n, p in again.named_parameters()) and torch.equal(logits(again), logits(from_file(file)))
    merge(model)
    assert not any(m.adapter for m in linears(model).values()) and rel(logits(model), tuned) < 1e-5
    for n in linears(model): assert torch.allclose(found.merged(n, untouched[f"{n}.weight"][5:29], slice(5, 29)), found.merged(n, untouched[f"{n}.weight"])[5:29], atol=1e-6), n
    for n in linears(model): assert rel(found.merged(n, untouched[f"{n}.weight"]), model.get_parameter(f"{n}.weight")) < 1e-5 or n + ".weight" in found.weights, n


PACKED = [*((name, "int8") for name in ADAPTERS), *((name, "nf4") for name in ("lora", "pissa 8", "dora", "miss", "bone", "loftq", "qpissa")), ("loftq", "fp4")]


@pytest.mark.parametrize("name, kind", PACKED)
def test_over_a_packed_base(tmp_path, file, name, kind):
    method = {"loftq": LoftQ(r=4, rounds=2, kind=kind), "qpissa": PiSSA(r=4, rounds=2, kind=kind)}.get(name) or ADAPTERS[name]
    model = quantize(attach(from_file(file), method), kind)
    packed = {n: [x.clone() for x in m.storage.state_dict().values()] for n, m in linears(model).items() if m.storage is not None}
    tuned = logits(steps(model))
    assert all(torch.equal(a, b) for n, xs in packed.items() for a, b in zip(xs, linears(model)[n].storage.state_dict().values()))
    save_adapter(model, tmp_path / "a")
    found, plain = read_adapter(tmp_path / "a"), dict(from_file(file).named_parameters())
    assert found.about["quant"] == kind
    again = quantize(load_adapter(from_file(file), tmp_path / "a"), kind)
    assert torch.equal(logits(again), tuned)
    detach(again)
    base = quantize(from_file(file), kind)
    assert torch.equal(logits(again), logits(base)) and fingerprint(again) == fingerprint(base)
    merge(model)
    assert all(m.storage is None and m.adapter is None for m in linears(model).values()) and model.quant is None and rel(logits(model), tuned) < 1e-5
    for n in find_linears(model):
        assert rel(found.merged(n, plain[f"{n}.weight"], seen=lambda W: rounded(W, kind)), model.get_parameter(f"{n}.weight")) < 1e-5
    assert rel(logits(from_file(save(model, tmp_path / "merged.pth"))), tuned) < 1e-5
    with pytest.warns(UserWarning, match=f"packed as {kind}"): merge(load_adapter(from_file(file), tmp_path / "a"))


def test_double_scales_are_packed_again(file):
    model, base = (quantize(m, "nf4", double=True) for m in (attach(from_file(file), PiSSA(r=4)), from_file(file)))
    assert torch.equal(logits(detach(steps(model))), logits(base)) and all(m.storage.double for m in find_linears(model).values())


def test_detach_of_changed_weights_needs_the_file(file):
    model = attach(new_model(), PiSSA(r=4))
    with pytest.raises(MethodError, match="blocks.0.att.receptance.weight was changed when the method began and this model came from no file"): detach(model)
    assert model.attached and model.blocks[0].att.key.adapter is not None


# ---- another model


def test_another_version_is_refused_by_name(tmp_path):
    save_adapter(attach(new_model(version="6"), LoRA(r=2)), tmp_path / "six")
    save_adapter(attach(new_model(), StateTuning()), tmp_path / "seven")
    for folder, model, says in (("six", new_model(), "RWKV-6 and this model is an RWKV-7"), ("seven", new_model(version="6"), "RWKV-7 and this model is an RWKV-6")):
        for check_base in (True, False):
            with pytest.raises(AdapterError, match=says): load_adapter(model, tmp_path / folder, check_base)
        assert getattr(model, "attached", None) is None


def test_what_does_not_fit_together_is_refused(tmp_path, file):
    save_adapter(steps(attach(from_file(file), PiSSA(r=4))), tmp_path / "a")
    with pytest.raises(AdapterError, match="packed: load the model without quant"): load_adapter(load(file, device="cpu", dtype=torch.float32, quant="int8"), tmp_path / "a")
    path = tmp_path / "a/exact.safetensors"
    tensors = load_file(path)
    for change in ({"blocks.0.att.key.A0": torch.zeros(3, 64)}, {"blocks.0.att.key.C": torch.zeros(2)}):
        save_file(tensors | change, path)
        with pytest.raises(AdapterError, match="don't fit together for blocks.0.att.key"): load_adapter(from_file(file), tmp_path / "a")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(AdapterError, match="cut short"): load_adapter(from_file(file), tmp_path / "a")
    about = json.loads((tmp_path / "a/rwkv_peft.json").read_text())
    for methods, says in (([{"method": "os.system"}], "os.system"), ([{"method": "PiSSA", "r": -1}], "PiSSA can't have the settings")):
        save_file(tensors, path)
        (tmp_path / "a/rwkv_peft.json").write_text(json.dumps(about | {"methods": methods}))
        with pytest.raises(AdapterError, match=says): load_adapter(from_file(file), tmp_path / "a")


# ---- Hugging Face's methods on our model

CLASSES = [c for c in vars(hf).values() if isinstance(c, type) and issubclass(c, hf.PeftConfig) and c.__name__ not in ("PeftConfig", "PromptLearningConfig")]
NEEDS = {"AdaLoraConfig": dict(total_step=100), "IA3Config": dict(feedforward_modules=["ffn.value"]), "C3AConfig": dict(block_size=16), "VBLoRAConfig": dict(vector_length=16), "CPTConfig": dict(task_type="CAUSAL_LM", cpt_token_ids=[1])}
NO_MERGE = {"LILY": "not supported for Lily", "BEFT": "no bias"}
NO_PACKAGE = {"AdamssConfig": "scikit-learn"}
NO_RUN = {"AdaLoraConfig"}       # a run's settings can't hold it: its class makes no plain object to compare with
NOT_OUTSIDE = {"GLORA"}      # Hugging Face's own loader wants nn.Linear itself there, and ours is a kind of it


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_config_of_hugging_face(tmp_path, kind):
    "Attached, moved, saved, opened by that library, merged and taken off, or refused with its reason."
    try: config = kind(**NEEDS.get(kind.__name__, {}))
    except ImportError as e: return check_package(kind, e)
    if hasattr(config, "target_modules"): config.target_modules = ["att.key", "ffn.value"]
    word, model, plain = str(config.peft_type.value), new_model(), logits(new_model())
    if word in CANNOT:
        with pytest.raises(MethodError, match=kind.__name__) as e: attach(model, config)
        assert CANNOT[word] in str(e.value) and "\n" not in str(e.value) and all(p.requires_grad for p in model.parameters())
        return
    attach(model, config)
    loss = model(X[:, :-1], targets=X[:, 1:])[0]
    loss.backward()
    trained = trained_parameters(model)
    assert trained and all(".adapter." in n and p.dtype == torch.float32 for n, p in trained.items()) and any(p.grad is not None and p.grad.any() for p in trained.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    assert fingerprint(model) == fingerprint(new_model()) and all(torch.equal(x, y) for x, y in zip(official(model).values(), official(new_model()).values()))
    tuned = logits(stir(model))
    assert rel(tuned, plain) > 1e-6
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(new_model().eval(), tmp_path / "a")), tuned) or word in ("LORA", "MISS") and rel(logits(load_adapter(new_model().eval(), tmp_path / "a")), tuned) < 1e-5
    if word not in NOT_OUTSIDE: assert rel(logits(hf.PeftModel.from_pretrained(new_model(), str(tmp_path / "a")).eval()), tuned) < 1e-6
    if word in NO_MERGE:
        with pytest.raises(AdapterError, match=NO_MERGE[word]): merge(model)
        assert torch.equal(logits(model), tuned) and torch.equal(logits(detach(model)), plain)
    else: assert rel(logits(merge(model)), tuned) < 1e-5 and official(model).keys() == official(new_model()).keys()


def check_package(kind, e): assert NO_PACKAGE[kind.__name__] in str(e)


@pytest.mark.parametrize("kind", [c for c in CLASSES if c.__name__ not in NO_RUN], ids=lambda c: c.__name__)
def test_a_checkpoint_of_every_config_is_looked_at(tmp_path, kind, file):
    "Of a run that has no adapter's folder yet: as that library merges the live model in float64, and number by number as the folder then says."
    try: config = kind(**NEEDS.get(kind.__name__, {}))
    except ImportError as e: return check_package(kind, e)
    if hasattr(config, "target_modules"): config.target_modules = ["att.key", "ffn.value"]
    word = str(config.peft_type.value)
    if word in CANNOT: return
    run, model = tmp_path / "run", stir(attach(from_file(file), config, Train("ln1")))
    save_config(run, Config(model=str(file), data=["a row"], peft=config, train_parts=["ln1"]), {})
    save_checkpoint(run, 3, trained_parameters(model), {})
    (run / "data").mkdir()
    (run / "data/fingerprint.json").write_text(json.dumps({"base": model.attached.base}))
    chance = torch.get_rng_state()
    if word in NO_MERGE:
        with pytest.raises(AdapterError, match=NO_MERGE[word]): deltas(run, step=3)
        return
    found = deltas(run, step=3, near=False)
    assert torch.equal(chance, torch.get_rng_state())
    told = [(c.name, c.part, c.r, c.numbers, c.base, c.norm, c.sigma.tolist()) for c in found.changes]
    assert told == [(c.name, c.part, c.r, c.numbers, c.base, c.norm, c.sigma.tolist()) for c in deltas(save_adapter(model, tmp_path / "a"), file, near=False).changes]
    theirs, before = copy.deepcopy(model.attached.foreign).double().merge_and_unload(), load(file, device="cpu", dtype=torch.float64)
    assert {c.name for c in found.changes if c.part == "adapter"} == {f"blocks.{i}.{m}" for i in range(2) for m in ("att.key", "ffn.value")} and len(found) == 4 + 4
    for c in found.changes:
        if c.part != "adapter": continue
        D = (theirs.get_submodule(c.name).weight - before.get_submodule(c.name).weight).detach()
        expected = torch.linalg.svdvals(D)
        assert c.norm == pytest.approx(D.norm().item(), rel=1e-9) and torch.allclose(c.sigma, expected[:len(c.sigma)], atol=1e-9 * expected[0].item()) and (expected[len(c.sigma):] < 1e-9 * expected[0]).all()


def test_there_are_many_configs(): assert len(CLASSES) >= 40 and sum(c().peft_type.value not in CANNOT for c in CLASSES if c.__name__ not in (*NEEDS, *NO_PACKAGE)) >= 20


def test_a_config_is_trained_with_others_and_taken_off(tmp_path):
    model = attach(new_model(), StateTuning(), hf.OFTConfig(oft_block_size=8, target_modules=["att.key"], modules_to_save=["ln1"]), Train("time"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    tuned = logits(steps(model).eval())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before) and rel(tuned, logits(new_model())) > 1e-4
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(new_model().eval(), tmp_path / "a")), tuned)
    save_adapter(attach(new_model(), hf.OFTConfig(oft_block_size=8, target_modules=["att.key"], modules_to_save=["ln1"])), tmp_path / "b")
    theirs = hf.PeftModel.from_pretrained(new_model(), str(tmp_path / "b"))
    assert rel(logits(theirs), logits(new_model())) < 1e-5
    model = attach(new_model(), hf.HRAConfig(r=4))
    assert all(m.adapter is not None for m in find_linears(model).values()) and torch.equal(logits(detach(stir(model))), logits(new_model()))
    assert all(p.requires_grad for p in model.parameters()) and getattr(model, "attached", None) is None


@pytest.mark.parametrize("methods, targets, says", [
    ((hf.C3AConfig(block_size=7, target_modules=["att.key"]),), None, "Hugging Face peft says: The block size should be a factor"),
    ((hf.OFTConfig(oft_block_size=8, target_modules=["att.nothing"]),), None, "att.nothing"),
    ((hf.OFTConfig(oft_block_size=8, target_modules=["att.key"]),), "att.value", "leave targets out"),
    ((hf.OFTConfig(oft_block_size=8), hf.HRAConfig()), None, "can't be on a model together"),
    ((hf.OFTConfig(oft_block_size=8), LoRA(r=4)), None, "has an adapter already"),
    ((hf.LoraConfig(init_lora_weights="pissa"),), None, r"PiSSA\(\.\.\.\) of rwkv_peft"),
    ((hf.LoraConfig(bias="all"),), None, "bias='all'"),
    ((hf.LoraConfig(target_modules=["emb"]),), None, "emb"),
    ((hf.LoraConfig(trainable_token_indices=[1]),), None, r"Train\('emb'\)"),
])
def test_a_refusal_leaves_the_model_alone(methods, targets, says):
    model = new_model()
    with pytest.raises(MethodError, match=says) as e: attach(model, *methods, targets=targets)
    assert "\n" not in str(e.value) and all(m.adapter is None for m in linears(model).values()) and all(p.requires_grad for p in model.parameters())
    assert getattr(model, "attached", None) is None and torch.equal(logits(model), logits(new_model()))


def test_configs_over_bfloat16_train_in_float32():
    for config in (hf.OFTConfig(oft_block_size=8), hf.VeraConfig(r=8), hf.LoraConfig(r=4, use_dora=True)):
        model = attach(new_model(dtype=torch.bfloat16), config)
        model(X[:, :-1], targets=X[:, 1:])[0].backward()
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
        tuned = logits(stir(model))
        assert rel(logits(merge(model)), tuned) < 2e-2
    with pytest.raises(MethodError, match="trains bfloat16 numbers"): attach(new_model(dtype=torch.bfloat16), hf.LNTuningConfig(target_modules=["att.key"]))


def test_no_config_over_packed_storage(file):
    config = hf.OFTConfig(oft_block_size=8, target_modules=["att.key"])
    with pytest.raises(MethodError, match="is packed"): attach(load(file, device="cpu", dtype=torch.float32, quant="int8"), config)
    model = quantize(attach(from_file(file), config), "int8")
    with pytest.raises(MethodError, match="leave quant out"): model(X)


# ---- files of RWKV-PEFT, made by hand


def noise(*shape): return 0.1 * torch.randn(*shape)


def weights(): return {n: m.weight.detach().clone() for n, m in find_linears(new_model()).items()}


def seed_bone(n, W):
    r = 8
    D = noise(W.shape[1] // r, r, r)
    out = W.clone()
    for a in range(W.shape[0] // r):
        for b in range(W.shape[1] // r):
            block = W[a * r:a * r + r, b * r:b * r + r]
            out[a * r:a * r + r, b * r:b * r + r] = block + block @ D[b] + D[b]
    return {f"{n}.bone": D}, out


def seed_miss(n, W):
    D, r = noise(24, W.shape[0]), 24
    x = torch.eye(W.shape[1])
    return {f"{n}.disha": D}, W + (pad(x, (0, -W.shape[1] % r)).view(len(x), -1, r).sum(1) @ D).T


def seed_lora(n, W):
    A, B = noise(4, W.shape[1]), noise(W.shape[0], 4)
    return {f"{n}.lora_A": A, f"{n}.lora_B": B}, W + 8 * B @ A


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("make, settings, kind", [(seed_lora, dict(alpha=32), LoRA), (seed_bone, {}, Bone), (seed_miss, {}, MiSS)], ids=["lora", "bone 3-D", "bone 2-D"])
def test_a_seed_file_means_what_its_formula_says(tmp_path, prefix, make, settings, kind):
    torch.manual_seed(2)
    made = {n: make(n, W) for n, W in weights().items()}
    tensors = {f"{prefix}{k}": x for part, _ in made.values() for k, x in part.items()}
    tensors |= {f"{prefix}blocks.{i}.att.x_r": torch.full((1, 1, 64), 0.5) for i in range(2)} | {f"{prefix}ln_out.weight": torch.full((64,), 0.7)}
    torch.save(tensors, tmp_path / "rwkv-7.pth")
    torch.save({}, tmp_path / "rwkv-2.pth")
    model = import_seed(tmp_path, new_model(), **settings)
    assert type(model.attached.methods[0]) is kind
    tuned = logits(model)
    save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(new_model(), tmp_path / "ours")), tuned)
    merge(model)
    for n, (_, W) in made.items(): assert torch.allclose(model.get_parameter(f"{n}.weight"), W, atol=1e-5), n
    assert (model.ln_out.weight == 0.7).all() and (model.blocks[1].att.x_r == 0.5).all() and rel(logits(model), tuned) < 1e-5


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_seed_pissa_with_its_start(tmp_path, prefix):
    torch.manual_seed(2)
    start, trained, wanted = {}, {}, {}
    for n, W in weights().items():
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        A0, B0 = S[:4].sqrt()[:, None] * V[:4], U[:, :4] * S[:4].sqrt()
        A, B = A0 + noise(*A0.shape), B0 + noise(*B0.shape)
        start |= {f"{prefix}{n}.init_lora_A": A0, f"{prefix}{n}.init_lora_B": B0}
        trained |= {f"{n}.lora_A": A, f"{n}.lora_B": B}
        wanted[n] = (W - B0 @ A0) + B @ A
    torch.save(trained, tmp_path / "rwkv-1.pth")
    with pytest.raises(AdapterError, match="alpha="): import_seed(tmp_path, new_model())
    torch.save(start, tmp_path / "elsewhere.pth")
    model = merge(import_seed(tmp_path / "rwkv-1.pth", new_model(), init=tmp_path / "elsewhere.pth"))
    for n, W in wanted.items(): assert torch.allclose(model.get_parameter(f"{n}.weight"), W, atol=1e-5), n
    (tmp_path / "elsewhere.pth").rename(tmp_path / "init_pissa.pth")
    assert torch.equal(logits(merge(import_seed(tmp_path, new_model()))), logits(model))
    save_adapter(import_seed(tmp_path, new_model()), tmp_path / "ours")
    theirs = hf.PeftModel.from_pretrained(new_model(), str(tmp_path / "ours"))
    assert rel(logits(theirs), logits(model)) < 1e-5
    del start[next(iter(start))]
    torch.save(start, tmp_path / "init_pissa.pth")
    with pytest.raises(AdapterError, match="init_lora_A in init_pissa.pth"): import_seed(tmp_path, new_model())


def test_a_seed_state(tmp_path):
    S = {f"blocks.{i}.att.time_state": noise(4, 16, 16) for i in range(2)}
    torch.save({n: x.bfloat16() for n, x in S.items()}, tmp_path / "rwkv-1.pth")
    model = import_seed(tmp_path, new_model())
    plain = attach(new_model(), StateTuning({n: x.bfloat16().float() for n, x in S.items()}))
    assert torch.equal(logits(model), logits(plain)) and rel(logits(model), logits(new_model())) > 1e-3
    torch.save(dict(list(S.items())[:1]), tmp_path / "rwkv-1.pth")
    with pytest.raises(AdapterError, match="1 layers and the model has 2"): import_seed(tmp_path, new_model())


@pytest.mark.parametrize("tensors, settings, says", [
    ({"blocks.0.att.key.lora_A": noise(4, 64), "blocks.0.att.key.lora_B": noise(64, 4)}, {}, "alpha stands in no file"),
    ({"blocks.0.att.key.lora_A": noise(4, 64)}, dict(alpha=8), "no lora_B"),
    ({"blocks.0.att.key.lora_A": noise(4, 60), "blocks.0.att.key.lora_B": noise(64, 4)}, dict(alpha=8), "the model needs"),
    ({"blocks.5.att.key.bone": noise(8, 64)}, {}, "blocks.5.att.key, which is no matrix"),
    ({"blocks.0.att.key.bone": noise(8, 8, 9)}, {}, "bone of shape"),
    ({"blocks.0.att.key.bone": noise(6, 8, 8)}, {}, "the model needs"),
    ({"blocks.0.att.surprise": noise(8)}, {}, "surprise"),
    ({}, {}, "is empty"),
    (new_model().state_dict(), {}, "is a whole RWKV-7"),
])
def test_a_seed_file_that_does_not_fit(tmp_path, tensors, settings, says):
    torch.save(dict(tensors), tmp_path / "rwkv-1.pth")
    model = new_model()
    with pytest.raises(AdapterError, match=says) as e: import_seed(tmp_path / "rwkv-1.pth", model, **settings)
    assert "\n" not in str(e.value) and getattr(model, "attached", None) is None and torch.equal(logits(model), logits(new_model()))


def test_a_seed_folder_must_say_which_file(tmp_path):
    with pytest.raises(AdapterError, match="holds no .pth"): read_seed(tmp_path)
    torch.save({}, tmp_path / "one.pth"), torch.save({}, tmp_path / "two.pth")
    with pytest.raises(AdapterError, match="name the one"): read_seed(tmp_path)
    (tmp_path / "three.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(AdapterError, match="cut short"): read_seed(tmp_path / "three.pth")
    torch.save(Bone, tmp_path / "code.pth")
    with pytest.raises(AdapterError, match="more than tensors"): read_seed(tmp_path / "code.pth")
