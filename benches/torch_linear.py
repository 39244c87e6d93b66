"""The outside referee of `forebay bench kernels`: PyTorch's own matrix products in bf16, of the shapes of a training
step of preset 1.3b (8192 tokens).

    python3 benches/torch_linear.py [--tokens 8192] [--launches 30] [--rounds 5]

Prints one JSON line a shape: microseconds and TFLOP/s (medians of rounds) of y = x w', dx = dy w and dw = dy' x. The
gradient of the weight leaves in fp32 where this PyTorch can do so, as ours does, and else in bf16.
"""

import argparse
import json

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=8192)
parser.add_argument("--launches", type=int, default=30)
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()


def microseconds(work):
    for _ in range(3):
        work()
    rounds = []
    for _ in range(args.rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(args.launches):
            work()
        end.record()
        torch.cuda.synchronize()
        rounds.append(1e3 * start.elapsed_time(end) / args.launches)
    return sorted(rounds)[len(rounds) // 2]


def random(rows, columns):
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def gradient(dy, x):
    try:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    except TypeError:
        return torch.mm(dy.t(), x)


for inputs, outputs in [(2048, 2048), (2048, 5504), (5504, 2048)]:
    x, w, dy = random(args.tokens, inputs), random(outputs, inputs), random(args.tokens, outputs)
    flops = 2 * args.tokens * inputs * outputs
    line = {"torch": torch.__version__, "linear": f"{args.tokens} x {outputs} x {inputs}"}
    for name, work in [
        ("linear", lambda: torch.mm(x, w.t())),
        ("linear dx", lambda: torch.mm(dy, w)),
        ("linear dw", lambda: gradient(dy, x)),
    ]:
        us = microseconds(work)
        line[name] = {"us": round(us, 1), "tflops": round(flops / us / 1e6, 1)}
    line["dw_in"] = str(gradient(dy, x).dtype)
    print(json.dumps(line), flush=True)
