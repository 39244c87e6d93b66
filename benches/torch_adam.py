"""The outside referee of `forebay bench adam`: PyTorch's fused AdamW on the CPU, with the casts that mixed
precision needs around it (gradient bf16 to fp32, parameter fp32 to bf16).

    python3 benches/torch_adam.py [--millions 1,16,134] [--rounds 7]

Prints one JSON line a size: parameters a second, medians.
"""

import argparse
import json
import time

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--millions", default="1,16,134")
parser.add_argument("--rounds", type=int, default=7)
args = parser.parse_args()

for millions in (int(m) for m in args.millions.split(",")):
    n = millions * 1_000_000
    master = torch.nn.Parameter(torch.full((n,), 0.02))
    master.grad = torch.zeros(n)
    grad = torch.full((n,), 1e-4, dtype=torch.bfloat16)
    param = torch.zeros(n, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([master], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        master.grad.copy_(grad)
        optimizer.step()
        param.copy_(master.detach())

    step()
    # A slice takes long enough that looking at the clock costs nothing.
    passes = max(1, 200_000_000 // n)
    rates = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        for _ in range(passes):
            step()
        rates.append(n * passes / (time.perf_counter() - start))
    rates.sort()
    rate = rates[len(rates) // 2]
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "parameters": n,
                      "params_per_s": rate}), flush=True)
