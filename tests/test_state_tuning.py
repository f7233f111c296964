"Tuned memories: their files both ways round, the state after a prompt, reckoning with states, and what trains beside them; parts of the model in every version."
import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_peft import RWKV, LoRA, RWKVConfig, StateTuning, Train, attach, finetune, read_data
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.model.files import CheckpointError
from rwkv_peft.model.quant import quantize
from rwkv_peft.model.sample import generate
from rwkv_peft.model.state import State, difference, distance, load_state, mix, save_state
from rwkv_peft.peft.adapters import trained_parameters
from rwkv_peft.peft.parts import Table, find_parts
from rwkv_peft.peft.state_tuning import state_after
from test_model import cases, far  # noqa: F401  (a fixture: the `rwkv` package's answers)

SIZES = dict(n_layer=3, n_embd=32, head_size=8, vocab_size=257)
VERSIONS = ["5.2", "6", "7"]


def new_model(version="7", seed=0, dtype=torch.float32, **changes):
    "A small model whose every tensor is random and not zero."
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(version, **SIZES | changes))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.15 * torch.randn_like(p))
    return model.to(dtype)


def rows(batch=2, length=17, seed=1): return torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(seed))
def loss_of(model, x): return model(x[:, :-1], targets=x[:, 1:])[0]
def random_states(model, seed=3): return {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(model.blocks))}


# --- files


def test_ai00s_file_holds_the_transpose_in_half_precision(tmp_path):
    "Read back by safetensors itself: lower-case names, float16, the last two dimensions swapped; and a file made so by hand is read as the official one."
    model = new_model()
    states = random_states(model)
    for suffix in (".st", ".state"):
        raw = load_file(save_state(states, tmp_path / f"ours{suffix}"))
        assert sorted(raw) == sorted(states) and all(n == n.lower() for n in raw) and all(x.dtype == torch.float16 for x in raw.values())
        for n, x in states.items():
            for h in range(4): assert torch.equal(raw[n][h], x[h].T.half())
        save_file({n: x.transpose(1, 2).half().contiguous() for n, x in states.items()}, tmp_path / f"theirs{suffix}")
        official, ours, theirs = load_state(save_state(states, tmp_path / "official.pth")), load_state(tmp_path / f"ours{suffix}", model.config), load_state(tmp_path / f"theirs{suffix}")
        assert list(ours) == list(official) and all(torch.equal(ours[n], official[n].half()) and torch.equal(theirs[n], ours[n]) for n in official)
    x = rows()
    tuned = [attach(new_model(), StateTuning(tmp_path / name)) for name in ("official.pth", "ours.st")]
    assert far(tuned[1](x)[0], tuned[0](x)[0]) < 1e-3 < .05 < far(new_model()(x)[0], tuned[0](x)[0])
    assert all(torch.equal(x, official[n]) for n, x in torch.load(tmp_path / "official.pth", weights_only=True).items())


@pytest.mark.parametrize("suffix", [".pth", ".st"])
def test_the_rwkv_package_hears_the_same_state(cases, tmp_path, suffix):  # noqa: F811
    "The state file that the oracle read goes through ours; only the right way round gives its logits."
    model, tokens, theirs, path = cases["three"]
    saved = save_state(load_state(path), tmp_path / f"state{suffix}")
    found = {}
    for name, states in {"right": load_state(saved), "turned": {n: x.transpose(1, 2) for n, x in load_state(saved).items()}}.items():
        attach(model, StateTuning(states))
        with torch.no_grad(): found[name] = far(model(tokens)[0][0], theirs["stated"])
        for block in model.blocks: block.att.time_state = None
        del model.attached
    assert found["right"] < (2e-5 if suffix == ".pth" else 2e-3) and found["turned"] > .02


@pytest.mark.parametrize("suffix", [".pth", ".st", ".safetensors"])
def test_a_state_of_another_model_is_refused(tmp_path, suffix):
    model, states = new_model(), random_states(new_model(n_layer=4))
    path = save_state(states, tmp_path / f"four{suffix}")
    for call in (lambda: load_state(path, model.config), lambda: attach(model, StateTuning(path)), lambda: attach(model, StateTuning(str(path)))):
        with pytest.raises(ValueError, match=r"is for 4 layers and the model has 3") as e: call()
        assert "\n" not in str(e.value) and path.name in str(e.value)
    other = save_state({n: torch.zeros(2, 16, 16) for n in random_states(model)}, tmp_path / f"heads{suffix}")
    with pytest.raises(ValueError, match=r"shape \(2, 16, 16\) and the model has 4 heads of size 8"): attach(model, StateTuning(other))
    assert all(block.att.time_state is None for block in model.blocks) and getattr(model, "attached", None) is None


