"Merging from file to file, and what other programs read. Each format's map is written down here once more, by hand; other packages compute what can be computed."
import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rwkv_peft import LoRA, RWKV, RWKVConfig, StateTuning, Train, attach, cli, load_adapter, merge, save_adapter
from rwkv_peft.export.formats import export, import_
from rwkv_peft.export.later import Later, later, write_later
from rwkv_peft.export.merge import merge_files
from rwkv_peft.export.names import export_hf, tensors_of
from rwkv_peft.model.checkpoint import blank, fingerprint, load, official, read, save
from rwkv_peft.model.files import CheckpointError, write_tensors
from rwkv_peft.model.quant import quantize
from rwkv_peft.peft.adapters import AdapterError
from rwkv_peft.peft.inits import LoftQ, MiLoRA, OLoRA, PiSSA
from rwkv_peft.peft.lisa import LISA
from rwkv_peft.peft.magnitude import DoRA
from rwkv_peft.peft.shards import Bone, MiSS
from test_names import fla as fla_names_of

SIZES = {"5.2": {}, "6": {"mix_rank": 6, "decay_rank": 10}, "7": {"w_rank": 8, "a_rank": 12, "v_rank": 4, "g_rank": 20}}
QUIET = {"say": lambda text: None}


def tensors(version="7", dtype=torch.bfloat16, layers=2, C=64, V=257, head=16, **sizes):
    torch.manual_seed(3)
    sizes = {"dim_ffn": 96} | SIZES[version] | sizes
    names = RWKV(RWKVConfig(version, n_layer=layers, n_embd=C, head_size=head, vocab_size=V, **sizes)).state_dict()
    return {n: (torch.randn_like(x) * .3).to(dtype) for n, x in names.items()}


