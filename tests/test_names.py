"""One model under three sets of names. fla's names and shapes are written down here once more, as its own model classes (0.6.0) list them."""
import json
import pytest
import torch
from safetensors.torch import load_file, save_file
from rwkv_peft.model.checkpoint import CheckpointError, fingerprint, load, official, read, save
from rwkv_peft.model.files import write_tensors
from rwkv_peft.model.names import to_fla
from rwkv_peft.model.rwkv import RWKV, RWKVConfig

C, F, V, L = 64, 96, 257, 2
SIZES = {"5.2": {}, "6": {"mix_rank": 6, "decay_rank": 10}, "7": {"w_rank": 8, "a_rank": 12, "v_rank": 4, "g_rank": 20}}


def fla(version):
    "Names and shapes in the state_dict of fla's RWKV6ForCausalLM (expand_k=1) and RWKV7ForCausalLM."
    out = {"model.embeddings.weight": (V, C), "model.norm.weight": (C,), "model.norm.bias": (C,), "lm_head.weight": (V, C)}
    for i in range(L):
        layer = {f"{norm}.{p}": (C,) for norm in (["pre_norm"] if i == 0 else []) + ["attn_norm", "ffn_norm", "attn.g_norm"] for p in ("weight", "bias")}
        layer |= {"attn.o_proj.weight": (C, C), "ffn.value.weight": (C, F)}
        if version == "7":
            layer |= {f"attn.{c}_proj.weight": (C, C) for c in "rkv"} | {f"attn.x_{c}": (1, 1, C) for c in "rwkvag"} | {"attn.k_k": (C,), "attn.k_a": (C,), "attn.r_k": (4, 16)}
            for c, rank in zip("wavg", (8, 12, 4, 20)):
                if c == "v" and i == 0: continue
                layer |= {f"attn.{c}_lora.lora.0.weight": (rank, C), f"attn.{c}_lora.lora.2.weight": (C, rank)} | ({} if c == "g" else {f"attn.{c}_lora.lora.2.bias": (C,)})
            layer |= {"ffn.key.weight": (F, C), "ffn.x_k": (C,)}
        else:
            layer |= {f"attn.{c}_proj.linear.weight": (C, C) for c in "rkvg"} | {"attn.x_proj.0.mu": (C,), "attn.x_proj.0.linear.weight": (30, C), "attn.x_proj.2.weight": (C, 30)}
            layer |= {"attn.x_bias": (5, C), "attn.bonus": (4, 16), "ffn.key.linear.weight": (F, C), "ffn.key.mu": (C,), "ffn.receptance.linear.weight": (C, C), "ffn.receptance.mu": (C,)}
            layer |= {"attn.w_proj.linear.lora.0.weight": (10, C), "attn.w_proj.linear.lora.2.weight": (C, 10), "attn.w_proj.linear.lora.2.bias": (C,)}
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return out


def tensors(version, dtype=torch.bfloat16):
    torch.manual_seed(3)
    return {n: torch.randn_like(x).to(dtype) for n, x in RWKV(RWKVConfig(version, n_layer=L, n_embd=C, head_size=16, dim_ffn=F, vocab_size=V, **SIZES[version])).state_dict().items()}


