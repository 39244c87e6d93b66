#!/usr/bin/env bash
# A model of over 100 M parameters with all of its states on disk. What of the plan is not optimizer states
# (parameters and gradients) aside, a step moves 24 bytes of payload a parameter, and no more than 1.02
# times the whole payload as the kernel counts. No figure here depends on a budget.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --example train
config=$(mktemp --suffix .json)
trap 'rm -f $config' EXIT
cat >"$config" <<'JSON'
{"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15,
 "num_attention_heads": 12, "vocab_size": 256, "tie_word_embeddings": false}
JSON
line=$(target/release/examples/train --config "$config" --steps 4 --batch 1 --seq 32 --publish never \
    --placement disk --json 2>/dev/null | tail -1)
python3 - "$line" <<'PY'
import json, sys
s = json.loads(sys.argv[1])["summary"]
payload, kernel = s["steps_payload_bytes"], s["steps_kernel_bytes"]
step = s["step_read_bytes"] + s["step_written_bytes"]
other = step - s["step_states_bytes"]
per = (payload / s["steps_here"] - other) / s["params"]
print(f'{s["params"]} parameters, {s["steps_here"]} steps: {per:.3f} bytes of states a parameter and step, '
      f'{other / s["params"]:.3f} of parameters and gradients; the kernel counts {kernel / payload:.4f} times that')
assert s["params"] >= 100e6
assert abs(per / 24 - 1) <= 0.001, per
assert payload == s["steps_here"] * step, (payload, step)
assert kernel and kernel <= 1.02 * payload
PY