def same(a, b): return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def made(tmp_path):
    "A base in an order of its own, an adapter over it with a trained norm and states, and the model that carries it."
    base = write_tensors(dict(reversed(list(tensors().items()))), tmp_path / "base.pth")
    model = attach(load(base, device="cpu", dtype=torch.float32), LoRA(r=4, alpha=6), Train("ln_out"), StateTuning())
    torch.manual_seed(4)
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.2)
    save_adapter(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", model


# ---------------------------------------------------------------- files, a tensor at a time

@pytest.mark.parametrize("mmap", [False, True])
def test_a_pth_is_what_torch_saves(tmp_path, mmap):
    torch.manual_seed(0)
    file = {"z": torch.randn(5, 3, 2), "a": torch.randn(7).bfloat16(), "b": torch.tensor(3.), "half": torch.randn(65, 2).half(), "whole": torch.randn(9)[2:5]}
    write_later({n: later(x) for n, x in file.items()}, tmp_path / "a.pth")
    assert same(torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap), file)
    torch.save(file, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as ours, zipfile.ZipFile(tmp_path / "b.pth") as theirs:
        assert ours.testzip() is None
        names = [n.split("/", 1)[1] for n in ours.namelist()]
        assert set(names) <= {n.split("/", 1)[1] for n in theirs.namelist()}
        assert all(ours.read(f"archive/{n}") == theirs.read(f"b/{n}") for n in names if n.startswith("data/") and n != "data/4")
    if mmap: assert all(x.data_ptr() % 64 == 0 for x in torch.load(tmp_path / "a.pth", weights_only=True, mmap=True).values())


def test_a_safetensors_of_mixed_types_is_aligned(tmp_path):
    file = {"one": torch.randn(3).bfloat16(), "two": torch.randn(2, 2), "three": torch.randn(1).half(), "four": torch.randn(2).double()}
    write_later({n: later(x) for n, x in file.items()}, tmp_path / "a.safetensors", {"from": "here"})
    got = load_file(tmp_path / "a.safetensors")
    assert set(got) == set(file) and all(torch.equal(got[n], x) and got[n].dtype == x.dtype for n, x in file.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as f: assert f.metadata() == {"format": "pt", "from": "here"}
    head = json.loads((raw := (tmp_path / "a.safetensors").read_bytes())[8:8 + int.from_bytes(raw[:8], "little")])
    assert all(x["data_offsets"][0] % file[n].element_size() == 0 for n, x in head.items() if n != "__metadata__")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"older")
    def full(): raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="No space left"): write_later({"a": later(torch.ones(3)), "b": Later((3,), torch.float32, full)}, tmp_path / name)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 10})())
    with pytest.raises(CheckpointError, match="needs 0 MB and the disk has 0 MB left"): write_later({"a": later(torch.ones(3))}, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"older"


# ---------------------------------------------------------------- merging

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_merged_file(tmp_path, made, suffix):
    "Against Hugging Face's own tensors and settings, added in float64; names, order and types of the base."
    base, folder, model = made
    out = merge_files(base, folder, tmp_path / f"m{suffix}", **QUIET)
    written, before = torch.load(out, weights_only=True) if suffix == ".pth" else load_file(out), torch.load(base, weights_only=True)
    pairs, settings = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    assert set(written) == set(before) and (suffix != ".pth" or list(written) == list(before))
    for name, x in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in pairs:
            exact = x.double() + settings["lora_alpha"] / settings["r"] * pairs[f"{stem}.lora_B.weight"].double() @ pairs[f"{stem}.lora_A.weight"].double()
            assert ((written[name].double() - exact).abs() <= exact.abs() * 2 ** -8 * 1.01).all() and not torch.equal(written[name], x)
        elif name.startswith("ln_out"): assert torch.equal(written[name], model.get_parameter(name).bfloat16())
        else: assert torch.equal(written[name], x)
        assert written[name].dtype == torch.bfloat16


def test_merged_equals_attached_with_state(tmp_path, made):
    "In fp32 and with the state, the merged file's logits are the attached model's; the state stands where official files have it."
    base, folder, model = made
    said = []
    out = merge_files(base, folder, tmp_path / "m.pth", state=True, dtype=torch.float32, say=said.append)
    names = list(torch.load(out, weights_only=True))
    assert all(names[names.index(f"blocks.{i}.att.time_state") + 1] == f"blocks.{i}.att.k_k" for i in range(2))
    tokens = torch.randint(1, 257, (2, 9))
    with torch.no_grad(): far = (load(out, device="cpu", dtype=torch.float32)(tokens)[0] - model(tokens)[0]).abs().max() / model(tokens)[0].abs().max()
    assert far < 1e-5 and "ignores it" in said[-1]
    merge_files(base, folder, tmp_path / "n.pth", say=said.append)
    assert "left out" in said[-1] and not any("time_state" in n for n in torch.load(tmp_path / "n.pth", weights_only=True))


def test_over_int8_the_dequantised_weight_is_taken(tmp_path, made):
    base, folder, _ = made
    said = []
    out = merge_files(base, folder, tmp_path / "m.pth", dtype=torch.float32, quant="int8", say=said.append)
    assert any("trained over int8" in line for line in said)
    tuned = quantize(load_adapter(load(base, device="cpu", dtype=torch.float32), folder), "int8")
    for block in tuned.blocks: block.att.time_state = None
    tokens = torch.randint(1, 257, (2, 9))
    with torch.no_grad():
        theirs, ours = tuned(tokens)[0], load(out, device="cpu", dtype=torch.float32)(tokens)[0]
        plain = load(merge_files(base, folder, tmp_path / "p.pth", dtype=torch.float32, quant="none", **QUIET), device="cpu", dtype=torch.float32)(tokens)[0]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max() < (plain - theirs).abs().max()


def test_a_runs_folder_says_its_quantisation(tmp_path, made):
    "A folder from before adapters said it themselves, and the head, which integer products pack as well."
    base, folder, _ = made
    run = tmp_path / "run"
    run.mkdir()
    os.replace(folder, run / "adapter")
    about = json.loads((run / "adapter/rwkv_peft.json").read_text())
    assert about.pop("quant") is None
    before, heads = read(base)["head.weight"], {}
    for words, quant, lines in (("quant = 'int8'", "", 1), ("quant = 'int8'\nint8_matmul = 'fast'", "", 1), ("quant = 'int8'\nint8_matmul = 'fast'", "int8", 1), ("quant = 'int8'", None, 0)):
        (run / "config.toml").write_text(words)
        (run / "adapter/rwkv_peft.json").write_text(json.dumps(about | ({} if quant == "" else {"quant": quant})))
        said = []
        heads[words, quant] = read(merge_files(base, run, tmp_path / "m.pth", say=said.append, force=True))["head.weight"]
        assert sum("int8" in line for line in said) == lines
    assert [torch.equal(x, before) for x in heads.values()] == [True, False, False, True]


METHODS = {"lora": [LoRA(4, alpha=6)], "rslora": [LoRA(4, rslora=True, ranks={"att.key": 3})], "dora": [DoRA(4, alpha=6)], "miss": [MiSS(5)], "bone": [Bone(8)], "pissa": [PiSSA(4)], "olora": [OLoRA(4)], "milora": [MiLoRA(4)],
           "qpissa": [PiSSA(4, rounds=2, kind="nf4")], "loftq": [LoftQ(4)], "pissa and its matrix": [PiSSA(4), Train("att.key")], "ln": [Train("ln")], "lora and time": [LoRA(4), Train("time")], "lisa": [LISA(1, head=True)], "state": [StateTuning()], "miss and state": [MiSS(4), StateTuning()]}


@pytest.mark.parametrize("name, kind", [(name, kind) for name in METHODS for kind in ("none", "int8", "nf4", "nf4 double") if kind == "none" or name not in ("lisa", "pissa and its matrix")])     # these train what would be packed
def test_every_method_over_every_base(tmp_path, name, kind):
    "The file's tensors are those of `merge` in memory and its logits the tuned model's, which over a packed base are not those of the change on the base as it was."
    packing = {"kind": kind.split()[0], "double": "double" in kind}
    base = write_tensors({n: x * .5 for n, x in tensors("6" if "time" in name else "7", torch.float32).items()}, tmp_path / "base.pth")
    model = quantize(attach(load(base, device="cpu", dtype=torch.float32), *METHODS[name], **({"targets": ["att", "ffn", "head"]} if name in ("dora", "rslora") else {})), **packing)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p), alpha=.1)
    folder, tokens = save_adapter(model, tmp_path / "a"), torch.randint(1, 257, (2, 9))
    with torch.no_grad(): tuned = model(tokens)[0]
    far = lambda x: (x - tuned).abs().max() / tuned.abs().max()
    out = merge_files(base, folder, tmp_path / "m.pth", state=True, **QUIET)
    with torch.no_grad(): assert far(load(out, device="cpu", dtype=torch.float32)(tokens)[0]) < 1e-5
    other = read(merge_files(base, folder, tmp_path / "n.pth", state=True, quant="none", **QUIET))
    written, memory = read(out), official(merge(model))
    assert set(written) == set(memory) and all((written[n] - x).abs().max() <= 1e-6 * x.abs().max() for n, x in memory.items())
    key = "blocks.1.att.key.weight"
    assert (packing["kind"] == "none") == ((other[key] - written[key]).abs().max() < 1e-3 * written[key].abs().max())


