"LISA: whose turn it is, what the optimiser keeps, what a run saves, and how it goes on."
import pytest
import torch

from rwkv_peft import LISA, LoRA, RWKV, RWKVConfig, Run, StateTuning, Train, attach, detach, finetune, load_adapter, read_data, save_adapter
from rwkv_peft.bench.demo import demo_rows
from rwkv_peft.model.checkpoint import save
from rwkv_peft.model.quant import quantize
from rwkv_peft.peft.adapters import trained_parameters
from rwkv_peft.peft.lisa import deal, refit, refuse_with_zero
from rwkv_peft.train.config import ConfigError
from rwkv_peft.train.folder import load_checkpoint
from test_train import ROWS, losses, of

SIZES = dict(n_layer=4, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257)


def new_model(seed=0, version="7", dtype=torch.float32):
    "A small model whose every tensor is random and not zero."
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(version, **SIZES))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def values(model): return {n: p.detach().clone() for n, p in model.named_parameters()}
def moved(model, before): return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
def tensors(model, *prefixes): return {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{p}." for p in prefixes))}
def kept_bytes(optimizer): return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())


def make(folder, **settings):
    base = dict(model=new_model(), forget_data="none", data=ROWS, peft=LISA(layers=1, every=3), lr_init=3e-3, micro_bsz=2, accumulate=2, max_steps=20, eval_split=.2, eval_steps=5, save_steps=5, early_stop=0, output=str(folder), name="run")
    return finetune(**base | settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory): return str(save(new_model(), tmp_path_factory.mktemp("lisa") / "base.safetensors", torch.float32))


# --- the draws


