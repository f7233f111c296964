"Cards of files of every kind: what is written on them is counted here in another way, and nothing in a file runs."
import io
import json
import math
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from small import SIZES, new_model

from rwkv_peft.look.checkpoint import bins, checkpoint_card, contained, cut, half_lives, values_of
from rwkv_peft.model.checkpoint import fingerprint, official, save
from rwkv_peft.model.files import CheckpointError
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.state import save_state
from rwkv_peft.peft import Bone, DoRA, LoRA, MiSS, PiSSA, StateTuning, attach, save_adapter


def text(html): return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html).replace("&#x27;", "'").replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def small(version, **more):
    torch.manual_seed(1)
    sizes = dict(n_layer=3, n_embd=32, head_size=8, vocab_size=31, dim_ffn=80) | ({k: SIZES[k] for k in ("w_rank", "a_rank", "v_rank", "g_rank")} if version == "7" else dict(mix_rank=4, decay_rank=4) if version == "6" else {})
    model = RWKV(RWKVConfig(version, **sizes | more))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_half_lives_are_those_of_a_memory_that_fades(version, suffix, tmp_path):
    "The model's own layer, given nothing to react to, halves what it holds when the card says."
    model = small(version).double()
    path = save(model, tmp_path / f"m.{suffix}")
    card, found, mark = text(checkpoint_card(path)), half_lives(official(model)), fingerprint(official(model))
    for layer, block in enumerate(model.blocks):
        att = block.att
        if version == "7":
            with torch.no_grad(): att.w2.zero_()      # the text moves nothing
            z = att.w0.flatten()
            per_token = torch.exp(-torch.exp(-torch.nn.functional.softplus(-z) - .5))       # as the official x070 writes it
        else: per_token = torch.exp(-torch.exp(att.time_decay.flatten()))
        left, steps = torch.ones(32, dtype=torch.float64), torch.zeros(32)
        for n in range(1, 3000):
            left = left * per_token.detach()
            steps = torch.where((left <= .5) & (steps == 0), n, steps)
            if (left <= .5).all(): break
        reached = steps > 0
        assert torch.equal(found[layer][reached].ceil().float(), steps[reached]) and reached.float().mean() > .7
    assert f"RWKV-{version}" in card and "Nothing odd" in card and "Half-lives" in card
    for said in (f"{sum(p.numel() for p in model.parameters()):,}", "31 tokens", "4 of 8", "float64", f"{path.stat().st_size:,} bytes", mark[:12]): assert said in card


def test_version_7_never_forgets_faster_than_its_floor():
    z = torch.tensor([-60., 0, 60], dtype=torch.float64)
    found = half_lives({"blocks.11.att.w0": z.view(1, 1, 3), "blocks.2.att.time_decay": torch.tensor([[-60., 0, 10]])})
    assert list(found) == [2, 11] and found[11][2].item() == pytest.approx(math.log(2) * math.sqrt(math.e)) and found[11][0] > 1e25
    assert found[2].tolist() == pytest.approx([math.log(2) * math.exp(60), math.log(2), math.log(2) * math.exp(-10)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e9) | st.just(math.inf) | st.just(math.nan), max_size=30))
def test_bins_count_every_number_once(values):
    by_numpy = np.histogram([min(v, 1e30) for v in values if not math.isnan(v)], [0, 2, 8, 32, 128, 512, 2048, math.inf])[0]
    assert bins(torch.tensor(values, dtype=torch.float64)) == by_numpy.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("piece", [1, 7, 1 << 22])
def test_values_by_pieces(dtype, piece):
    x = (3 * torch.randn(5, 9, generator=torch.Generator().manual_seed(2))).to(dtype)
    if dtype.is_floating_point: x[3, 3] = math.nan
    a = x.to(torch.float64).numpy().ravel()
    good = a[np.isfinite(a)]
    bad, top, rms = values_of(x, piece)
    assert bad == len(a) - len(good) and top == abs(good).max() and math.isclose(rms, math.sqrt((good ** 2).mean()), rel_tol=1e-12)


def test_a_model_that_is_not_well(tmp_path):
    tensors = {n: x.clone() for n, x in official(new_model()).items()}
    del tensors["blocks.1.ffn.x_k"]
    tensors["blocks.1.ffn.x_q"] = torch.zeros(2)
    tensors["blocks.2.att.output.weight"] = torch.zeros(32, 31)
    tensors["blocks.0.att.key.weight"][5, 6], tensors["blocks.0.att.key.weight"][7, 8] = math.inf, math.nan
    tensors["head.weight"] = tensors["emb.weight"].clone()
    tensors["blocks.0.att.w0"] = tensors["blocks.0.att.w0"].bfloat16()
    torch.save(tensors, tmp_path / "ill.pth")
    card = text(checkpoint_card(tmp_path / "ill.pth"))
    for said in ("missing blocks.1.ffn.x_k", "unknown blocks.1.ffn.x_q", "blocks.2.att.output.weight: (32, 31), not (32, 32)", "blocks.0.att.key.weight: 2 of 1,024", "the same numbers as the embedding", "bfloat16 1 32 64"): assert said in card, said
    assert "Nothing odd" not in card and "not finite" not in text(checkpoint_card(tmp_path / "ill.pth", values=False))
    torch.save({n: x for n, x in tensors.items() if not n.startswith("blocks.1.")}, tmp_path / "gap.pth")
    assert "2 of 3: some are missing" in text(checkpoint_card(tmp_path / "gap.pth"))


