"RWKV-PEFT's RWKV-6 training step in shapes, as a reader of its source finds it: plain modules in bf16, logits in full, ZeRO stage 1 on one GPU. Nothing here computes; `live_peak` counts."
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rwkv_peft.train.plan import Live

HALF, FULL = torch.bfloat16, torch.float32


def empty(*shape, dtype=HALF): return torch.empty(*shape, dtype=dtype, device="meta")
def weight(*shape, trains=False): return nn.Parameter(empty(*shape), requires_grad=trains)


class Matrix(nn.Module):
    "A frozen matrix, kept as it is or as bytes, and a LoRA pair beside it. A packed one is unpacked for the product, and autograd keeps what was unpacked."

    def __init__(self, wide, high, rank, packed):
        super().__init__()
        self.shape = high, wide
        if packed == "int8": self.bytes, self.scale = empty(wide * high, dtype=torch.uint8), empty(1, dtype=FULL)
        elif packed == "nf4": self.bytes, self.scale = empty(wide * high // 2, dtype=torch.uint8), empty(wide * high // 64, dtype=FULL)
        else: self.weight = weight(high, wide)
        self.packed = packed
        self.pair = nn.ParameterList([weight(rank, wide, trains=True), weight(high, rank, trains=True)] if rank else [])

    def forward(self, x):
        y = F.linear(x, empty(*self.shape) if self.packed else self.weight)
        return y + F.linear(F.linear(x, self.pair[0]), self.pair[1]) * 1.0 if len(self.pair) else y


class Recurrence(torch.autograd.Function):
    "The CUDA operator: keeps r, k, v, u and the decay in fp32."

    @staticmethod
    def forward(ctx, r, k, v, w, u, state):
        decay = (-torch.exp(w.float())).contiguous()
        ctx.save_for_backward(r, k, v, decay, u)
        ctx.state = None if state is None else state.shape
        return torch.empty_like(r)

    @staticmethod
    def backward(ctx, gradient):
        r, k, v, decay, u = ctx.saved_tensors
        return *(torch.empty_like(r) for _ in range(4)), torch.empty_like(u), None if ctx.state is None else empty(*ctx.state)


def shifted(x): return F.pad(x, (0, 0, 1, -1)) - x


class TimeMix(nn.Module):
    def __init__(self, C, rank, packed, time, state):
        super().__init__()
        mix, decay = (64, 128) if C == 4096 else (32, 64)
        small = lambda *shape: weight(*shape, trains=time)
        self.maa = nn.ParameterList(small(1, 1, C) for _ in range(6))
        self.mix1, self.mix2, self.decay, self.decay1, self.decay2, self.bonus = small(C, 5 * mix), small(5, mix, C), small(1, 1, C), small(C, decay), small(decay, C), small(C // 64, 64)
        self.state = weight(C // 64, 64, 64, trains=True) if state else None
        self.receptance, self.key, self.value, self.gate, self.output = (Matrix(C, C, rank, packed) for _ in range(5))
        self.norm = nn.ParameterList([small(C), small(C)])

    def forward(self, x):
        B, T, C = x.shape
        step = shifted(x)
        inner = torch.tanh((x + step * self.maa[0]) @ self.mix1).view(B * T, 5, -1).transpose(0, 1)
        w, k, v, r, g = (x + step * (share + m) for share, m in zip(self.maa[1:], torch.bmm(inner, self.mix2).view(5, B, T, C).unbind(0)))
        r, k, v, g = self.receptance(r), self.key(k), self.value(v), F.silu(self.gate(g))
        y = Recurrence.apply(r, k, v, self.decay + torch.tanh(w @ self.decay1) @ self.decay2, self.bonus, self.state)
        return self.output(F.group_norm(y.view(B * T, C), C // 64, *self.norm).view(B, T, C) * g)


class ChannelMix(nn.Module):
    def __init__(self, C, rank, packed, time):
        super().__init__()
        wide = int(C * 3.5) // 32 * 32
        self.maa = nn.ParameterList(weight(1, 1, C, trains=time) for _ in range(2))
        self.key, self.receptance, self.value = Matrix(C, wide, rank, packed), Matrix(C, C, rank, packed), Matrix(wide, C, rank, packed)

    def forward(self, x):
        step = shifted(x)
        k = torch.relu(self.key(x + step * self.maa[0])) ** 2
        return torch.sigmoid(self.receptance(x + step * self.maa[1])) * self.value(k)


class Block(nn.Module):
    def __init__(self, C, rank, packed, time, state):
        super().__init__()
        self.norms = nn.ParameterList(weight(C, trains=time) for _ in range(4))
        self.att, self.ffn = TimeMix(C, rank, packed, time, state), ChannelMix(C, rank, packed, time)

    def forward(self, x):
        x = x + self.att(F.layer_norm(x, x.shape[-1:], *self.norms[:2]))
        return x + self.ffn(F.layer_norm(x, x.shape[-1:], *self.norms[2:]))


class Wrap(torch.autograd.Function):
    "The penalty on the largest logits: its gradient is as large as the logits."

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        logits, = ctx.saved_tensors
        most, where = logits.max(-1, keepdim=True)
        return gradient, torch.zeros_like(logits).scatter_(-1, where, most * 1e-4)


def live_peaks(layers, C, rank=0, packed=None, time=False, state=False, T=1024, V=65536):
    "The highest counts of live bytes in the phases of two steps."
    with Live() as live:
        emb, head, last = weight(V, C), weight(V, C), nn.ParameterList(weight(C, trains=time) for _ in range(2))
        blocks = nn.ModuleList(Block(C, rank, packed, time, state) for _ in range(layers))
        trained = [p for p in (*blocks.parameters(), *last) if p.requires_grad]
        masters = [empty(sum(p.numel() for p in trained), dtype=FULL) for _ in range(3)]      # of ZeRO: the numbers and their moments
        tokens = torch.empty(1, T, dtype=torch.int64, device="meta")
        for _ in range(2):
            live.enter("forward")
            x = F.embedding(tokens, emb)
            for block in blocks: x = checkpoint(block, x, use_reentrant=False)
            live.enter("loss")
            logits = F.linear(F.layer_norm(x, (C,), *last), head)
            loss = Wrap.apply(F.cross_entropy(logits.view(-1, V), tokens.view(-1)), logits)
            del logits, x
            live.enter("backward")
            loss.backward()
            live.enter("step")
            flat = torch.cat([p.grad.view(-1) for p in trained])      # ZeRO: gradients in one piece, in fp32, and clipped
            wide = flat.float()
            clipped = wide * 1.0
            del flat, wide, clipped, loss
            for p in trained: p.grad = None
        assert masters
    return live.peaks


def live_peak(layers, *args, **kwargs):
    "The highest count of live bytes for any number of layers, from two and four of them; every phase grows in a line."
    short, long = (live_peaks(n, *args, **kwargs) for n in (2, 4))
    return max(short[k] + (long[k] - short[k]) * (layers - 2) / 2 for k in short)
