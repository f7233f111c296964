"""Files: what is read, what is refused and in which words, what is written back, and what a full disk leaves behind."""
import os
import pickle
import pytest
import torch
from safetensors.torch import save_file
from rwkv_peft.model.checkpoint import CheckpointError, bundled, fingerprint, load, official, read, save
from rwkv_peft.model.files import read_tensors, write_tensors
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.state import load_state, save_state

CONFIG = RWKVConfig(n_layer=3, n_embd=64, head_size=16, vocab_size=257, dim_ffn=96, w_rank=8, a_rank=12, v_rank=4, g_rank=20)
# the order in which BlinkDL's rwkv_v7_numpy.py takes a layer's tensors apart by position
NUMPY_ORDER = "x_r x_w x_k x_v x_a x_g w0 r_k w1 w2 a1 a2 a0 g1 g2 v2 v1 v0 k_k k_a receptance.weight key.weight value.weight output.weight ln_x.weight ln_x.bias".split()


def tensors(dtype=torch.bfloat16, unused=True):
    torch.manual_seed(0)
    out = {}
    for name, x in RWKV(CONFIG).state_dict().items():
        if name == "blocks.0.att.k_k" and unused: out |= {f"blocks.0.att.{v}": torch.randn(shape).to(dtype) for v, shape in (("v2", (4, 64)), ("v1", (64, 4)), ("v0", (1, 1, 64)))}
        out[name] = torch.randn_like(x).to(dtype)
    return out


