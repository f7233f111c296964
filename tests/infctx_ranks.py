"""Started by test_infctx.py, as one process or as two: the gradients of rows read in pieces under DDP and DeepSpeed's ZeRO, beside those of whole rows in a plain model.

Arguments: names of cases, `method storage how`. Rank 1 has a shorter row than rank 0, which fits into one piece. Prints a JSON object, case -> the largest relative error of any gradient."""
import json
import os
import sys
import torch

os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1")
import deepspeed
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_grad
from small import new_model, rel, stir
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from rwkv_peft import LoRA, MiSS, StateTuning, attach
from rwkv_peft.model.quant import quantize
from rwkv_peft.train.infctx import infctx

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False          # would be compiled at first use
RANK, WORLD, PIECE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 16
METHODS = {"lora": LoRA(r=4), "miss": MiSS(r=4), "state": StateTuning()}


def model(method, storage):
    made = new_model()
    if method == "full": return made.requires_grad_(True)
    return stir(quantize(attach(made, METHODS[method]), storage))


def batch(rank):
    g, T = torch.Generator().manual_seed(rank), (53, 11)[rank]
    ids, weights, resets = torch.randint(31, (2, T + 1), generator=g), torch.rand(2, T, generator=g), torch.zeros(2, T, dtype=torch.bool)
    weights[:, PIECE:2 * PIECE] = 0                                        # nothing is learnt in the second piece
    if T > PIECE: resets[0, PIECE] = resets[1, 20] = True
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=weights, resets=resets)


def trained(model): return {n: p for n, p in model.named_parameters() if p.requires_grad}


def plain(method, storage):
    "The mean over the ranks of the gradients of whole rows."
    whole = model(method, storage)
    sum(whole(**batch(rank))[0] for rank in range(WORLD)).div(WORLD).backward()
    return {n: p.grad for n, p in trained(whole).items()}


def prepared(method, storage, how):
    "(the wrapped model in pieces, its backward, how to read a gradient)"
    inner = infctx(model(method, storage), PIECE)
    if how == "plain": return inner, torch.Tensor.backward, lambda p: p.grad
    if how == "ddp": return DistributedDataParallel(inner), torch.Tensor.backward, lambda p: p.grad
    AcceleratorState._reset_state(True)
    plugin = DeepSpeedPlugin(zero_stage=int(how[-1]), gradient_accumulation_steps=1, gradient_clipping=1.0, zero3_init_flag=False, zero3_save_16bit_model=True)
    plugin.deepspeed_config.update(zero_force_ds_cpu_optimizer=False, zero_allow_untested_optimizer=True, train_micro_batch_size_per_gpu=1)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    engine, _ = accelerator.prepare(inner, torch.optim.AdamW(trained(inner).values(), lr=0.))
    return engine, engine.backward, safe_get_full_grad


def errors(method, storage, how):
    expected = plain(method, storage)
    wrapped, backward, gradient_of = prepared(method, storage, how)
    for again in range(2):                                                 # ZeRO-3 follows the order of modules that it saw in the first round
        backward(wrapped(**batch(RANK))[0])
        found = {n: gradient_of(p).clone() for n, p in trained(getattr(wrapped, "module", wrapped)).items()}
        if again or not how.startswith("zero"): break
        wrapped.step()
    assert set(found) == set(expected)
    return max(rel(found[n], expected[n]) for n in expected)


if not distributed.is_initialized(): distributed.init_process_group("gloo")
print(json.dumps({case: errors(*case.split()) for case in sys.argv[1:]}))
distributed.destroy_process_group()