PEAK = """
import ctypes, gc, sys, threading, time, torch
torch.set_num_threads(1)
from rwkv_peft.export.merge import merge_files
anonymous = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
small, base, *adapters = sys.argv[1:]
for adapter, out in zip(adapters[::2], adapters[1::2]):
    merge_files(small, adapter + ".small", out + ".warm.pth", say=lambda text: None)
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    start, peak, done = anonymous(), 0, threading.Event()
    def watch():
        global peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(.001)
    thread = threading.Thread(target=watch); thread.start()
    merge_files(base, adapter, out, say=lambda text: None)
    done.set(); thread.join()
    print(peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_memory_stays_below_three_times_the_largest_tensor(tmp_path):
    "125 MB of weights, the largest tensor 34 MB; an adapter on most matrices and the head, over floats and over the format whose scales take a look at the whole matrix."
    def write(name, **sizes):
        file = {n: Later(tuple(x.shape), torch.bfloat16, lambda s=x.shape: torch.full(s, .01, dtype=torch.bfloat16)) for n, x in blank(RWKVConfig(n_layer=3, **sizes)).state_dict().items()}
        write_later(file, tmp_path / f"{name}.pth")
        return {n: x.shape for n, x in file.items() if n.endswith(("att.key.weight", "att.output.weight", "ffn.key.weight", "ffn.value.weight", "head.weight"))}, [x.nbytes for x in file.values()]
    (few, _), (matrices, sizes) = write("small", n_embd=64, vocab_size=99), write("big", n_embd=512, vocab_size=32768, dim_ffn=8192)
    runs = (("lora", None, ".pth"), ("dora", {"kind": "nf4", "double": True, "head": True}, ".safetensors"))
    for form, quant, _ in runs:
        for folder, shapes in ((tmp_path / form, matrices), (tmp_path / f"{form}.small", few)):
            parts = {"lora_A.weight": lambda o, i: (4, i), "lora_B.weight": lambda o, i: (o, 4)} | ({"lora_magnitude_vector": lambda o, i: (o,)} if form == "dora" else {})
            folder.mkdir()
            save_file({f"base_model.model.{n.removesuffix('weight')}{end}": torch.ones(of(*shape)) for n, shape in shapes.items() for end, of in parts.items()}, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": form == "dora"}))
            (folder / "rwkv_peft.json").write_text(json.dumps({"quant": quant}))
    where = [tmp_path / word for form, _, suffix in runs for word in (form, f"{form}{suffix}")]
    ran = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "small.pth", tmp_path / "big.pth", *where], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    for took in map(int, ran.stdout.split()):
        print(f"{took / 1e6:.0f} MB of anonymous memory, largest tensor {max(sizes) / 1e6:.0f} MB, file {sum(sizes) / 1e6:.0f} MB")
        assert took < 3 * max(sizes) < sum(sizes)
    assert len(ran.stdout.split()) == 2


def test_what_cannot_be_merged(tmp_path, made):
    base, folder, _ = made
    other = write_tensors(tensors(C=32), tmp_path / "other.pth")
    near = write_tensors({n: x + 1 for n, x in tensors().items()}, tmp_path / "near.pth")
    out = tmp_path / "m.pth"
    for bad, words in ((lambda: merge_files(other, folder, out), "shape"), (lambda: merge_files(near, folder, out), "another base"), (lambda: merge_files(base, tmp_path / "none", out), "is no folder"),
                       (lambda: merge_files(base, folder, tmp_path / "m.bin"), "end the name"), (lambda: merge_files(base, folder, base), "force=True"), (lambda: merge_files(base, folder, out, quant="int3"), "int3")):
        with pytest.raises((AdapterError, CheckpointError), match=words): bad()
    assert not out.exists() and not list(tmp_path.glob(".*"))
    merge_files(near, folder, out, check_base=False, **QUIET)
    only_state = save_adapter(attach(load(base, device="cpu", dtype=torch.float32), StateTuning()), tmp_path / "state")
    with pytest.raises(AdapterError, match="state=True"): merge_files(base, only_state, tmp_path / "s.pth")


# ---------------------------------------------------------------- Hugging Face

@pytest.mark.parametrize("version, names", [("7", "hf"), ("7", "fla"), ("6", "fla")])
def test_hugging_face_folder_there_and_back(tmp_path, version, names):
    file = tensors(version)
    base = write_tensors(file, tmp_path / "a.pth")
    folder = export(base, tmp_path / "out", names, **QUIET)
    written = load_file(folder / "model.safetensors")
    if names == "fla": assert {n: tuple(x.shape) for n, x in written.items()} == fla_names_of(version)
    else: assert set(written) == {n if n.startswith("head.") else f"model.{n}" for n in file}
    assert same(torch.load(import_(folder, tmp_path / "b.pth", **QUIET), weights_only=True), file)
    assert fingerprint(read(folder)) == fingerprint(file)


def test_rwkv7_hf_loads_ours_and_agrees(tmp_path):
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.converter import infer_config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM
    file = tensors(dtype=torch.float64, layers=3, C=128, head=64, dim_ffn=512)
    file = {n: x * .3 if x.dim() == 2 else x for n, x in file.items()}
    base = write_tensors(file, tmp_path / "a.pth")
    folder = export_hf(base, tmp_path / "out", "fla", **QUIET)
    theirs = RWKV7ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    wanted, got = infer_config(file, "float64", "reference", False), RWKV7Config.from_pretrained(folder)
    sizes = "vocab_size hidden_size attention_hidden_size intermediate_size num_hidden_layers num_heads head_dim decay_low_rank_dim gate_low_rank_dim a_low_rank_dim v_low_rank_dim value_dim norm_eps".split()
    assert [getattr(got, s) for s in sizes] == [getattr(wanted, s) for s in sizes]
    tokens = torch.randint(1, 257, (2, 11))
    with torch.no_grad(): logits, ours = theirs(tokens).logits, load(base, device="cpu", dtype=torch.float64)(tokens)[0]
    assert logits.abs().max() > .1 and (logits - ours).abs().max() < 1e-5


def test_vocabulary_file_is_the_official_one(tmp_path):
    import rwkv
    from rwkv7_hf.tokenization_rwkv7 import RWKV7Tokenizer
    from rwkv_peft.data.chat import rwkv as said
    folder = export_hf(RWKV(RWKVConfig(n_layer=2, n_embd=16, head_size=8, dim_ffn=16)), tmp_path / "out", **QUIET)
    parsed = lambda path: [(int(line.split(" ", 1)[0]), ast.literal_eval(line.split(" ", 1)[1].rsplit(" ", 1)[0]), int(line.rsplit(" ", 1)[1])) for line in path.read_text(encoding="utf-8").splitlines()]
    assert parsed(folder / "rwkv_vocab_v20230424.txt") == parsed(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt")
    tokenizer = RWKV7Tokenizer.from_pretrained(folder)
    talk = [{"role": "system", "content": "Kurz,\n\nbitte. "}, {"role": "user", "content": "好\r\n\r\nund?"}, {"role": "assistant", "content": "A\n\nB"}, {"role": "user", "content": "C"}]
    asked = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert asked == "".join(text for text, _ in said(talk)) + "\n\nAssistant:"
    assert tokenizer.encode(asked, add_special_tokens=False) == RWKV(RWKVConfig(n_layer=1, n_embd=8, head_size=8, dim_ffn=8)).tokenizer.encode(asked)


# ---------------------------------------------------------------- .st

def scripted(name, x):
    "Ai00's convert_safetensors.py, told again: replacements in order, then lower case, half, and a look for names that are turned."
    for old, new in (("time_faaaa", "time_first"), ("time_maa", "time_mix"), ("lora_A", "lora.0"), ("lora_B", "lora.1")): name = name.replace(old, new)
    name, x = name.lower(), x.half()
    turned = any(t in name for t in "time_mix_w1 time_mix_w2 time_decay_w1 time_decay_w2 w1 w2 a1 a2 g1 g2 v1 v2 time_state lora.0".split())
    return name, x.transpose(x.dim() - 2, x.dim() - 1) if turned else x


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_st_is_what_ai00s_script_makes(tmp_path, version):
    file = tensors(version)
    file |= {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16).bfloat16() for i in range(2)}
    out = export(write_tensors(file, tmp_path / "a.pth"), tmp_path / "a.st", **QUIET)
    theirs, ours = dict(scripted(*entry) for entry in file.items()), load_file(out)
    assert set(ours) == set(theirs) and all(ours[n].dtype == torch.float16 and torch.equal(ours[n], x) for n, x in theirs.items())
    back = read(import_(out, tmp_path / "b.pth", **QUIET))
    assert set(back) == set(file) and all(torch.equal(back[n], x.half()) for n, x in file.items())


@pytest.mark.parametrize("suffix", [".st", ".safetensors"])
@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_loading_a_st_names_the_import(tmp_path, version, suffix):
    "Whatever the file is called; and an official file that is called .st is still read as one."
    file = {n: x.half() for n, x in tensors(version).items()}
    theirs = write_tensors(dict(scripted(*entry) for entry in file.items()), tmp_path / f"theirs{suffix}")
    for open_it in (read, lambda path: load(path, device="cpu", dtype=torch.float32), lambda path: export(path, tmp_path / "x.gguf")):
        with pytest.raises(CheckpointError, match="rwkv-peft import .*theirs") as e: open_it(theirs)
        assert "\n" not in str(e.value)
    assert same(read(import_(theirs, tmp_path / "back.pth", **QUIET)), file)
    ours = write_tensors(file, tmp_path / f"ours{suffix}")
    for back in (read(ours), read(import_(ours, tmp_path / "ours.pth", **QUIET))): assert set(back) == set(file) and all(torch.equal(back[n], x) for n, x in file.items())
    with pytest.raises(CheckpointError, match="export.export"): save(load(ours, device="cpu", dtype=torch.float32), tmp_path / "new.st")


def test_square_thin_matrices_are_told_by_the_ending(tmp_path):
    file = {n: x.half() for n, x in tensors(w_rank=64, a_rank=64, g_rank=64, v_rank=64).items()}
    theirs = export(write_tensors(file, tmp_path / "a.pth"), tmp_path / "a.st", **QUIET)
    with pytest.raises(CheckpointError, match="rwkv-peft import"): read(theirs)
    assert same(read(import_(theirs, tmp_path / "b.pth", **QUIET)), file)


def test_a_state_file_as_st_and_what_half_cannot_hold(tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    ours = load_file(export(write_tensors(states, tmp_path / "state.pth"), tmp_path / "state.st", **QUIET))
    assert all(torch.equal(ours[n], x.half().transpose(1, 2)) for n, x in states.items())
    file = tensors()
    file["blocks.1.att.w0"][..., 3] = 1e5
    base = write_tensors(file, tmp_path / "a.pth")
    for name in ("a.st", "a.gguf"):
        if name == "a.gguf": file["blocks.1.att.w0"][..., 3], file["blocks.1.ffn.key.weight"][3, 3] = 0, -1e5
        with pytest.raises(CheckpointError, match="blocks.1.*more than float16"): export(write_tensors(file, base), tmp_path / name, **QUIET)
        assert not (tmp_path / name).exists() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- GGUF

def named_back(version, reader, layers):
    "Official tensors in fp32 from a GGUF file, after llama.cpp's converter read backwards."
    x = {t.name: torch.from_numpy(np.array(t.data)).float().reshape([int(n) for n in reversed(t.shape)]) for t in reader.tensors}
    take, row = lambda n: x.pop(n), lambda n: x.pop(n).reshape(1, 1, -1)
    out = {"emb.weight": take("token_embd.weight"), "head.weight": take("output.weight")}
    for p in ("weight", "bias"): out |= {f"blocks.0.ln0.{p}": take(f"token_embd_norm.{p}"), f"ln_out.{p}": take(f"output_norm.{p}")}
    for i in range(layers):
        g, a, f = f"blk.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for p in ("weight", "bias"): out |= {f"blocks.{i}.ln1.{p}": take(f"{g}attn_norm.{p}"), f"blocks.{i}.ln2.{p}": take(f"{g}attn_norm_2.{p}"), f"{a}ln_x.{p}": take(f"{g}time_mix_ln.{p}")}
        for n in ("receptance", "key", "value", "output") + (("gate",) if version == "6" else ()): out[f"{a}{n}.weight"] = take(f"{g}time_mix_{n}.weight")
        for n in ("key", "value") + (("receptance",) if version == "6" else ()): out[f"{f}{n}.weight"] = take(f"{g}channel_mix_{n}.weight")
        fused = take(f"{g}time_mix_lerp_fused.weight")
        assert fused.shape[1:3] == (1, 1)
        if version == "7":
            out |= {f"{a}x_{c}": fused[j] for j, c in enumerate("rwkvag")}
            out |= {f"{a}{n}": take(f"{g}time_mix_{n}.weight").T for n in "w1 w2 a1 a2 g1 g2 v1 v2".split()}
            out |= {f"{a}{n}": row(f"{g}time_mix_{n}.weight") for n in "w0 a0 v0 k_k k_a".split()} | {f"{a}r_k": take(f"{g}time_mix_r_k.weight"), f"{f}x_k": row(f"{g}channel_mix_lerp_k.weight")}
        else:
            out |= {f"{a}time_maa_{c}": fused[j] for j, c in enumerate("wkvrg")} | {f"{a}time_maa_x": row(f"{g}time_mix_lerp_x.weight"), f"{a}time_decay": row(f"{g}time_mix_decay.weight")}
            out |= {f"{a}time_maa_w1": take(f"{g}time_mix_w1.weight").T, f"{a}time_maa_w2": take(f"{g}time_mix_w2.weight").permute(0, 2, 1), f"{a}time_faaaa": take(f"{g}time_mix_first.weight")}
            out |= {f"{a}time_decay_{n}": take(f"{g}time_mix_decay_{n}.weight").T for n in ("w1", "w2")} | {f"{f}time_maa_{c}": row(f"{g}channel_mix_lerp_{c}.weight") for c in "kr"}
            for n in (f"{a}output.weight", f"{f}value.weight"): out[n] = out[n] * 2 ** (i // 6)
    assert not x
    if version == "7": assert all(torch.equal(out.pop(f"blocks.0.att.v{k}"), out[f"blocks.0.att.a{k}"]) for k in range(3))     # llama.cpp's stand-ins
    return out


@pytest.mark.parametrize("version, layers", [("7", 2), ("6", 7)])
def test_gguf_recomputed_from_the_file(tmp_path, version, layers):
    import gguf
    file = tensors(version, layers=layers)
    base = write_tensors({n: x * .3 if x.dim() == 2 else x for n, x in file.items()}, tmp_path / "a.pth")
    reader = gguf.GGUFReader(export(base, tmp_path / "a.gguf", **QUIET))
    model = load(base, device="cpu", dtype=torch.float32)
    got = named_back(version, reader, layers)
    assert set(got) == set(model.state_dict())
    got = {n: x.reshape(model.state_dict()[n].shape) for n, x in got.items()}
    for n, x in model.state_dict().items(): assert (got[n] - x).abs().max() <= 2 ** -11 * x.abs().max(), n
    tokens = torch.randint(1, 257, (2, 9))
    with torch.no_grad():
        before = model(tokens)[0]
        model.load_state_dict(got, strict=True)
        assert (model(tokens)[0] - before).abs().max() < 2e-3 * before.abs().max()
    value = lambda key: reader.get_field(key).contents()
    arch = f"rwkv{version}"
    common = {"general.architecture": arch, f"{arch}.block_count": layers, f"{arch}.embedding_length": 64, f"{arch}.feed_forward_length": 96, f"{arch}.wkv.head_size": 16, f"{arch}.attention.head_count": 0,
              "tokenizer.ggml.model": "rwkv", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0}
    own = {"6": {f"{arch}.rescale_every_n_layers": 6, f"{arch}.time_mix_extra_dim": 6, f"{arch}.time_decay_extra_dim": 10},
           "7": {f"{arch}.attention.decay_lora_rank": 8, f"{arch}.attention.iclr_lora_rank": 12, f"{arch}.attention.value_residual_mix_lora_rank": 4, f"{arch}.attention.gate_lora_rank": 20}}[version]
    assert {key: value(key) for key in common | own} == common | own and len(value("tokenizer.ggml.tokens")) == 257 and "rwkv-world" in value("tokenizer.chat_template")


def test_what_has_no_place_is_refused(tmp_path):
    five = write_tensors(tensors("5.2"), tmp_path / "five.pth")
    state = write_tensors(tensors() | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}, tmp_path / "state.pth")
    six = write_tensors(tensors("6"), tmp_path / "six.pth")
    tuned = attach(load(six, device="cpu", dtype=torch.float32), LoRA())
    for bad, words in ((lambda: export(five, tmp_path / "x.gguf"), "no RWKV-5.2"), (lambda: export(five, tmp_path / "x", "fla"), "no RWKV-5.2"), (lambda: export(six, tmp_path / "x", "hf"), "version 7 only"),
                       (lambda: export(state, tmp_path / "x.gguf"), "time_state"), (lambda: export(state, tmp_path / "x", "fla"), "time_state"), (lambda: export(tuned, tmp_path / "x.st"), "adapter"),
                       (lambda: export(five, tmp_path / "x.st", dtype=torch.float32), "float16"), (lambda: export(five, tmp_path / "x.tar"), "choose one of"), (lambda: export(six, tmp_path, "fla", force=True), "no part of an exported"),
                       (lambda: import_(tmp_path / "no.gguf", tmp_path / "x.pth"), "not read"), (lambda: import_(five, tmp_path / "x.bin"), "end the name"), (lambda: import_(tmp_path / "no.st", tmp_path / "x.pth"), "doesn't exist")):
        with pytest.raises(CheckpointError, match=words): bad()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["five.pth", "six.pth", "state.pth"]


# ---------------------------------------------------------------- the shell

def shell(capsys, *words):
    with pytest.raises(SystemExit) as end: cli.main([str(w) for w in words])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_verbs(tmp_path, capsys, made):
    base, folder, _ = made
    code, out, err = shell(capsys, "merge", base, folder, tmp_path / "m.pth", "--state")
    assert code == 0 and "MB to write" in out.splitlines()[0] and out.splitlines()[-1] == str(tmp_path / "m.pth") and err == ""
    assert shell(capsys, "merge", base, folder, tmp_path / "m.pth")[::2] == (2, f"rwkv-peft: {tmp_path / 'm.pth'} is there already: choose another name, or say force=True (in a shell --force) to replace it\n")
    assert shell(capsys, "merge", base, folder, tmp_path / "m.pth", "--force", "--dtype", "fp32")[0] == 0
    assert shell(capsys, "export", tmp_path / "m.pth", tmp_path / "hf", "--format", "hf", "--dtype", "bf16")[0] == 0
    assert shell(capsys, "export", tmp_path / "m.pth", tmp_path / "hf", "--format", "hf", "--force")[0] == 0
    assert shell(capsys, "import", tmp_path / "hf", tmp_path / "again.safetensors")[0] == 0
    a, b = read(tmp_path / "again.safetensors"), read(tmp_path / "m.pth")
    assert set(a) == set(b) and all(torch.equal(a[n], x) for n, x in b.items())
    assert shell(capsys, "export", tmp_path / "m.pth", tmp_path / "m.gguf")[0] == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder of things that can't be used."
    folder = tmp_path_factory.mktemp("place")
    base = write_tensors(tensors(), folder / "base.safetensors")
    write_tensors({n: x + 1 for n, x in tensors().items()}, folder / "near.pth")
    write_tensors(tensors("5.2"), folder / "five.pth")
    for cut, whole in (("cut.safetensors", base), ("cut.st", base), ("cut.pth", folder / "near.pth")): (folder / cut).write_bytes(whole.read_bytes()[:-999])
    save_adapter(attach(load(base, device="cpu", dtype=torch.float32), LoRA(r=2)), folder / "ad")
    shutil.copytree(folder / "ad", folder / "cut_ad")
    (folder / "cut_ad/adapter_model.safetensors").write_bytes((folder / "ad/adapter_model.safetensors").read_bytes()[:-9])
    shutil.copytree(folder / "ad", folder / "foreign")
    (folder / "foreign/adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2}))
    os.makedirs(folder / "empty")
    (folder / "here.pth").write_bytes(b"older")
    (folder / "here").mkdir()
    return folder


@pytest.mark.parametrize("words, said", [
    ("merge nowhere.pth ad m.pth", "nowhere.pth doesn't exist"), ("merge base.safetensors empty m.pth", "holds no adapter"), ("merge base.safetensors five.pth m.pth", "is no folder"), ("merge near.pth ad m.pth", "--any-base"),
    ("merge cut.safetensors ad m.pth", "cut short"), ("merge cut.pth ad m.pth", "cut short"), ("merge base.safetensors cut_ad m.pth", "cut short"), ("merge base.safetensors ad here.pth", "--force"), ("merge five.pth ad m.pth", "trained on an RWKV-7"),
    ("merge base.safetensors foreign m.pth", "LOHA, which only Hugging Face's peft can compute"), ("merge base.safetensors ad m.pth --quant nf5", "did you mean 'nf4'?"), ("merge base.safetensors ad m.gguf", "end the name"), ("merge ad ad m.pth", "ad is a folder"),
    ("export nowhere.pth m.gguf", "nowhere.pth doesn't exist"), ("export empty m.gguf", "is a folder"), ("export ad m.gguf", "is a folder"), ("export ad/adapter_model.safetensors m.gguf", "an adapter, not a model"), ("export cut.safetensors m.gguf", "cut short"), ("export base.safetensors here.pth", "--force"),
    ("export base.safetensors here --format fla", "--force"), ("export base.safetensors m.ggfu", "did you mean 'gguf'?"), ("export base.safetensors m --format safetensor", "did you mean 'safetensors'?"), ("export five.pth m.gguf", "no RWKV-5.2"), ("export five.pth m --format hf", "use a .pth"),
    ("import nowhere.st m.pth", "nowhere.st doesn't exist"), ("import empty m.pth", "is a folder"), ("import cut.st m.pth", "cut short"), ("import cut.safetensors m.pth", "cut short"), ("import base.safetensors here.pth", "--force"), ("import base.safetensors m.ggfu", "end the name"), ("import ad m.pth", "is a folder"),
])
def test_what_cannot_be_used_is_one_sentence(capsys, place, monkeypatch, words, said):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    code, out, err = shell(capsys, *words.split())
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("rwkv-peft: ") and said in err and len(err) < 350, err
    assert sorted(place.iterdir()) == before and (place / "here.pth").read_bytes() == b"older"
    assert ("--any-base" not in said) or shell(capsys, *words.split(), "--any-base")[0] == 0 and os.remove("m.pth") is None


@pytest.mark.parametrize("words, said", [
    (["merge", "rwkv7-tiny", "nowhere", "m.pth"], "nowhere is no folder"), (["export", "rwkv7-tiny", "m.onnx"], "names no format"), (["export", "nowhere.pth", "m.st"], "nowhere.pth"),
    (["export", "rwkv7-tiny", "m.st", "--format", "onnx"], "format='onnx'"), (["export", "rwkv7-tiny", "m.pth", "--dtype", "int4"], "--dtype int4"), (["import", "m.gguf", "m.pth"], "not read"), (["merge", "rwkv7-tiny"], "Missing argument"),
])
def test_errors_are_one_sentence(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = shell(capsys, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("rwkv-peft: ") and said in err, err
    assert list(tmp_path.iterdir()) == []
