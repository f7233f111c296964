"""RWKV-5.2 and 6 against the `rwkv` package in its own process, and all three versions side by side: documents in a row, adapters, tuned states, files."""
import os
import subprocess
import sys
import pytest
import torch
from rwkv_peft import LoRA, StateTuning, attach, detach, finetune, load_adapter, merge, save_adapter
from rwkv_peft.kernels.wkv import backends
from rwkv_peft.model.checkpoint import CheckpointError, config_of, fingerprint, load, official, read, save
from rwkv_peft.model.files import write_tensors
from rwkv_peft.model.rwkv import PRESETS, RWKV, RWKVConfig
from rwkv_peft.model.state import State
from rwkv_peft.train.optim import parameter_groups

BAR, TOKENS = 1e-5, 37      # relative L2
# The package finds the number of heads in the second layer, so one is too few. Layers, channels, head size, vocabulary, width of channel mixing, ranks of blends and decay
SHAPES = {"three": (3, 128, 64, 300, 448, 32, 64), "odd": (2, 192, 64, 257, 256, 8, 12), "small heads": (2, 64, 16, 400, 224, 5, 20)}
VERSIONS = {"5.2": {}, "6": {"mix_rank": 6, "decay_rank": 10}, "7": {"w_rank": 8, "a_rank": 12, "v_rank": 4, "g_rank": 20}}

ORACLE = """
import os, sys
os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
os.environ.pop("RWKV_V7_ON", None)
import torch
torch.set_num_threads(1)
from rwkv.model import RWKV
jobs, out = torch.load(sys.argv[1], weights_only=True), {}
for name, job in jobs.items():
    tokens, answers = job["tokens"].tolist(), {}
    for kind in ("plain", "stated"):
        model = RWKV(model=job[kind], strategy="cpu fp32")
        logits, last = model.forward(tokens, None, full_output=True)
        answers[kind], answers["state of " + kind] = logits, [x.float() for x in last]
        state, single = None, []
        for token in tokens:
            logits, state = model.forward([token], state)
            single.append(logits.clone())
        answers["single " + kind] = torch.stack(single)
    out[name] = answers
torch.save(out, sys.argv[2])
"""


def official_file(version, layers, C, N, V, F, mix, decay):
    "Random tensors under official names, in the official order, written down here so that the model's own idea of them isn't used."
    draw = lambda *shape, scale=.3, shift=0.: torch.randn(shape) * scale + shift
    square = lambda out, inp: draw(out, inp, scale=1 / inp ** .5)
    file, H = {"emb.weight": draw(V, C, scale=.5)}, C // N
    for i in range(layers):
        for norm in ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2"): file |= {f"blocks.{i}.{norm}.weight": draw(C, shift=1), f"blocks.{i}.{norm}.bias": draw(C)}
        if version == "5.2":
            att = {f"time_mix_{c}": torch.rand(1, 1, C) for c in "kvrg"} | {"time_decay": torch.rand(H, N) * 8 - 6}
        else:
            att = {f"time_maa_{c}": torch.rand(1, 1, C) for c in "xwkvrg"} | {"time_maa_w1": draw(C, 5 * mix, scale=.2), "time_maa_w2": draw(5, mix, C)}
            att |= {"time_decay": torch.rand(1, 1, C) * 8 - 6, "time_decay_w1": draw(C, decay, scale=.2), "time_decay_w2": draw(decay, C)}
        att |= {"time_faaaa": draw(H, N, scale=.5)} | {f"{name}.weight": square(C, C) for name in ("receptance", "key", "value", "output", "gate")}
        att |= {"ln_x.weight": draw(C, shift=1), "ln_x.bias": draw(C)}
        ffn = {f"time_{'mix' if version == '5.2' else 'maa'}_{c}": torch.rand(1, 1, C) for c in "kr"}
        ffn |= {"key.weight": square(F, C), "receptance.weight": square(C, C), "value.weight": square(C, F)}
        file |= {f"blocks.{i}.att.{name}": x for name, x in att.items()} | {f"blocks.{i}.ffn.{name}": x for name, x in ffn.items()}
    return file | {"ln_out.weight": draw(C, shift=1), "ln_out.bias": draw(C), "head.weight": square(V, C)}