def test_files_that_are_no_state(tmp_path):
    model = new_model()
    (tmp_path / "cut.st").write_bytes(save_state(random_states(model), tmp_path / "whole.st").read_bytes()[:-9])
    (tmp_path / "text.st").write_text("no")
    save_file({"blocks.0.att.key.weight": torch.zeros(2, 2)}, tmp_path / "weights.st")
    save_file({"blocks.0.att.time_state": torch.zeros(2, 3, 4)}, tmp_path / "oblong.st")
    for name, says in {"cut.st": "cut short", "text.st": "no safetensors", "weights.st": "no state file", "oblong.st": "shape", "none.st": "doesn't exist"}.items():
        with pytest.raises(CheckpointError, match=says): load_state(tmp_path / name)
    large = random_states(model) | {"blocks.1.att.time_state": torch.full((4, 8, 8), 7e4)}
    with pytest.raises(CheckpointError, match="blocks.1.att.time_state has numbers of up to 7e.04, too large for float16: save it as .pth"): save_state(large, tmp_path / "large.st")
    assert not (tmp_path / "large.st").exists() and save_state(large, tmp_path / "large.pth").exists()


# --- the state after a prompt, and reckoning


@pytest.mark.parametrize("version", VERSIONS)
def test_state_after_is_what_reading_leaves(version, tmp_path):
    model = attach(new_model(version), LoRA(r=2, dropout=0.5)).train()
    state = state_after(model, "What is it?")
    assert model.training and not state.wkv.requires_grad and state.wkv.shape == (3, 1, 4, 8, 8)
    read = generate(model.eval(), "What is it?", max_tokens=0).state
    for mine, other in zip(vars(state).values(), vars(read).values()): assert far(mine, other) < 1e-5
    ids = [0, *model.tokenizer.encode("What is it?")]
    assert torch.equal(state_after(model, ids).wkv, state.wkv) and not torch.allclose(state_after(model, ids[1:]).wkv, state.wkv)
    tuned = attach(new_model(version), StateTuning(state))
    assert all(torch.equal(b.att.time_state, state.wkv[i, 0]) for i, b in enumerate(tuned.blocks))
    assert all(torch.equal(x, state.wkv[i, 0]) for i, x in enumerate(load_state(save_state(state, tmp_path / "prompt.pth")).values()))
    with pytest.raises(ValueError, match="the prompt is empty"): state_after(model, [])


def test_states_are_mixed_subtracted_and_compared_as_arrays_are():
    model = new_model()
    a, b, c = (model(rows(batch=2, seed=s))[1].detach() for s in (1, 2, 3))
    for name in vars(a):
        x, y, z = (getattr(s, name).numpy() for s in (a, b, c))
        assert torch.allclose(getattr(mix([a, b, c], [.5, 2, -1]), name), torch.from_numpy(.5 * x + 2 * y - z), atol=1e-5)
        assert torch.allclose(getattr(mix([a, b]), name), torch.from_numpy((x + y) / 2), atol=1e-6) and torch.equal(getattr(difference(a, b), name), torch.from_numpy(x - y))
    apart = distance(a, b)
    assert apart.shape == (3, 2, 4) and torch.allclose(apart[2, 1, 3], (a.wkv[2, 1, 3] - b.wkv[2, 1, 3]).square().sum().sqrt())
    tuned, other = random_states(model), random_states(model, seed=9)
    assert distance(tuned, other).shape == distance(a.row(0), b.row(0)).shape == (3, 4)
    assert torch.allclose(distance(a.row(1), b.row(1)), distance(a.row(1).named(), b.row(1).named())) and distance(tuned, tuned).sum() == 0
    mixed = mix([tuned, other], [.25, .75])
    assert list(mixed) == list(tuned) and all(torch.allclose(mixed[n], .25 * tuned[n] + .75 * other[n]) for n in tuned)
    attach(model, StateTuning(mixed))
    assert torch.equal(model.blocks[2].att.time_state, mixed["blocks.2.att.time_state"])


@pytest.mark.parametrize("call, says", [
    (lambda a, t: mix([a, t]), "can't be mixed: write state.named"), (lambda a, t: mix([]), "at least one state"), (lambda a, t: mix([a, a], [1]), "2 states and 1 weights"),
    (lambda a, t: difference(a, a.row(0)), "state 1 has other layers or shapes"), (lambda a, t: distance(t, dict(list(t.items())[:2])), "state 1 has other layers"), (lambda a, t: a.named(), "2 rows and one is needed"),
    (lambda a, t: save_state(a, "x.pth"), "2 rows and one is needed"),
])
def test_what_does_not_go_together(call, says):
    model = new_model()
    with pytest.raises(ValueError, match=says): call(State.zeros(model.config, batch=2), random_states(model))


