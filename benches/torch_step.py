"""The outside referee: a training step of the same Llama in PyTorch, resident on the GPU.

    python3 benches/torch_step.py [--preset 1.3b] [--batch 8] [--seq 1024] [--steps 8] [--compile]

bf16 weights with fp32 masters, SDPA, every layer checkpointed, fused AdamW, gradients clipped by their
global norm. Prints one JSON line: milliseconds a step (median), tokens a second, peak GiB.
"""

import argparse
import json
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SHAPES = {  # hidden, intermediate, layers, heads, tied: as examples/decoder/src/presets.rs
    "125m": (768, 2048, 12, 12, True),
    "350m": (1024, 2816, 24, 16, True),
    "1.3b": (2048, 5504, 24, 16, True),
    "3b": (3072, 8192, 26, 24, True),
    "7b": (4096, 11008, 32, 32, False),
}
VOCABULARY = 50304


class Layer(nn.Module):
    def __init__(self, hidden, inner, heads):
        super().__init__()
        self.heads = heads
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q, self.k, self.v, self.o = (linear(hidden, hidden) for _ in range(4))
        self.gate, self.up, self.down = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)

    def forward(self, x, cos, sin):
        b, t, h = x.shape
        normed = self.norm1(x)
        q, k, v = (p(normed).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))

        def rotate(y):
            y1, y2 = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-y2, y1), dim=-1) * sin

        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.o(out.transpose(1, 2).reshape(b, t, h))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    def __init__(self, hidden, inner, layers, heads, tied, seq):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Layer(hidden, inner, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        d = hidden // heads
        angles = torch.outer(torch.arange(seq), 10000.0 ** (-torch.arange(0, d, 2) / d))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos().bfloat16())
        self.register_buffer("sin", angles.sin().bfloat16())

    def forward(self, ids, targets):
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY).float(), targets.reshape(-1))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--preset", default="1.3b", choices=SHAPES)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--compile", action="store_true")
    a = p.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Llama(*SHAPES[a.preset], a.seq)
    for w in model.parameters():
        if w.dim() > 1:
            nn.init.normal_(w, std=0.02)
    weights = list(model.parameters())
    masters = [w.detach().float().clone() for w in weights]
    adam = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if a.compile:
        for i, layer in enumerate(model.layers):
            model.layers[i] = torch.compile(layer)
    ids = torch.randint(0, 256, (a.batch, a.seq + 1), device="cuda")
    times, losses = [], []
    for step in range(a.steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads = [w.grad for w in weights]
        for m, g in zip(masters, grads):
            m.grad = g.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        adam.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for w, m in zip(weights, masters):
            w.grad = m.grad = None
        losses.append(loss.item())
        if step >= 3:
            times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    print(json.dumps({
        "torch": torch.__version__, "preset": a.preset, "compiled": a.compile, "ms": median * 1e3,
        "tokens_per_s": a.batch * a.seq / median, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": [losses[0], losses[-1]],
    }))


main()
