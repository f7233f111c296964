"""The model against an oracle that shares no line with it: the `rwkv` package, in its own process, on checkpoints whose every tensor is random."""
import os
import subprocess
import sys
import pytest
import torch
from rwkv_peft.kernels.wkv import backends
from rwkv_peft.model.checkpoint import load
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.state import State, load_state, save_state

BAR = 1e-5      # relative L2
TOKENS = 37
# layers, channels, head size, vocabulary, width of channel mixing, ranks of w a v g, are layer 0's unused tensors in the file
SHAPES = {"three": (3, 128, 64, 300, 512, (32, 24, 16, 40), False), "one": (1, 64, 64, 257, 256, (8, 8, 8, 8), True),
          "odd": (2, 192, 64, 1000, 640, (16, 48, 8, 64), True), "small heads": (4, 64, 16, 512, 224, (32, 16, 4, 12), False)}

ORACLE = """
import os, sys
os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
import torch
torch.set_num_threads(1)
from rwkv.model import RWKV
jobs, out = torch.load(sys.argv[1], weights_only=True), {}
for name, job in jobs.items():
    model = RWKV(model=job["path"], strategy="cpu fp32")
    tokens = job["tokens"].tolist()
    sequence, last = model.forward(tokens, None, full_output=True)
    state, single = None, []
    for token in tokens:
        logits, state = model.forward([token], state)
        single.append(logits.clone())
    tuned = model.generate_zero_state()
    for i in range(len(tuned) // 3): tuned[3 * i + 1] = torch.load(job["state"], weights_only=True)[f"blocks.{i}.att.time_state"].float()
    stated = model.forward(tokens, tuned, full_output=True)[0]
    out[name] = {"sequence": sequence, "single": torch.stack(single), "stated": stated, "state": [x.float() for x in last]}
torch.save(out, sys.argv[2])
"""


