"Rows read in pieces: the same loss and the same gradients as whole rows, in every version, with every method, under DDP and ZeRO; what is cut when asked to; what stays in memory."
import gc
import json
import math
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from small import new_model, rel, rows, stir
from rwkv_peft import LoRA, RWKV, RWKVConfig, StateTuning, attach, finetune
from rwkv_peft.bench.peaks import border_bytes
from rwkv_peft.kernels.wkv import backends
from rwkv_peft.model.state import State
from rwkv_peft.train import Config, ConfigError
from rwkv_peft.train.infctx import infctx

T, BARS = 53, {torch.float64: 1e-10, torch.float32: 1e-5}
RANKS = {"5.2": {}, "6": {"mix_rank": 6, "decay_rank": 10}, "7": {"w_rank": 8, "a_rank": 12, "v_rank": 4, "g_rank": 20}}


def model_of(version, dtype=torch.float64):
    "Every weight and a first state of its own train."
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(version=version, n_layer=3, n_embd=32, head_size=8, vocab_size=31, dim_ffn=80, **RANKS[version]))
    attach(model, StateTuning()).requires_grad_(True)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.15 * torch.randn_like(p))
        model.emb.weight.normal_()
    return model.to(dtype)


def batch(dtype=torch.float64):
    "Two rows with weights of all sizes, none in the second piece of 16; documents begin at a border of pieces, inside one and at the last token but four."
    g = torch.Generator().manual_seed(1)
    ids, weights, resets = torch.randint(31, (2, T + 1), generator=g), torch.rand(2, T, generator=g), torch.zeros(2, T, dtype=torch.bool)
    weights[:, 16:32] = 0
    resets[0, 16] = resets[1, 21] = resets[0, T - 5] = True
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=weights.to(dtype), resets=resets)


def state_of(dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    return State(*(torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in ((3, 2, 32), (3, 2, 4, 8, 8), (3, 2, 32))))


def gradients(model, state=None, **given):
    loss, after = model(state=state, **given)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} | (vars(state) if state else {})
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, named.values()))), after


