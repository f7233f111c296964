"Started by test_quant.py in a process of its own: LoRA over nf4 under DeepSpeed ZeRO-3, one process on the CPU, beside the same steps without it. Prints a JSON object."
import json
import os
import torch

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
import deepspeed
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from rwkv_peft import LoRA, RWKV, attach
from rwkv_peft.model.quant import quantize

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False          # would be compiled at first use


def model():
    torch.manual_seed(0)
    return quantize(attach(RWKV.load("rwkv7-tiny", device="cpu", dtype=torch.float32), LoRA(r=4)), "nf4")


def trained(model): return [p for p in model.parameters() if p.requires_grad]


def steps(model, optimiser, backward, tokens=torch.tensor([[0, *range(60, 92)]])):
    losses = []
    for _ in range(4):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0] / 32
        backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


plain = model()
before = {name: x.clone() for name, x in plain.state_dict().items() if ".storage." in name}
expected = steps(plain, torch.optim.AdamW(trained(plain), lr=4e-3), lambda loss: (loss.backward(), torch.nn.utils.clip_grad_norm_(trained(plain), 1.0)))

plugin = DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=1, gradient_clipping=1.0, zero3_init_flag=False, zero3_save_16bit_model=True)
plugin.deepspeed_config.update(zero_force_ds_cpu_optimizer=False, zero_allow_untested_optimizer=True, train_micro_batch_size_per_gpu=1)
plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
split = model()
engine, optimiser = accelerator.prepare(split, torch.optim.AdamW(trained(split), lr=4e-3))
sizes = [p.numel() for name, p in split.named_parameters() if ".storage." in name]
losses = steps(engine, optimiser, accelerator.backward)
sizes += [p.numel() for name, p in split.named_parameters() if ".storage." in name]
saved = accelerator.get_state_dict(engine)
print(json.dumps({"expected": expected, "losses": losses, "left": sum(sizes), "parts": len(sizes) // 2, "exact": all(torch.equal(saved[name], x) for name, x in before.items())}))
torch.distributed.destroy_process_group()
