#!/usr/bin/env bash
# A model of over 100 M parameters with its optimizer states on disk and everything else in memory: 24
# bytes of payload a parameter and step, and no more than 1.02 times that as the kernel counts.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --example train
config=$(mktemp --suffix .json)
trap 'rm -f $config' EXIT
cat >"$config" <<'JSON'
{"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15,
 "num_attention_heads": 12, "vocab_size": 256, "tie_word_embeddings": false}
JSON
run() { # steps, pinned budget
    target/release/examples/train --config "$config" --steps "$1" --batch 1 --seq 32 --publish never \
        --gpu-budget 489500000 --pinned-budget "$2" --json 2>/dev/null | tail -1
}
# At these budgets parameters stay on the device and gradients in pinned memory, with the states of one norm
# besides; with more the device would keep states too.
line=$(run 4 452MiB)
python3 - "$line" <<'PY'
import json, sys
s = json.loads(sys.argv[1])["summary"]
payload, kernel = s["steps_payload_bytes"], s["steps_kernel_bytes"]
per = payload / s["steps_here"] / s["params"]
print(f'{s["params"]} parameters, {s["steps_here"]} steps: {per:.3f} bytes of payload a parameter and step, '
      f'the kernel counts {kernel / payload:.4f} times that')
assert s["params"] >= 100e6
step = s["step_read_bytes"] + s["step_written_bytes"]
assert 23.999 * s["params"] < step <= 24 * s["params"], step
assert payload == s["steps_here"] * step, (payload, step)
assert kernel and kernel <= 1.02 * payload
PY