def rwkv4(): return {"emb.weight": torch.randn(50, 8), "blocks.0.ln0.weight": torch.ones(8), "blocks.0.att.time_decay": torch.zeros(8), "blocks.0.att.time_first": torch.zeros(8), "blocks.0.att.key.weight": torch.randn(8, 8), "blocks.0.ffn.key.weight": torch.randn(32, 8), "head.weight": torch.randn(50, 8)}
def rwkv5(): return rwkv4() | {"blocks.0.att.ln_x.weight": torch.ones(8), "blocks.0.att.time_decay": torch.zeros(2, 1)}


@pytest.mark.parametrize("tensors, said", [
    (rwkv4(), ("an RWKV-4", "50 tokens", "0.7 0.7 0.7")),
    (rwkv5(), ("an RWKV-5.0 or 5.1", "0.7 0.7 0.7")),
    (rwkv4() | {"blocks.0.att.r_k": torch.zeros(1, 8), "blocks.0.ffn.s_emb.weight": torch.zeros(3)}, ("an RWKV-7a",)),
    ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(4, 4)}, ("Hugging Face names that aren't known",)),
    ({"conv1.weight": torch.zeros(3, 3, 2, 2), "step": torch.tensor(7)}, ("no RWKV", "conv1.weight", "a number")),
    ({}, ("an empty dictionary",)),
    ({"blocks.0.att.key.lora_A": torch.zeros(4, 8), "blocks.0.att.key.lora_B": torch.zeros(8, 4), "blocks.0.ln1.weight": torch.ones(8)}, ("an adapter", "rank 4", "blocks.0.ln1.weight")),
    ({"blocks.0.att.key.adapter.A": torch.zeros(4, 8), "blocks.0.att.key.adapter.B": torch.zeros(8, 4)}, ("an adapter", "LoRA", "rank 4")),
    ({"blocks.0.att.key.A0": torch.zeros(4, 8), "blocks.0.att.key.A": torch.zeros(4, 8)}, ("exact.safetensors", "Give the folder")),
    ({"layers.0.mixer.D": torch.zeros(4), "layers.0.mixer.A_log": torch.zeros(4)}, ("If it is an RWKV at all",)),
    ({"blocks.0.ln1.weight": torch.ones(8), "blocks.0.ffn.x_k": torch.ones(8)}, ("some tensors of an RWKV",)),
    ({"blocks.0.att.key.bone": torch.zeros(4, 2, 2)}, ("an adapter", "Bone", "rank 2")),
], ids=["4", "5.0", "7a", "llama", "vision", "empty", "seed lora", "checkpoint", "exact", "mamba", "part", "seed bone"])
def test_strangers_are_named(tensors, said, tmp_path):
    for path, write in ((tmp_path / "x.pth", torch.save), (tmp_path / "x.safetensors", save_file)):
        write(tensors, path)
        card = text(checkpoint_card(path))
        assert all(s in card for s in said), card


def test_files_of_no_tensors_are_named_and_nothing_runs(tmp_path, capsys):
    class Bad:
        def __reduce__(self): return print, ("RAN",)
    lie = io.BytesIO()
    with zipfile.ZipFile(lie, "w") as z: z.writestr("archive/data.pkl", pickle.dumps({"emb.weight": Bad()})), z.writestr("archive/version", "3\n")
    whole = io.BytesIO()
    torch.save(rwkv4(), whole)
    files = {"a.pth": (pickle.dumps(Bad()), "could run code"), "zip.pth": (lie.getvalue(), "could run code"), "b.gguf": (b"GGUF\x03\0\0\0", "GGUF"), "c.pth": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
             "d.pth": (b"<!DOCTYPE html><p>404", "web page"), "e.pth": (b"", "an empty file"), "f.safetensors": (b"\xff" * 40, "cut short"), "g.pth": (whole.getvalue()[:-200], "cut short"), "h.jpg": (b"\xff\xd8\xff\xe0JFIF", "no checkpoint")}
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        card = text(checkpoint_card(tmp_path / name))
        assert said in card and name in card and str(tmp_path) not in card, card
    torch.save({"state_dict": rwkv4(), "epoch": 3}, tmp_path / "nested.pth")
    assert "under 'state_dict'" in text(checkpoint_card(tmp_path / "nested.pth"))
    assert "RAN" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="doesn't exist"): checkpoint_card(tmp_path / "nothing.pth")