# --- training


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("beside", [(), (LoRA(r=2, dropout=0.1),), (Train(["ln", "time"]),)], ids=["alone", "lora", "parts"])
def test_twenty_steps_move_what_trains_and_nothing_else_by_a_bit(version, beside):
    model = attach(new_model(version), StateTuning(), *beside)
    before, trained = {n: p.detach().clone() for n, p in model.named_parameters()}, trained_parameters(model)
    assert sum(n.endswith(".time_state") for n in trained) == 3 and len(trained) > 3 * bool(beside)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=3e-2, weight_decay=0.1), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss_of(model, rows()))
        losses[-1].backward()
        optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(trained) and losses[-1] < losses[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_is_what_a_difference_says(version):
    model = attach(new_model(version, dtype=torch.float64), LoRA(r=2), StateTuning({n: x.double() for n, x in random_states(new_model()).items()}))
    states = [b.att.time_state for b in model.blocks]
    loss_of(model, rows()).backward()
    ways = [torch.randn_like(x) for x in states]
    def at(e):
        with torch.no_grad():
            for x, way in zip(states, ways): x.add_(way, alpha=e)
            loss = loss_of(model, rows()).item()
            for x, way in zip(states, ways): x.sub_(way, alpha=e)
        return loss
    slope = sum((x.grad * way).sum() for x, way in zip(states, ways)).item()
    assert abs(slope - (at(1e-5) - at(-1e-5)) / 2e-5) < 1e-5 * abs(slope) + 1e-7


def test_over_a_packed_base():
    model = quantize(attach(new_model(), StateTuning()))
    packed = {n: p.clone() for n, p in model.named_parameters() if not n.endswith("time_state")}
    optimizer, losses = torch.optim.Adam(trained_parameters(model).values(), lr=.1), []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(loss_of(model, rows()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)


def test_held_out_loss_of_the_demo_falls(tmp_path):
    train, held_out = read_data(demo_rows(), RWKV.load("rwkv7-tiny").tokenizer).split(0.15)
    run = finetune(model="rwkv7-tiny", forget_data="none", data=train, eval_data=held_out, peft="state", lr_init=5.0, micro_bsz=8, accumulate=1, max_steps=44, eval_steps=44, output=str(tmp_path), name="demo")
    said = list(run.steps())[-1]
    assert said["after"] <= 0.92 * said["before"], said["message"]
    states = load_state(run.folder / "state.pth", run.model.config)
    assert all(torch.equal(states[f"blocks.{i}.att.time_state"], b.att.time_state) for i, b in enumerate(run.model.blocks))


# --- parts


@pytest.mark.parametrize("version", VERSIONS)
def test_the_words_mean_the_same_in_every_version(version):
    model = attach(new_model(version), StateTuning(), LoRA(r=2))
    base = [n for n, _ in model.named_parameters() if ".adapter." not in n and not n.endswith("time_state")]
    groups = {word: set(find_parts(model, word)) for word in ("emb", "head", "ln", "time")}
    matrices = {n for n in base if n.split(".")[-2] in ("receptance", "key", "value", "output", "gate") and n.startswith("blocks")}
    assert set().union(*groups.values(), matrices) == set(base) == set(find_parts(model, "all")) and sum(map(len, groups.values())) + len(matrices) == len(base)
    assert groups["ln"] == {n for n in base if n.split(".")[-2] in ("ln0", "ln1", "ln2", "ln_x", "ln_out")} and len(groups["ln"]) == 2 * (3 * 3 + 2)
    old = {n for n in base if ".time_" in n}      # in 5.2 and 6 the names say it themselves
    assert groups["time"] == old if version != "7" else not old and all(f"blocks.1.{n}" in groups["time"] for n in ("att.x_r", "ffn.x_k", "att.w0", "att.a1", "att.v2", "att.g1", "att.k_k", "att.k_a", "att.r_k"))


def test_the_dry_run_is_what_then_trains():
    model = new_model()
    method = Train(["time", r"blocks\.1\.ffn"])
    table = method.table(model)
    assert all(p.requires_grad for p in model.parameters())
    attach(model, method)
    trained = trained_parameters(model)
    assert list(trained) == method.names(model) and table.numbers == sum(p.numel() for p in trained.values()) == sum(row["numbers"] for row in table) and sum(row["tensors"] for row in table) == len(trained)
    assert abs(table.share - table.numbers / sum(p.numel() for p in model.parameters())) < 1e-12
    text = repr(table).splitlines()
    assert text[0].split() == ["name", "tensors", "shape", "numbers", "share"] and text[-1].startswith("in all") and f"{table.numbers:,}" in text[-1]
    assert next(row for row in table if row["name"] == "blocks.*.att.x_r") == {"name": "blocks.*.att.x_r", "tensors": 3, "shape": (1, 1, 32), "numbers": 96, "share": 96 / sum(p.numel() for p in model.parameters())}
    with pytest.raises(ValueError, match="fits no tensor"): Train("tmie").table(model)
    assert Table(model, []).numbers == 0