def same(a, b): return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("version, names", [("6", "fla"), ("7", "fla"), ("5.2", "hf"), ("6", "hf"), ("7", "hf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_there_and_back_bit_for_bit(tmp_path, capsys, version, names, suffix):
    file = tensors(version)
    model = load(write_tensors(file, tmp_path / "a.pth"), device="cpu", dtype=torch.float32)
    other = save(model, tmp_path / f"b{suffix}", names=names)
    written = load_file(other) if suffix == ".safetensors" else torch.load(other, weights_only=True)
    if names == "fla": assert {n: tuple(x.shape) for n, x in written.items()} == fla(version)
    else: assert set(written) == {n if n.startswith("head.") else f"model.{n}" for n in file}
    capsys.readouterr()
    again = load(other, device="cpu", dtype=torch.float32)
    assert capsys.readouterr().out == f"b{suffix}: an RWKV-{version} with {names} names, read as official ones\n"
    assert again.config == model.config and fingerprint(again) == fingerprint(file)
    assert same(torch.load(save(again, tmp_path / "c.pth"), weights_only=True), file)


def test_what_flas_tensors_compute(tmp_path):
    "Version 6's blends as fla's layer computes them from its own tensors, and version 7's low-rank parts as `nn.Linear`s."
    file = tensors("6", torch.float64)
    other, x, step = to_fla(file, "6"), torch.randn(7, C).double(), torch.randn(7, C).double()
    name, att = "model.layers.1.attn.", "blocks.1.att."
    inner = torch.tanh((x + step * other[f"{name}x_proj.0.mu"]) @ other[f"{name}x_proj.0.linear.weight"].T).view(7, 5, -1)
    theirs = torch.einsum("tnr,hnr->tnh", inner, other[f"{name}x_proj.2.weight"].view(C, 5, -1)) + other[f"{name}x_bias"]
    m = torch.tanh((x + step * file[f"{att}time_maa_x"].view(-1)) @ file[f"{att}time_maa_w1"]).view(7, 5, -1)
    for j, c in enumerate("wkvrg"):
        ours = file[f"{att}time_maa_{c}"].view(-1) + m[:, j] @ file[f"{att}time_maa_w2"][j]
        assert torch.allclose(theirs[:, "rwkvg".index(c)], ours, rtol=1e-12)
    seven = tensors("7", torch.float64)
    low = {n.removeprefix(f"{name}w_lora.lora."): t for n, t in to_fla(seven, "7").items() if n.startswith(f"{name}w_lora.")}
    theirs = torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, low["0.weight"])), low["2.weight"], low["2.bias"])
    assert torch.allclose(theirs, seven[f"{att}w0"].view(-1) + torch.tanh(x @ seven[f"{att}w1"]) @ seven[f"{att}w2"], rtol=1e-12)


@pytest.mark.parametrize("prefix", ["rwkv7.", "model.", ""])
def test_prefixes_are_taken_off(tmp_path, prefix):
    file = tensors("7")
    save_file({prefix + n if not n.startswith("head.") else n: x for n, x in file.items()}, tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors"), file)
    save_file({"model.embeddings.weight" if n == "emb.weight" else "model." + n: x for n, x in file.items()}, tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors"), file)


def test_a_folder_from_the_hub(tmp_path):
    file = to_fla(tensors("7"), "7")
    save_file(file, tmp_path / "model.safetensors")
    assert same(read(tmp_path), tensors("7")) and same(official(load(tmp_path, device="cpu", dtype=torch.float32)), tensors("7"))
    (tmp_path / "model.safetensors").unlink()
    names = list(file)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for part, inside in parts.items(): save_file({n: file[n] for n in inside}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: part for part, inside in parts.items() for n in inside}}))
    assert same(read(tmp_path), tensors("7")) and same(read(index), tensors("7"))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors, which isn't there"): read(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no index"): read(tmp_path)


def test_unused_tensors_have_no_place_in_flas_models():
    file = tensors("7")
    assert same(to_fla(file | {f"blocks.0.att.v{i}": torch.zeros(1) for i in range(3)}, "7"), to_fla(file, "7"))


def test_what_cannot_be_named_is_refused(tmp_path):
    model = load(write_tensors(tensors("5.2"), tmp_path / "a.pth"), device="cpu", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="fla has no RWKV-5.2"): save(model, tmp_path / "b.safetensors", names="fla")
    with pytest.raises(CheckpointError, match="official, hf or fla"): save(model, tmp_path / "b.safetensors", names="gguf")
    model = load(write_tensors(tensors("7"), tmp_path / "a.pth"), device="cpu", dtype=torch.float32)
    model.blocks[0].att.time_state = torch.nn.Parameter(torch.zeros(4, 16, 16))
    with pytest.raises(CheckpointError, match="no place for a tuned time_state"): save(model, tmp_path / "b.safetensors", names="fla")
    assert not (tmp_path / "b.safetensors").exists()
    good = to_fla(tensors("6"), "6")
    wrong = {"model.layers.0.attn.x_bias|x_bias has the shape": good | {"model.layers.0.attn.x_bias": torch.zeros(3, C), "model.layers.1.attn.x_bias": good["model.layers.1.attn.x_bias"]},
             "layers.1.attn.bonus is missing": {n: x for n, x in good.items() if n != "model.layers.1.attn.bonus"}, "layers.0.attn.more is in no RWKV-6": good | {"model.layers.0.attn.more": torch.zeros(1)},
             "time_decay_w1 has the shape": good | {"model.layers.1.attn.w_proj.linear.lora.0.weight": torch.zeros(C, 10)}}
    for word, file in wrong.items():
        with pytest.raises(CheckpointError, match=word) as e: read(write_tensors(file, tmp_path / "w.safetensors"))
        assert "w.safetensors" in str(e.value) and "\n" not in str(e.value)