@pytest.mark.parametrize("backend, dtype", [("loop", torch.float64), ("chunk", torch.float64), ("loop", torch.float32), ("chunk", torch.float32), ("cpu", torch.float32)], ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("version", RANKS)
def test_every_gradient_is_that_of_the_whole_row(version, backend, dtype):
    if not backends()[backend][0]: pytest.skip(backends()[backend][1])
    model, given, start = model_of(version, dtype), batch(dtype), state_of(dtype)
    model.backend = backend
    for state in (None, start):
        loss, expected, after = gradients(infctx(model), state, **given)
        for n in (16, 7, T - 1):
            got, found, left = gradients(infctx(model, n), state, **given)
            worst = max(found, key=lambda name: rel(found[name], expected[name]))
            assert rel(found[worst], expected[worst]) < BARS[dtype], (n, worst)
            assert math.isclose(got, loss, rel_tol=BARS[dtype]) and all(rel(getattr(left, x), getattr(after, x)) < BARS[dtype] for x in vars(after))
    assert min(g.norm() for n, g in expected.items() if "time_state" in n) > 0


@pytest.mark.parametrize("n, grad_cp", [(16, True), (1, False)])
def test_pieces_of_a_token_and_checkpoints_in_pieces(n, grad_cp):
    model, given = model_of("7"), batch()
    _, expected, _ = gradients(infctx(model), **given)
    model.grad_cp = grad_cp
    _, found, _ = gradients(infctx(model, n), **given)
    assert max(rel(found[name], expected[name]) for name in expected) < 1e-10


@pytest.mark.parametrize("penalty", [{"l2wrap": 1e-2}, {"z_loss": 1e-2}], ids=str)
def test_penalties_reach_every_piece(penalty):
    model, given = model_of("7"), batch()
    _, plain, _ = gradients(infctx(model), **given)
    loss, expected, _ = gradients(model, **given, **penalty)
    got, found, _ = gradients(infctx(model, 16), **given, **penalty)
    assert math.isclose(got, loss, rel_tol=1e-12) and max(rel(found[name], expected[name]) for name in expected) < 1e-10
    assert rel(expected["head.weight"], plain["head.weight"]) > 1e-4


@pytest.mark.parametrize("version", RANKS)
def test_truncated_is_each_piece_from_a_given_start(version):
    model, given = model_of(version), batch()
    _, whole, _ = gradients(infctx(model), **given)
    expected, state, total, named = {}, None, 0., dict(model.named_parameters())
    for i in range(0, T, 16):                                      # one backward a piece
        loss, state = model(state=state and state.detach(), **{k: x[:, i:i + 16] for k, x in given.items()})
        piece = torch.autograd.grad(loss, named.values(), allow_unused=True, materialize_grads=True)
        total, expected = total + loss.item(), {k: g + expected.get(k, 0) for k, g in zip(named, piece)}
    got, found, _ = gradients(infctx(model, 16, "truncated"), **given)
    assert math.isclose(got, total, rel_tol=1e-12) and max(rel(found[k], expected[k]) for k in expected) < 1e-10
    assert rel(found["blocks.0.att.value.weight"], whole["blocks.0.att.value.weight"]) > 1e-3


def calls_of(model):
    "Lengths of the pieces that the first block reads from now on."
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


def test_each_piece_is_read_twice_but_the_last_and_short_rows_once_and_whole():
    model, given = infctx(model_of("7"), 16), batch()
    seen = calls_of(model)
    model(**given)[0].backward()
    assert seen == [16, 16, 16, 5, 16, 16, 16]
    del seen[:]
    model(**{k: x[:, :16] for k, x in given.items()})[0].backward()
    assert seen == [16]


def test_without_gradients_pieces_are_read_once_and_logits_come_whole():
    model, given = infctx(model_of("7"), 16), batch()
    seen = calls_of(model)
    with torch.no_grad():
        loss = model(**given)[0]
        assert seen == [16, 16, 16, 5]
        assert model(given["tokens"])[0].shape == (2, T, 31) and seen[-1] == T
        assert rel(loss, infctx(model)(**given)[0]) < 1e-12 and "forward" not in vars(model)
    frozen = infctx(model, 16).requires_grad_(False)(**given)[0]
    assert not frozen.requires_grad and rel(frozen, loss) < 1e-12


@pytest.mark.parametrize("untrained", [slice(0, 16), slice(16, 32), slice(48, None), slice(0, None)])
def test_a_piece_in_which_nothing_is_learnt_gives_no_nan(untrained):
    model, given = model_of("7"), batch()
    given["weights"] = torch.ones(2, T)
    given["weights"][:, untrained] = 0
    loss, expected, _ = gradients(infctx(model), **given)
    got, found, _ = gradients(infctx(model, 16), **given)
    assert math.isclose(loss, got, rel_tol=1e-12) and all(g.isfinite().all() and (g - expected[n]).norm() <= 1e-10 * expected[n].norm() for n, g in found.items())


def test_dropout_draws_the_same_twice():
    "Against a loop over the pieces that keeps everything."
    model, given = stir(attach(new_model(), LoRA(r=4, dropout=.3))).double().train(), batch()
    def slowly(state=None, total=0.):
        for i in range(0, T, 16):
            loss, state = model(state=state, **{k: x[:, i:i + 16] for k, x in given.items()})
            total = total + loss
        return total
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    expected = torch.autograd.grad(slowly(), trained)
    torch.manual_seed(3)
    found = torch.autograd.grad(infctx(model, 16)(**given)[0], trained)
    assert max(rel(f, e) for f, e in zip(found, expected)) < 1e-10


def test_memories_are_carried_in_fp32_by_a_bf16_model():
    model, given = model_of("7", torch.bfloat16), batch(torch.float32)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append((args[3], args[2].dtype, args[4].dtype)))
    whole = infctx(model)(**given)[0]
    pieces, after = infctx(model, 16)(**given)
    assert [w is None or w.dtype for w, *_ in seen] == [True, True] + [torch.float32] * 3 and {x.dtype for x in vars(after).values()} == {torch.float32}
    assert {kind for _, *shifts in seen for kind in shifts} == {torch.bfloat16}      # the block computes in its own type
    assert rel(pieces, whole) < 1e-3


class Live(TorchDispatchMode):
    "Bytes of the tensors made inside that are still there: `now`, and at most, `peak`."
    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for storage in {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)}.values():
            if storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key): self.now -= self.held.pop(key)


def test_only_states_are_added_by_a_longer_row():
    model = attach(new_model(), LoRA(r=4))
    peaks = {}
    for length in (64, 512):
        x = rows(1, length + 1)
        infctx(model, 32)
        gc.collect()
        with Live() as live:
            loss = model(x[:, :-1], targets=x[:, 1:], weights=torch.ones(1, length))[0]
            loss.backward()
        peaks[length] = live.peak
        del loss
    more = border_bytes(model.config, 512, 32) - border_bytes(model.config, 64, 32)
    assert border_bytes(model.config, 64, 32) == sum(x.nbytes for x in vars(State.zeros(model.config)).values())
    assert peaks[512] - peaks[64] < 1.15 * more + .02 * peaks[64]