def test_every_block_has_its_turn_in_a_round_and_all_equally_often():
    for L, layers in ((6, 2), (5, 2), (4, 4), (7, 3), (3, 1)):
        round = -(-L // layers)
        for seed in (0, 1, 2**32 - 1):
            draws = [deal(L, layers, j, seed) for j in range(4 * round)]
            assert draws == [deal(L, layers, j, seed) for j in range(4 * round)]
            assert all(len(set(d)) == layers and d == sorted(d) and set(d) <= set(range(L)) for d in draws)
            assert all(set().union(*draws[i:i + round]) == set(range(L)) for i in range(0, 4 * round, round))
    assert len({tuple(deal(6, 2, j)) for j in range(300)}) == 15 and len({tuple(deal(6, 2, 0, seed)) for seed in range(60)}) > 10


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_flags_are_a_function_of_seed_and_step(version):
    model, method = attach(new_model(version=version), LISA(layers=2, every=3), StateTuning()), LISA(layers=2, every=3)
    states = {f"blocks.{i}.att.time_state" for i in range(4)}
    for step in (0, 1, 3, 5, 14, 2, 0):
        before = set(trained_parameters(model))
        changed = method.redraw(model, step, seed=5)
        drawn = tensors(model, *(f"blocks.{i}" for i in deal(4, 2, step // 3, 5)))
        assert set(trained_parameters(model)) == drawn | states and changed == (before != drawn | states)
        ever = {i for j in range(step // 3 + 1) for i in deal(4, 2, j, 5)}
        assert set(model.attached.weights) == tensors(model, *(f"blocks.{i}" for i in ever)) - states


def test_emb_and_head_train_all_the_time_when_asked():
    model, method = new_model(), LISA(layers=1, every=1, emb=True, head=True)
    attach(model, method, Train("ln_out"))
    for step in range(5):
        method.redraw(model, step)
        assert {"emb.weight", "head.weight", "ln_out.weight"} <= set(trained_parameters(model)) and "ln_out.bias" in model.attached.weights
    assert tensors(model, "emb", "head") & set(trained_parameters(attach(new_model(), LISA()))) == set()


# --- refusals


@pytest.mark.parametrize("method", [lambda: LISA(layers=0), lambda: LISA(every=0), lambda: LISA(layers=1.5), lambda: LISA(layers=True), lambda: LISA(emb=1)])
def test_settings_that_cannot_be(method):
    with pytest.raises(ValueError, match="LISA: (layers|every|emb)="): method()


@pytest.mark.parametrize("call, says", [
    (lambda m: attach(m, LISA(layers=5)), "layers=5, and this model has 4 blocks"),
    (lambda m: attach(m.bfloat16(), LISA()), "bfloat16, too coarse"),
    (lambda m: attach(m, LISA(), LoRA(r=2)), "LoRA trains an adapter on the same matrices"),
    (lambda m: attach(m, LoRA(r=2), LISA()), "LoRA trains an adapter on the same matrices"),
    (lambda m: attach(m, LISA(), Train("ln")), r"Train trains blocks.0.att.ln_x.bias as well"),
    (lambda m: attach(m, Train("head"), LISA(head=True)), r"Train trains head.weight as well"),
    (lambda m: attach(m, LISA(), LISA(layers=1)), "LISA trains blocks.0"),
    (lambda m: attach(quantize(m.requires_grad_(False)), LISA()), "blocks.0.att.receptance is packed"),
])
def test_a_refusal_is_one_sentence_and_leaves_the_model_alone(call, says):
    model = new_model()
    before, flags = values(model), None
    with pytest.raises(ValueError, match=says) as e: call(model)
    assert "\n" not in str(e.value) and getattr(model, "attached", None) is None and len({p.requires_grad for p in model.parameters()}) == 1
    assert all(torch.equal(p, before[n].to(p.dtype)) for n, p in model.named_parameters() if n in before)


def test_packing_after_attach_is_refused_and_so_is_a_run_over_int8(tmp_path):
    model = attach(new_model(), LISA())
    with pytest.raises(ValueError, match="trains"): quantize(model)
    assert all(part.storage is None for part in (model.blocks[0].att.key, model.blocks[3].ffn.value))
    model = new_model()
    with pytest.raises(ConfigError, match="quant: packed matrices can't train, and LISA"): make(tmp_path, model=model, quant="int8")
    with pytest.raises(ValueError, match="LISA: .* is packed"): make(tmp_path, model=quantize(new_model())).plan()
    assert getattr(model, "attached", None) is None and model.blocks[0].att.key.storage is None


def test_strategies_that_cannot_follow():
    refuse_with_zero("auto")
    for strategy in ("deepspeed_stage_1", "deepspeed_stage_2_offload", "deepspeed_stage_3"):
        with pytest.raises(ValueError, match="flat buffers"): refuse_with_zero(strategy)
    with pytest.raises(ValueError, match="averaged"): refuse_with_zero("ddp")


# --- what trains, and what is remembered


def test_twenty_steps_move_the_drawn_blocks_only_and_free_the_others_memory(tmp_path):
    run, full = make(tmp_path), 0
    before = None
    for said in run.steps():
        if said["event"] == "start":
            before = values(run.model)
            full = 2 * sum(p.nbytes for n, p in run.model.named_parameters() if n.startswith("blocks."))
        if said["event"] != "step": continue
        drawn, coming = deal(4, 1, (said["step"] - 1) // 3), deal(4, 1, said["step"] // 3)
        assert moved(run.model, before) == tensors(run.model, f"blocks.{drawn[0]}")
        assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in trained_parameters(run.model).values()} == {id(p) for p in run.model.blocks[coming[0]].parameters()}
        here = 2 * sum(p.nbytes for p in run.model.blocks[drawn[0]].parameters())
        assert kept_bytes(run.optimizer) == (here if coming == drawn else 0) and here < .3 * full
        assert all(p.grad is None for p in run.model.parameters())
        before = values(run.model)
    assert said["event"] == "done" and set(run.model.attached.weights) == tensors(run.model, *(f"blocks.{i}" for i in range(4)))


def test_refit_keeps_what_stays_and_frees_the_rest():
    a, b, c = (torch.nn.Parameter(torch.randn(50)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [a], "weight_decay": .1}, {"params": [b]}], lr=1e-2)
    for p in (a, b): p.grad = torch.randn(50)
    optimizer.step()
    kept = optimizer.state[b]["exp_avg"]
    refit(optimizer, [{"params": [b, c], "lr_scale": 2.}])
    assert set(optimizer.state) == {b} and optimizer.state[b]["exp_avg"] is kept and kept_bytes(optimizer) == 400
    for p in (b, c): p.grad = torch.randn(50)
    old = [p.detach().clone() for p in (a, b, c)]
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip((a, b, c), old)] == [True, False, False] and kept_bytes(optimizer) == 800
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr_scale"] == 2. and optimizer.state[b]["step"] == 2 and optimizer.state[c]["step"] == 1


def test_a_run_is_plain_adam_with_a_new_optimiser_for_each_draw(tmp_path):
    "The same rows, by torch's AdamW alone; no block is drawn twice in a row with this seed."
    assert all(deal(4, 1, j, 2) != deal(4, 1, j + 1, 2) for j in range(3))
    run = make(tmp_path, max_steps=12, seed=2, eval_split=0., grad_clip=0., lr_schedule="constant", warmup_steps=0)
    events = list(run.steps())
    plain = new_model().requires_grad_(False)
    for step in of(events, "step"):
        if (step["step"] - 1) % 3 == 0:
            block = plain.blocks[deal(4, 1, (step["step"] - 1) // 3, 2)[0]]
            plain.requires_grad_(False), block.requires_grad_(True)
            fast = [p for n, p in block.named_parameters() if n == "att.w0"]
            optimizer = torch.optim.AdamW([{"params": [p for p in block.parameters() if p is not fast[0]]}, {"params": fast, "lr": 6e-3}], lr=3e-3, betas=(.9, .99), weight_decay=0.)
        examples = [run.data[i] for i in step["rows"]]
        loss = sum(plain(e.tokens[None, :-1], targets=e.tokens[None, 1:], weights=e.weights[None, 1:])[0] for e in examples) / sum(e.weights[1:].sum() for e in examples)
        assert abs(loss.item() - step["loss"]) < 1e-4
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert all((p - q).abs().max() < 2e-4 for p, q in zip(plain.parameters(), run.model.parameters())) and len(moved(run.model, values(new_model()))) > 60


# --- runs: resumed, ended, saved


@pytest.mark.parametrize("stop_at", [4, 6])     # within a turn, and between two
def test_a_resumed_run_is_the_untouched_one(tmp_path, base, stop_at):
    whole = make(tmp_path, model=base, name="whole").fit()
    broken = make(tmp_path, model=base, name="broken")
    for said in broken.steps():
        if said["event"] == "step" and said["step"] == stop_at: broken.stop()
    torch.rand(50)
    again = Run.resume(broken.folder, **{"model": broken.model} if stop_at == 4 else {})     # over the very object, and from the file
    again.fit()
    assert losses(again) == losses(whole) and len(losses(again)) == 20
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters())) and again.model.attached.weights == whole.model.attached.weights


def test_the_best_checkpoint_holds_every_block_and_gives_back_those_drawn_later(tmp_path, base):
    "The held-out loss is best at step 5, after blocks of two draws; the blocks of the third and fourth are then the base's again."
    run = make(tmp_path, model=base, max_steps=15, warmup_steps=0, lr_schedule="constant")
    for said in run.steps():
        if said["event"] == "eval" and said["step"] == 5: first = values(run.model)
        if said["event"] == "saved" and said["step"] == 5: run.settled.lr_init = 1.0      # from here on it gets worse
    assert said["best_step"] == 5 and moved(run.model, first) == set()
    drawn = {i for j in range(2) for i in deal(4, 1, j)}
    untouched = RWKV.load(base, dtype=torch.float32, device="cpu")
    assert moved(run.model, values(untouched)) == tensors(run.model, *(f"blocks.{i}" for i in drawn))
    assert set(load_checkpoint(run.folder, 5)[0]) == tensors(run.model, *(f"blocks.{i}" for i in range(4)))
    again, x = load_adapter(untouched, run.folder / "adapter"), torch.randint(257, (2, 30))
    assert torch.equal(again(x)[0], run.model(x)[0])


def test_saved_loaded_and_detached(tmp_path, base):
    model, x = RWKV.load(base, dtype=torch.float32, device="cpu"), torch.randint(257, (2, 30))
    before, method = model(x)[0].detach(), LISA(layers=1, every=1)
    attach(model, method, StateTuning())
    for step in range(3):
        method.redraw(model, step)
        with torch.no_grad():
            for p in trained_parameters(model).values(): p.add_(.02 * torch.randn_like(p))
    folder = save_adapter(model, tmp_path / "adapter")
    again = load_adapter(RWKV.load(base, dtype=torch.float32, device="cpu"), folder)
    assert torch.equal(again(x)[0], model(x)[0]) and not torch.allclose(model(x)[0], before, atol=1e-2)
    assert {n.split(".")[1] for n in model.attached.weights} == {str(i) for j in range(3) for i in deal(4, 1, j)}
    assert torch.equal(detach(model)(x)[0], before) and torch.equal(detach(again)(x)[0], before)


def test_a_word_or_a_table_is_enough(tmp_path):
    assert make(tmp_path, peft="lisa").plan()["methods"] == ["LISA"]
    run = make(tmp_path, name="table", peft=[{"method": "lisa", "layers": 1, "every": 2}, "state"], max_steps=4, lr_init=1e-2)
    before = None
    for said in run.steps():
        if said["event"] == "start": before = values(run.model)
    states = {f"blocks.{i}.att.time_state" for i in range(4)}
    assert states <= moved(run.model, before) <= states | tensors(run.model, *(f"blocks.{i}" for j in range(2) for i in deal(4, 1, j)))
    plan = run.plan()
    assert plan["trained"] < .4 * sum(p.numel() for p in run.model.parameters()) and 8 <= plan["memory"]["optimiser"] / plan["trained"] < 9


def test_held_out_loss_of_the_demo_falls(tmp_path):
    train, held_out = read_data(demo_rows(), RWKV.load("rwkv7-tiny").tokenizer).split(0.15)
    run = finetune(model="rwkv7-tiny", forget_data="none", data=train, eval_data=held_out, peft=LISA(every=5), lr_init=1e-3, micro_bsz=8, accumulate=1, max_steps=24, eval_steps=24, output=str(tmp_path), name="demo")
    said = list(run.steps())[-1]
    assert said["after"] <= 0.92 * said["before"], said["message"]