def far(ours, theirs): return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    "(version, shape) -> (our plain and stated models, tokens, the oracle's answers)"
    folder, jobs = tmp_path_factory.mktemp("oracle"), {}
    torch.manual_seed(56)
    for version in ("5.2", "6"):
        for name, shape in SHAPES.items():
            file, (L, C, N, V) = official_file(version, *shape), shape[:4]
            assert all(x.count_nonzero() == x.numel() for x in file.values())
            states = {f"blocks.{i}.att.time_state": torch.randn(C // N, N, N) for i in range(L)}
            paths = {kind: str(folder / f"{version} {name} {kind}.pth") for kind in ("plain", "stated")}
            torch.save(file, paths["plain"])
            torch.save(file | states, paths["stated"])
            jobs[f"{version} {name}"] = paths | {"tokens": torch.randint(1, V, (TOKENS,))}
    torch.save(jobs, folder / "jobs.pt")
    subprocess.run([sys.executable, "-c", ORACLE, str(folder / "jobs.pt"), str(folder / "out.pt")], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    answers = torch.load(folder / "out.pt", weights_only=True)
    return {name: ({kind: load(job[kind], device="cpu", dtype=torch.float32) for kind in ("plain", "stated")}, job["tokens"][None], answers[name]) for name, job in jobs.items()}


EVERY = [f"{version} {name}" for version in ("5.2", "6") for name in SHAPES]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", ["plain", "stated"])
@torch.no_grad()
def test_logits_equal_the_rwkv_packages(cases, name, kind):
    "In one go, token by token and in pieces; with a time_state in the file, which the package turns round itself, and without."
    models, tokens, theirs = cases[name]
    assert .3 < theirs[kind].std() < 3
    for way, sizes in {"sequence": [TOKENS], "single": [1] * TOKENS, "pieces": [16, 1, 4, 16]}.items():
        state, out = None, []
        for piece in tokens.split(sizes, dim=1):
            logits, state = models[kind](piece, state)
            out.append(logits[0])
        assert far(torch.cat(out), theirs[("single " if way == "single" else "") + kind]) < BAR, way
        for i in range(models[kind].config.n_layer):
            att, wkv, ffn = theirs["state of " + kind][3 * i:3 * i + 3]
            for mine, other in zip((state.att_shift[i, 0], state.wkv[i, 0], state.ffn_shift[i, 0]), (att, wkv.transpose(1, 2), ffn)): assert far(mine, other) < BAR
    assert far(theirs["plain"], theirs["stated"]) > .05      # the state does something, so its orientation matters


@pytest.mark.parametrize("version", ["5.2", "6"])
@pytest.mark.parametrize("backend", ["loop", "chunk", "cpu"])
@torch.no_grad()
def test_every_backend_agrees_with_the_oracle(cases, version, backend):
    usable, reason = backends().get(backend, (False, "not built"))
    if not usable: pytest.skip(reason)
    for name in SHAPES:
        models, tokens, theirs = cases[f"{version} {name}"]
        models["stated"].backend = backend
        try: assert far(models["stated"](tokens)[0][0], theirs["stated"]) < BAR
        finally: models["stated"].backend = "auto"


def tiny(version, seed=0, noise=.2, **sizes):
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(version, **{"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 257} | VERSIONS[version] | sizes))
    with torch.no_grad():
        for p in model.parameters(): p += noise * torch.randn_like(p)
    return model


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("grad_cp", [False, True])
def test_loss_and_gradients_are_the_textbooks(version, grad_cp):
    model = tiny(version).double()
    model.blocks[0].att.time_state = torch.nn.Parameter(torch.randn(2, 16, 16).double())
    tokens, weights = torch.randint(1, 257, (2, 13)), torch.rand(2, 12).double() * (torch.rand(2, 12) > .3)
    loss = (torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].transpose(1, 2), tokens[:, 1:], reduction="none") * weights).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model.grad_cp = grad_cp
    ours, _ = model(tokens[:, :-1], targets=tokens[:, 1:], weights=weights)
    for name, mine, other in zip(dict(model.named_parameters()), torch.autograd.grad(ours, list(model.parameters())), expected): assert torch.allclose(mine, other, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_gradients_are_slopes(version):
    "Central differences of the loss along random directions, one for each parameter: what is written by hand (the decay, what is computed again) is seen from outside."
    model, tokens = tiny(version).double(), torch.randint(1, 257, (2, 10))
    model.blocks[1].att.time_state = torch.nn.Parameter(torch.randn(2, 16, 16).double())
    model.backend = "loop"
    loss = lambda: model(tokens[:, :-1], targets=tokens[:, 1:])[0]
    for (name, p), gradient in zip(model.named_parameters(), torch.autograd.grad(loss(), list(model.parameters()))):
        way, ends = torch.randn_like(p), []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                p += step * way
                ends.append(loss().item())
        with torch.no_grad(): p += 1e-5 * way
        assert abs((ends[0] - ends[1]) / 2e-5 - (way * gradient).sum().item()) < 1e-4 * max(1, abs((way * gradient).sum().item())), name


def test_decays_that_underflow_leave_everything_finite():
    model, tokens = tiny("6"), torch.randint(1, 257, (1, 70))
    with torch.no_grad(): model.blocks[0].att.time_decay += torch.linspace(-8, 200, 32)
    for backend in ("loop", "auto"):
        model.backend = backend
        gradients = torch.autograd.grad(model(tokens[:, :-1], targets=tokens[:, 1:])[0], list(model.parameters()))
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_bf16_keeps_its_memory_in_fp32(version):
    model, tokens = tiny(version, noise=.1), torch.randint(1, 257, (1, 40))
    exact, _ = model(tokens)
    rounded, state = model.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32 and state.att_shift.dtype == torch.bfloat16
    assert far(rounded.float(), exact) < .15
    assert State.zeros(model.config, 3, dtype=torch.bfloat16).wkv.shape == (2, 3, 2, 16, 16)


def same(a, b): return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("version", ["5.2", "6"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_come_back_bit_for_bit(tmp_path, version, dtype):
    file = {name: x.to(dtype) for name, x in official_file(version, *SHAPES["small heads"]).items()}
    own = {name for name in file if ".ln0" not in name}
    file |= {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16).bfloat16() for i in range(2)}
    model = load(write_tensors(file, tmp_path / "a.pth"), device="cpu", dtype=torch.float32)
    assert model.config.version == version and same(official(model), file)
    assert same(torch.load(save(model, tmp_path / "b.pth"), weights_only=True), file)
    assert [n for n in read(save(model, tmp_path / "c.safetensors")) if n in own] == [n for n in file if n in own]
    assert fingerprint(model) == fingerprint({n: x for n, x in file.items() if not n.endswith("time_state")})
    old = dict(reversed(file.items())) | {"blocks.1.att.time_faaaa": file["blocks.1.att.time_faaaa"], "blocks.1.ffn." + ("time_mix_k" if version == "5.2" else "time_maa_k"): torch.rand(64).to(dtype)}
    assert same(official(load(write_tensors(old, tmp_path / "d.pth"), device="cpu", dtype=torch.float32)), old)


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_what_is_wrong_is_named(tmp_path, version):
    file = official_file(version, *SHAPES["small heads"])
    x, decay = torch.zeros(4, 4), "blocks.1.att.time_decay"
    wrong = {rf"blocks.1.att.gate.weight is missing: the file isn't a complete RWKV-{version}": {n: t for n, t in file.items() if n != "blocks.1.att.gate.weight"},
             f"{decay} has the shape": file | {decay: x}, "blocks.0.att.extra is in the file": file | {"blocks.0.att.extra": x}}
    if version == "5.2": wrong["RWKV-5.1"] = {n: t[:, :1] if n.endswith("time_decay") else t for n, t in file.items()}
    if version == "6": wrong["time_decay_w1 has the shape"] = file | {"blocks.0.att.time_decay_w1": x[0]}
    for word, tensors in wrong.items():
        with pytest.raises(CheckpointError, match=word) as e: load(write_tensors(tensors, tmp_path / "a.pth"))
        assert "\n" not in str(e.value) and "a.pth" in str(e.value)


def test_presets_have_the_released_parameters():
    released = {"RWKV7-0.1B": 191_034_624, "RWKV7-0.4B": 450_767_872, "RWKV7-1.5B": 1.527e9, "RWKV7-2.9B": 2.948e9, "RWKV7-7.2B": 7.199e9, "RWKV7-13.3B": 13.27e9,
                "RWKV5-1B5": 1_577_754_624, "RWKV6-1B6": 1.6e9, "RWKV6-14B": 14.07e9}
    with torch.device("meta"):
        for name, known in released.items():
            count = sum(p.numel() for p in RWKV(RWKVConfig.preset(name)).parameters())
            assert count == known if isinstance(known, int) else abs(count / known - 1) < 1e-3, (name, count)
    for name in PRESETS: assert RWKVConfig.preset(name.lower().replace("rwkv", "rwkv-")) == RWKVConfig.preset(name)
    assert RWKVConfig.preset("RWKV6-1.6B").mix_rank == 32 and RWKVConfig.preset("RWKV6-7B").decay_rank == 128
    for name in ("RWKV7-9B", "", "RWKV4-7B"):
        with pytest.raises(ValueError, match="RWKV7-13.3B"): RWKVConfig.preset(name)


def test_sizes_of_another_version_are_refused():
    for version, size in (("5.2", "mix_rank"), ("6", "w_rank"), ("7", "decay_rank")):
        with pytest.raises(ValueError, match=f"{size}=8 is no size of version {version}"): RWKVConfig(version, **{size: 8})
    for version, width in (("5.2", 2688), ("6", 2688), ("7", 3072)): assert RWKVConfig(version).dim_ffn == width
    for wrong in ("4", "5", 7, None):
        with pytest.raises(ValueError, match="can't be built"): RWKVConfig(wrong)


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_a_new_model_starts_as_the_official_trainers(version):
    model = RWKV(RWKVConfig(version, n_layer=3, n_embd=64, head_size=16, vocab_size=257))
    own, n = model.state_dict(), torch.arange(64) / 64
    share = own["blocks.1.att.time_mix_v"] if version == "5.2" else 1 - own["blocks.1.att.time_maa_v"]
    assert torch.allclose(share.flatten(), n ** (2 / 3) + .15, atol=1e-6)
    assert torch.allclose(own["blocks.2.att.time_decay"].flatten(), -6 + 5 * (torch.arange(64) / 63) ** 2, atol=1e-5)
    assert torch.allclose(own["blocks.1.att.time_faaaa"].flatten()[:3], .5 * (1 - torch.arange(3) / 63) + torch.tensor([0., .1, -.1]), atol=1e-6)
    for name, x in own.items():
        if name.endswith(("att.output.weight", "ffn.value.weight", "ffn.receptance.weight", "_w1")): assert not x.any(), name
        if name.endswith(("att.key.weight", "att.gate.weight")): assert torch.allclose(x @ x.T, .01 * torch.eye(64), atol=1e-5)


def test_the_decay_trains_twice_as_fast_and_is_never_decayed():
    for version, name in (("5.2", "time_decay"), ("6", "time_decay"), ("7", "w0")):
        model = RWKV(RWKVConfig(version, n_layer=1, n_embd=32, head_size=16, vocab_size=257, **VERSIONS[version]))
        group = {id(p): g for g in parameter_groups(model.named_parameters(), weight_decay=.1) for p in g["params"]}
        for n, p in model.named_parameters():
            assert group[id(p)]["lr_scale"] == (2 if n == f"blocks.0.att.{name}" else 1), n
            if version != "7": assert group[id(p)]["weight_decay"] == (.1 if p.dim() == 2 and n.endswith(".weight") else 0), n


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_adapters_and_states_attach_save_load_and_merge(tmp_path, version):
    model, tokens = tiny(version), torch.randint(1, 257, (1, 12))
    base = model(tokens)[0].detach()
    attach(model, LoRA(r=4), StateTuning())
    matrices = {n.split(".adapter.")[0] for n, p in model.named_parameters() if ".adapter." in n and p.requires_grad}
    assert matrices == {f"blocks.{i}.{m}" for i in range(2) for m in ("att.receptance", "att.key", "att.value", "att.output", "att.gate", "ffn.key", "ffn.receptance", "ffn.value")}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad: p += .1 * torch.randn_like(p)
    tuned = model(tokens)[0].detach()
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    assert torch.equal(model(tokens)[0], base)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(tokens)[0], tuned) and far(tuned, base) > .05
    merge(model)
    assert far(model(tokens)[0], tuned) < 1e-5
    again = load(save(model, tmp_path / "merged.pth"), device="cpu", dtype=torch.float32)
    assert far(again(tokens)[0], tuned) < 1e-5 and config_of(read(tmp_path / "merged.pth")) == model.config


@pytest.mark.parametrize("version", ["5.2", "6"])
@pytest.mark.parametrize("peft", ["lora", "state", "none"])
def test_a_short_finetune(tmp_path, version, peft):
    rows = [{"prompt": f"{i} + {i % 7} =", "completion": f" {i + i % 7}{'!' * (i % 5)}"} for i in range(24)]
    run = finetune(model=tiny(version, noise=.1), data=rows, peft=peft, lr_init=.1 if peft == "state" else 1e-2, micro_bsz=4, max_steps=8, warmup_steps=0, output=str(tmp_path), name="run")
    for _ in run.steps(): pass
    losses = [e["loss"] for e in run.events if e["event"] == "step"]
    assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3])