def official_file(layers, C, N, V, F, ranks, unused):
    "Random tensors under official names, written down here once more so that the model's own idea of them isn't used."
    draw = lambda *shape, scale=.3, shift=0.: torch.randn(shape) * scale + shift
    square = lambda out, inp: draw(out, inp, scale=1 / inp ** .5)
    file = {"emb.weight": draw(V, C, scale=.5)}
    for i in range(layers):
        for norm in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            file |= {f"blocks.{i}.{norm}.weight": draw(C, shift=1), f"blocks.{i}.{norm}.bias": draw(C)}
        att = {f"x_{c}": torch.rand(1, 1, C) for c in "rwkvag"} | {"w0": draw(1, 1, C, scale=2), "r_k": draw(C // N, N)}
        for c, rank in zip("wavg", ranks):
            if c == "v" and i == 0 and not unused: continue
            att |= {f"{c}1": draw(C, rank, scale=.2), f"{c}2": draw(rank, C)} | ({} if c == "g" else {f"{c}0": att.get(f"{c}0", draw(1, 1, C))})
        att |= {"k_k": draw(1, 1, C, shift=.7), "k_a": draw(1, 1, C, shift=1)}
        att |= {f"{name}.weight": square(C, C) for name in ("receptance", "key", "value", "output")}
        att |= {"ln_x.weight": draw(C, shift=1), "ln_x.bias": draw(C)}
        file |= {f"blocks.{i}.att.{name}": x for name, x in att.items()}
        file |= {f"blocks.{i}.ffn.x_k": torch.rand(1, 1, C), f"blocks.{i}.ffn.key.weight": square(F, C), f"blocks.{i}.ffn.value.weight": square(C, F)}
    return file | {"ln_out.weight": draw(C, shift=1), "ln_out.bias": draw(C), "head.weight": square(V, C)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    "name -> (our model, tokens, the oracle's answers, the state file)"
    folder, jobs = tmp_path_factory.mktemp("oracle"), {}
    torch.manual_seed(7)
    for name, shape in SHAPES.items():
        file = official_file(*shape)
        assert all(x.count_nonzero() == x.numel() for x in file.values())
        path, state = folder / f"{name}.pth", folder / f"{name} state.pth"
        torch.save(file, path)
        L, C, N, V = shape[:4]
        save_state({f"blocks.{i}.att.time_state": torch.randn(C // N, N, N) for i in range(L)}, state)
        jobs[name] = {"path": str(path)[:-4], "tokens": torch.randint(1, V, (TOKENS,)), "state": str(state)}
    torch.save(jobs, folder / "jobs.pt")
    subprocess.run([sys.executable, "-c", ORACLE, str(folder / "jobs.pt"), str(folder / "out.pt")], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    answers = torch.load(folder / "out.pt", weights_only=True)
    return {name: (load(job["path"] + ".pth", device="cpu", dtype=torch.float32), job["tokens"][None], answers[name], job["state"]) for name, job in jobs.items()}


def far(ours, theirs): return ((ours - theirs).norm() / theirs.norm()).item()


def pieces(model, tokens, sizes):
    state, out = None, []
    for piece in tokens.split(sizes, dim=1):
        logits, state = model(piece, state)
        out.append(logits[0])
    return torch.cat(out), state


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_equal_the_rwkv_packages(cases, name):
    model, tokens, theirs, _ = cases[name]
    assert theirs["sequence"].std() > .5
    for kind, sizes in {"sequence": [TOKENS], "single": [1] * TOKENS, "pieces": [16, 1, 4, 16]}.items():
        ours, state = pieces(model, tokens, sizes)
        assert far(ours, theirs["single" if kind == "single" else "sequence"]) < BAR, kind
        for i in range(model.config.n_layer):
            for mine, other in zip((state.att_shift[i, 0], state.wkv[i, 0], state.ffn_shift[i, 0]), theirs["state"][3 * i:3 * i + 3]): assert far(mine, other) < BAR


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_state_file_means_the_same_to_the_rwkv_package(cases, name):
    model, tokens, theirs, path = cases[name]
    for key, start in load_state(path, model.config).items(): model.get_submodule(key.rsplit(".", 1)[0]).time_state = torch.nn.Parameter(start)
    try: ours = model(tokens)[0][0]
    finally:
        for block in model.blocks: block.att.time_state = None
    assert far(ours, theirs["stated"]) < BAR
    assert far(theirs["sequence"], theirs["stated"]) > .05      # the state does something, so its orientation matters


@pytest.mark.parametrize("backend", ["loop", "chunk", "cpu"])
@torch.no_grad()
def test_every_backend_agrees_with_the_oracle(cases, backend):
    usable, reason = backends().get(backend, (False, "not built"))
    if not usable: pytest.skip(reason)
    model, tokens, theirs, _ = cases["three"]
    model.backend = backend
    try: assert far(model(tokens)[0][0], theirs["sequence"]) < BAR
    finally: model.backend = "auto"


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(**{"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 257} | sizes)).double()
    with torch.no_grad():
        for p in model.parameters(): p += .2 * torch.randn_like(p)
    return model


@torch.no_grad()
def test_packed_documents_are_alone():
    model = tiny()
    for block in model.blocks: block.att.time_state = torch.nn.Parameter(torch.randn(2, 16, 16).double())
    tokens = torch.randint(1, 257, (2, 24))
    resets = torch.zeros(2, 24, dtype=torch.bool)
    resets[0, [0, 5, 6, 17]] = True
    resets[1, 9] = True
    packed = model(tokens, resets=resets)[0]
    for row, cuts in enumerate(([0, 5, 6, 17, 24], [0, 9, 24])):
        for start, end in zip(cuts, cuts[1:]): assert torch.allclose(packed[row, start:end], model(tokens[row:row + 1, start:end])[0][0], rtol=1e-9, atol=1e-9)
    # a reset in a later piece forgets what was carried
    _, state = model(tokens[:, :9])
    later = torch.zeros(2, 15, dtype=torch.bool)
    later[:, 0] = True
    assert torch.allclose(model(tokens[:, 9:], state, resets=later)[0], model(tokens[:, 9:])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad_cp", [False, True])
def test_loss_and_gradients_are_the_textbooks(grad_cp):
    model = tiny()
    model.blocks[0].att.time_state = torch.nn.Parameter(torch.randn(2, 16, 16).double())
    tokens, weights = torch.randint(1, 257, (2, 13)), torch.rand(2, 12).double() * (torch.rand(2, 12) > .3)
    loss = (torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].transpose(1, 2), tokens[:, 1:], reduction="none") * weights).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model.grad_cp = grad_cp
    ours, _ = model(tokens[:, :-1], targets=tokens[:, 1:], weights=weights)
    assert torch.allclose(ours, loss, rtol=1e-9)
    for name, mine, other in zip(dict(model.named_parameters()), torch.autograd.grad(ours, list(model.parameters())), expected): assert torch.allclose(mine, other, rtol=1e-6, atol=1e-9), name


def test_gradients_cross_pieces_through_the_state():
    model = tiny()
    tokens = torch.randint(1, 257, (1, 14))
    whole, _ = model(tokens[:, :-1], targets=tokens[:, 1:])
    first, state = model(tokens[:, :6], targets=tokens[:, 1:7])
    second, _ = model(tokens[:, 6:-1], state, targets=tokens[:, 7:])
    for mine, other in zip(torch.autograd.grad(first + second, list(model.parameters())), torch.autograd.grad(whole, list(model.parameters()))): assert torch.allclose(mine, other, rtol=1e-6, atol=1e-9)


def test_head_with_an_adapter_is_trained_through():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.s = torch.nn.Parameter(torch.tensor(2., dtype=torch.float64))
        def forward(self, x, base): return self.s * (x @ base.dense().T)
    model, tokens = tiny(), torch.randint(1, 257, (1, 9))
    model.head.adapter = Scale()
    loss, _ = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:], reduction="sum"), rtol=1e-9)
    loss.backward()
    assert model.head.adapter.s.grad.abs() > 0


@torch.no_grad()
def test_bf16_keeps_its_memory_in_fp32():
    model, tokens = tiny().float(), torch.randint(1, 257, (1, 40))
    exact, _ = model(tokens)
    rounded, state = model.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32 and state.att_shift.dtype == torch.bfloat16
    assert far(rounded.float(), exact) < .1
    assert State.zeros(model.config, 3, dtype=torch.bfloat16).wkv.shape == (2, 3, 2, 16, 16)


def test_bad_input_is_one_sentence():
    model = tiny()
    for tokens, word in ((torch.tensor([1, 2]), "shape"), (torch.zeros(1, 0, dtype=torch.long), "at least one"), (torch.tensor([[300]]), "300")):
        with pytest.raises(ValueError, match=word) as e: model(tokens)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="multiple of head_size"): RWKVConfig(n_embd=100)
    with pytest.raises(ValueError, match="'8'"): RWKVConfig(version="8")
