#!/usr/bin/env bash
# The README's main command, in full: exit 0, under two minutes of training, and it learns.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp)
trap "rm -f $out" EXIT
cargo build --release --example train
start=$SECONDS
cargo run --release --example train -- --json >"$out"
took=$((SECONDS - start))
python3 - "$out" "$took" <<"PY"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
summary = lines.pop()["summary"]
losses = [line["loss"] for line in lines]
last = sum(losses[-10:]) / 10
before = sum(losses[-60:-50]) / 10
print(f"{len(losses)} steps in {sys.argv[2]} s, last ten {last:.4f}, fifty steps before {before:.4f}, "
      f"single bytes {summary['unigram_entropy']:.4f}")
assert last < summary["unigram_entropy"], "no better than single bytes"
assert last < before, "no longer falling"
assert int(sys.argv[2]) < 120, "too slow"
for tier in "device", "pinned":
    assert summary[f"{tier}_peak_bytes"] <= summary[f"{tier}_budget_bytes"], tier
PY