def same(a, b): return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("unused", [True, False])
def test_round_trip_is_bit_exact(tmp_path, dtype, unused):
    file = tensors(dtype, unused)
    file = dict(reversed(file.items()))                                    # an order of its own
    file["blocks.1.att.x_r"] = file["blocks.1.att.x_r"].view(-1)           # an old dump's shape
    torch.save(file, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", device="cpu", dtype=torch.float32)
    assert model.config == CONFIG and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert same(official(model), file)
    assert same(torch.load(save(model, tmp_path / "b.pth"), weights_only=True), file)


def test_safetensors_comes_back_in_official_order(tmp_path):
    file = tensors()
    save_file(file, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors", device="cpu")
    written = torch.load(save(model, tmp_path / "b.pth"), weights_only=True)
    assert same(written, file)
    for i in range(3): assert [name.removeprefix(f"blocks.{i}.att.") for name in written if name.startswith(f"blocks.{i}.att.")] == NUMPY_ORDER


def test_wrappers_names_are_taken_off(tmp_path):
    for prefix in ("_orig_mod.", "_forward_module.", "module.", "model.", "_forward_module.model._orig_mod."):
        torch.save({prefix + name: x for name, x in tensors().items()}, tmp_path / "a.pth")
        assert same(read(tmp_path / "a.pth"), tensors())


def test_merged_states_are_tuned_states(tmp_path):
    file = tensors()
    file |= {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(3)}
    torch.save(file, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", device="cpu")
    assert torch.equal(model.blocks[2].att.time_state, file["blocks.2.att.time_state"])
    assert same(official(model), file) and fingerprint(model) == fingerprint(tensors())
    plain = load(write_tensors(tensors(), tmp_path / "b.pth"), device="cpu")
    ids = torch.randint(257, (1, 6))
    assert not torch.allclose(model(ids)[0], plain(ids)[0])
    plain.blocks[0].att.time_state = torch.nn.Parameter(torch.randn(4, 16, 16))        # tuned after loading: in place, and the numpy script still works
    names = [name.removeprefix("blocks.0.att.") for name in official(plain) if name.startswith("blocks.0.att.")]
    assert "time_state" in names and names[:18] == NUMPY_ORDER[:18] and names[-8:] == NUMPY_ORDER[-8:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_are_at_least_fp32_whatever_the_weights_are(tmp_path, dtype):
    file = tensors() | {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16).bfloat16() for i in range(3)}
    model = load(write_tensors(file, tmp_path / "a.pth"), device="cpu", dtype=dtype)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.promote_types(dtype, torch.float32) if name.endswith(".time_state") else dtype), name
    logits, state = model(torch.randint(257, (1, 5)))
    assert logits.dtype == dtype and state.wkv.dtype == torch.promote_types(dtype, torch.float32)
    assert same(official(model), file)


x = torch.zeros(4, 4)
v5 = {"blocks.0.att.ln_x.weight": x, "blocks.0.att.gate.weight": x, "blocks.0.att.time_mix_g": x}
OTHERS = {
    "Hugging Face": {"model.layers.0.self_attn.q_proj.weight": x, "model.embed_tokens.weight": x},
    "isn't a complete RWKV-7 with fla's Hugging Face names": {"model.layers.0.attn.r_proj.weight": x, "model.embeddings.weight": x},
    "RWKV-4": {"blocks.0.att.time_decay": x[0], "blocks.0.att.time_first": x[0], "blocks.0.att.key.weight": x},
    "5.0 or 5.1": {"blocks.0.att.time_decay": x[0], "blocks.0.att.ln_x.weight": x[0]},
    "RWKV-5.1": v5 | {"blocks.0.att.time_decay": x[:, :1]},
    "RWKV-5.2": v5 | {"blocks.0.att.time_decay": x},
    "RWKV-6": v5 | {"blocks.0.att.time_maa_x": x},
    "RWKV-7a": tensors() | {"blocks.0.ffn.s_emb.weight": x},
    "RWKV-7b": tensors() | {"blocks.0.ffn.s_emb.weight": x, "blocks.0.qkv.x_q": x},
    "RWKV-8": tensors() | {"blocks.0.ffn.enn.weight": x},
    "adapter": {"base_model.model.blocks.0.att.key.lora_A.weight": x},
    "tuned state": {f"blocks.{i}.att.time_state": x for i in range(2)},
    "empty": {},
    "bert.pooler": {"bert.pooler": x},
    "blocks.1.att.w1 is missing": {n: t for n, t in tensors().items() if n != "blocks.1.att.w1"},
    "emb.weight is missing": {n: t for n, t in tensors().items() if n != "emb.weight"},
    "blocks.1 is missing": {n: t for n, t in tensors().items() if not n.startswith("blocks.1.")},
    "blocks.2.att.surprise is": tensors() | {"blocks.2.att.surprise": x},
    r"blocks.2.ffn.key.weight has the shape \(4, 4\)": tensors() | {"blocks.2.ffn.key.weight": x},
    "torch.int8": tensors() | {"head.weight": tensors()["head.weight"].to(torch.int8)},
    "NoneType|int": tensors() | {"epoch": 3},
    "dict under 'state_dict'": {"state_dict": tensors()},
}


@pytest.mark.parametrize("word", OTHERS)
def test_other_files_are_named(tmp_path, word):
    torch.save(OTHERS[word], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=word) as e: load(tmp_path / "a.pth")
    assert "\n" not in str(e.value) and "a.pth" in str(e.value) and e.value.__cause__ is None


class Code:
    def __reduce__(self): return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_broken_files_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = write_tensors(tensors(), tmp_path / "whole.pth").read_bytes()
    safe = write_tensors(tensors(), tmp_path / "whole.safetensors").read_bytes()
    torch.save({"a": Code()}, "code.pth")
    torch.save({"a": Code()}, "old code.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare code.pth").write_bytes(pickle.dumps(Code()))
    for n in (1, 3, 100, len(whole) // 2, len(whole) - 10): (tmp_path / f"short {n}.pth").write_bytes(whole[:n])
    for n in (0, 5, 100, len(safe) - 1): (tmp_path / f"short {n}.safetensors").write_bytes(safe[:n])
    (tmp_path / "zero.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<html>")
    (tmp_path / "folder.pth").mkdir()
    torch.save([1, 2], "list.pth")
    words = {"code": "run code", "short": "cut short|doesn't begin", "zero": "doesn't begin", "page": "doesn't begin", "folder": "folder", "list": "list", "gone": "doesn't exist"}
    for path in [*tmp_path.glob("*.pth"), *tmp_path.glob("short*"), tmp_path / "gone.pth"]:
        if path.name == "whole.pth": continue
        with pytest.raises(CheckpointError, match=next(w for key, w in words.items() if key in path.name)) as e: load(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300, path
    assert not (tmp_path / "ran").exists()
    torch.save(tensors(), "legacy.pth", _use_new_zipfile_serialization=False)          # old, but harmless
    assert same(read("legacy.pth"), tensors())


def test_names_and_addresses():
    with pytest.raises(CheckpointError, match="neither a file nor a bundled [^;]*$"): load("no-such-model")
    with pytest.raises(CheckpointError, match="did you mean 'rwkv7-tiny'"): load("rwkv7-tny")
    with pytest.raises(CheckpointError, match="check the path; did you mean '.*test_checkpoint.py'"): read(__file__.replace("checkpoint", "chekpoint"))
    with pytest.raises(CheckpointError, match="hf://owner/repo/file"): load("hf://owner/repo")
    with pytest.raises(ValueError, match="nf4"): load("no-such-model", quant="nf5")
    for name in bundled(): assert load(name, device="cpu", dtype=torch.float32).source == name


def test_saving_is_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    big = {"a": torch.zeros(1 << 20)}
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        write_tensors({"a": torch.ones(3)}, path)
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))                # as if the disk were full after 64 kB
        try:
            with pytest.raises(CheckpointError, match="was not written") as e: write_tensors(big, path)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(e.value) and path.read_bytes() == before and sorted(os.listdir(tmp_path))[-1] == path.name
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(CheckpointError, match=r"end the name in .pth"): write_tensors(big, tmp_path / "x.bin")


def test_an_adapter_is_never_left_out_silently(tmp_path):
    model = RWKV(CONFIG)
    model.blocks[1].att.key.adapter = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="blocks.1.att.key holds an adapter"): save(model, tmp_path / "a.pth")
    model.blocks[1].att.key.adapter.w = torch.nn.Parameter(torch.zeros(2))
    assert not [name for name in official(model) if "adapter" in name]


def test_fingerprint_knows_the_base_and_nothing_else(tmp_path):
    file = tensors()
    one = fingerprint(file)
    half = load(write_tensors(file, tmp_path / "a.pth"), device="cpu", dtype=torch.bfloat16)
    assert fingerprint(half) == one == fingerprint(half.float()) == fingerprint({name: t for name, t in file.items() if name[:-1] != 'blocks.0.att.v'}) == fingerprint(dict(reversed(file.items())))
    half.blocks[0].att.key.adapter = torch.nn.Linear(2, 2)
    assert fingerprint(half) == one
    for name in ("emb.weight", "blocks.2.att.x_r", "blocks.1.att.ln_x.bias"):
        changed = file | {name: file[name] + 1}
        assert fingerprint(changed) != one
    assert fingerprint({name.replace("blocks.2", "blocks.3"): t for name, t in file.items()}) != one


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_a_fingerprint_copies_rows_and_no_model(tmp_path, stored, held):
    "Every tensor that is made on the way is seen: none is larger than sixteen rows. The digest is the file's, also when it was rounded twice."
    from torch.utils._python_dispatch import TorchDispatchMode
    file = tensors(stored)
    model = load(write_tensors(file, tmp_path / "a.pth"), device="cpu", dtype=held)
    known, largest = {t.untyped_storage().data_ptr() for t in [*model.state_dict().values(), *model.origin.values()] if not t.is_meta}, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out])
                           if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known)
            return out

    with Watch(): found = fingerprint(model)
    assert 0 < max(largest) <= 16 * CONFIG.dim_ffn
    assert found == fingerprint({name: t.to(held).to(stored) for name, t in file.items()})
    with torch.no_grad(): model.head.weight.add_(torch.randn_like(model.head.weight) * .01)
    assert fingerprint(model) == fingerprint(read(save(model, tmp_path / "b.pth")))


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors({"a": torch.ones(3)}, tmp_path / "a.pth")
        write_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    finally: os.umask(before)
    for path in tmp_path.iterdir(): assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_state_files(tmp_path):
    model = RWKV(CONFIG)
    with pytest.raises(CheckpointError, match="no time_state"): save_state(model, tmp_path / "s.pth")
    for block in model.blocks: block.att.time_state = torch.nn.Parameter(torch.randn(4, 16, 16))
    path = save_state(model, tmp_path / "s.pth", torch.bfloat16)
    file = torch.load(path, weights_only=True)
    assert list(file) == [f"blocks.{i}.att.time_state" for i in range(3)] and all(t.dtype == torch.bfloat16 and t.shape == (4, 16, 16) for t in file.values())
    assert same(load_state(path, CONFIG), file)
    wrong = {"no state file": tensors(), "is empty": {}, "for layers": {"blocks.1.att.time_state": torch.zeros(4, 16, 16)},
             "for 2 layers and the model has 3": {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)},
             "4 heads of size 16": {f"blocks.{i}.att.time_state": torch.zeros(2, 32, 32) for i in range(3)},
             "shape": {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 8) for i in range(3)}}
    for word, file in wrong.items():
        torch.save(file, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=word) as e: load_state(tmp_path / "w.pth", CONFIG)
        assert "\n" not in str(e.value)
