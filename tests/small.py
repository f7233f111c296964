"A small RWKV-7 whose every tensor says something, and what the tests of methods do with it."
import torch

from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.peft.adapters import trained_parameters

SIZES = dict(n_layer=3, n_embd=32, head_size=8, vocab_size=31, dim_ffn=80, w_rank=4, a_rank=4, v_rank=4, g_rank=8)


def new_model(seed=0, dtype=torch.float32):
    "Every tensor is random and not zero."
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(**SIZES))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.15 * torch.randn_like(p))
        model.emb.weight.normal_()
    return model.to(dtype)


def rows(batch=2, length=17, seed=1): return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))
def loss_of(model, x, **kwargs): return model(x[:, :-1], targets=x[:, 1:], **kwargs)[0]
def rel(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


def stir(model, scale=0.05):
    "Gives every trained tensor a value of its own, so that a mistake in any of them shows."
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trained_parameters(model).values(): p.add_(scale * torch.randn_like(p))
    return model


def steps(model, n=3, lr=1e-2):
    optimiser = torch.optim.AdamW(trained_parameters(model).values(), lr=lr, weight_decay=0.01)
    for i in range(n):
        optimiser.zero_grad()
        loss_of(model, rows(seed=i)).backward()
        optimiser.step()