def started(cases, ranks, port):
    env = {**os.environ, "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, "-W", "ignore", Path(__file__).parent / "infctx_ranks.py", *cases], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_methods_storages_and_strategies_agree_with_whole_rows(ranks):
    if sys.platform != "linux": pytest.skip("DeepSpeed is for Linux")
    made = [f"{method} {storage}" for method in ("lora", "miss", "state") for storage in ("none", "nf4")] + ["full none"]
    cases = [f"{m} {how}" for m in made for how in ("plain", "zero2", "zero3")] + ["lora none ddp"] if ranks == 1 else ["lora none ddp", "lora nf4 zero2", "lora none zero3", "state nf4 zero3", "full none zero3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = started(cases, ranks, port)
    try: told = [p.communicate(timeout=300) for p in processes]
    finally:
        for p in processes: p.kill()
    for p, (out, err) in zip(processes, told):
        assert p.returncode == 0, err[-2000:]
        errors = json.loads(out.strip().splitlines()[-1])
        assert set(errors) == set(cases) and all(e < 1e-5 for e in errors.values()), errors


LONG = [{"text": f"{i} " + "ab cd ef. " * (3 + 9 * (i % 2))} for i in range(8)]


def run(folder, **settings):
    return finetune(model="rwkv7-tiny", forget_data="none", data=LONG, output=str(folder), micro_bsz=2, accumulate=2, epochs=2., eval_split=.25, save_steps=1, device="cpu", precision="fp32", **settings)


def numbers(run): return [e["loss"] for e in run.events if e["event"] in ("step", "eval")]


@pytest.mark.parametrize("settings", [{}, {"peft": "miss", "quant": "nf4"}, {"peft": "state", "lr_init": 1e-2}], ids=["lora", "miss", "state"])
def test_a_run_in_pieces_is_the_run_of_whole_rows(tmp_path, settings):
    whole = run(tmp_path / "whole", name="a", **settings).fit()
    pieces = run(tmp_path / "pieces", name="a", train_type="infctx", chunk_ctx=24, **settings)
    seen = []
    pieces.plan()
    pieces.model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    pieces.fit()
    assert max(seen) == 24 and numbers(pieces) == pytest.approx(numbers(whole), rel=2e-4) and len(numbers(whole)) > 4


def test_a_model_is_read_whole_again_by_a_run_that_says_nothing(tmp_path):
    model = infctx(RWKV.load("rwkv7-tiny", device="cpu"), 8, "truncated")
    after = finetune(model=model, data=LONG, output=str(tmp_path), max_steps=1)
    after.plan()
    assert "forward" not in vars(model)


def test_a_run_goes_on_in_pieces(tmp_path):
    whole = run(tmp_path, name="whole", chunk_ctx=24).fit()
    broken = run(tmp_path, name="broken", chunk_ctx=24)
    for event in broken.steps():
        if event["event"] == "step" and event["step"] == 1: broken.stop()
    again = finetune(name="broken", output=str(tmp_path), resume=True).fit()
    assert again.config.chunk_ctx == 24 and numbers(again) == pytest.approx(numbers(whole), rel=1e-6)
    with pytest.raises(ConfigError, match="chunk_ctx"): finetune(name="broken", output=str(tmp_path), resume=True, chunk_ctx=8)


@pytest.mark.parametrize("settings, words", [
    ({"train_type": "infctx"}, "chunk_ctx: train_type = 'infctx'.*chunk_ctx = 512"), ({"bptt": "truncated"}, "bptt.*chunk_ctx"), ({"chunk_ctx": 0}, "chunk_ctx.*greater than 0"),
    ({"chunk_ctx": 512, "bptt": "trunc"}, "bptt: 'trunc'.*'truncated'"), ({"chunk_ctx": 3.5}, "chunk_ctx: expected a whole number")])
def test_refusals(settings, words):
    with pytest.raises(ConfigError, match=words): Config(model="rwkv7-tiny", data=LONG, **settings)


@pytest.mark.parametrize("given, words", [((0,), "chunk_ctx: 0"), ((8, "full"), "bptt: 'full'")])
def test_a_model_refuses_too(given, words):
    model = new_model()
    with pytest.raises(ConfigError, match=words): infctx(model, *given)
    assert "forward" not in vars(model)


def test_settings_that_go_together():
    for settings in ({"chunk_ctx": 512}, {"train_type": "infctx", "chunk_ctx": 512, "bptt": "truncated"}, {"train_type": "state", "chunk_ctx": 512}, {"chunk_ctx": 512, "peft": "none"}):
        Config(model="rwkv7-tiny", data=LONG, **settings)