def test_odd_tensors_are_named_on_the_card(tmp_path):
    scalars = {"blocks.0.att.key.lora_A.weight": torch.tensor(1.), "blocks.0.att.key.lora_B.weight": torch.tensor(1.)}
    for tensors, said in ((scalars, "not told by the shapes"), ({1: torch.zeros(2)}, "a tensor under 1, of type int"), ({"emb.weight": torch.eye(4).to_sparse()}, "'emb.weight' as a tensor of layout sparse_coo")):
        torch.save(tensors, tmp_path / "odd.pth")
        assert said in text(checkpoint_card(tmp_path / "odd.pth"))


def test_states_and_adapters(tmp_path):
    model = attach(new_model(), StateTuning())
    with torch.no_grad():
        for b in model.blocks: b.att.time_state.normal_()
    for name in ("s.pth", "s.st"):
        card = text(checkpoint_card(save_state(model, tmp_path / name)))
        assert "a tuned state" in card and f"{model.blocks[1].att.time_state.to(torch.float16 if name.endswith('st') else torch.float32).float().norm().item():,.4g}" in card
    for method, said in ((LoRA(r=3, alpha=6), "LoRA(r=3, alpha=6.0"), (PiSSA(r=3), "PiSSA(r=3"), (DoRA(r=3), "DoRA(r=3"), (MiSS(r=5), "MiSS(r=5)"), (Bone(r=8), "Bone(r=8)")):
        folder = save_adapter(attach(new_model(), method), tmp_path / said[:4])
        card = text(checkpoint_card(folder))
        assert said in card and "matrices 18" in card and fingerprint(new_model())[:12] in card
        file = next(f for f in (folder / "adapter_model.safetensors", folder / "exact.safetensors") if f.exists())
        assert said.split("(")[0][-4:] in text(checkpoint_card(file)) or "an adapter" in text(checkpoint_card(file)) or isinstance(method, Bone)
    (folder / "rwkv_peft.json").write_text("{")
    assert "can't be read" in text(checkpoint_card(folder))


def test_other_names_and_parts(tmp_path):
    model = small("7")
    for names in ("hf", "fla"):
        save(model, tmp_path / f"{names}.safetensors", names=names)
        card = text(checkpoint_card(tmp_path / f"{names}.safetensors"))
        assert f"names {names}, shown as official" in card and "RWKV-7" in card
    tensors, folder = dict(official(model)), tmp_path / "parts"
    folder.mkdir()
    first = {n: x.contiguous() for n, x in tensors.items() if n.startswith("blocks.0")}
    save_file(first, folder / "model-1.safetensors"), save_file({n: x.contiguous() for n, x in tensors.items() if n not in first}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f"model-{1 if n in first else 2}.safetensors" for n in tensors}}))
    assert "RWKV-7" in text(checkpoint_card(folder)) and "Nothing odd" in text(checkpoint_card(folder))


def test_names_are_text_and_long_ones_are_cut(tmp_path):
    evil = {"<script>alert(1)</script>": torch.zeros(2), "\u202eevil\x1b[31m": torch.zeros(2), "x" * 100_000: torch.zeros(2)}
    save_file(evil, tmp_path / "<img src=x onerror=alert(2)>.safetensors")
    card = checkpoint_card(tmp_path / "<img src=x onerror=alert(2)>.safetensors")
    assert "<script" not in card and "<img" not in card and "\x1b" not in card and len(card) < 10_000 and "99,880 more characters" in card
    save_file({f"n{i}{'.a' * i}": torch.zeros(1) for i in range(300)}, tmp_path / "many.safetensors")
    assert "100 more kinds, not shown" in (card := checkpoint_card(tmp_path / "many.safetensors")) and len(card) < 400_000
    assert cut("a" * 120) == "a" * 120 and contained({}).kind == "other"


def test_the_numbers_of_a_large_file_stay_on_the_disk(tmp_path):
    "The card of a file of 160 MB takes a small part of that."
    import subprocess
    import sys
    path = tmp_path / "large.pth"
    torch.save(rwkv4() | {f"blocks.0.att.w{i}": torch.zeros(1000, 10_000) for i in range(4)}, path)
    code = f"""
import resource, sys
from rwkv_peft.look.checkpoint import checkpoint_card, values_of
import torch
values_of(torch.zeros(1 << 22))
private = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])
before = private()
card = checkpoint_card({str(path)!r})
assert "blocks.*.att.w0" in card
print((private() - before) // 1024)"""
    if not sys.platform.startswith("linux"): pytest.skip("reads /proc")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 100
