#!/usr/bin/env bash
# The disk tier under faults, about ten minutes: 2,000 seeds of the simulated disk with all faults and
# as many power cuts, one fault at every operation of a training run, the kernel's own failures, ten
# thousand openings, the async face.
set -euo pipefail
cd "$(dirname "$0")/.."
export FOREBAY_CI=1
bash .ci/tools.sh
FOREBAY_SIM_SEEDS=2000 cargo test --release -p forebay-nvme --test faults -- --nocapture
FOREBAY_FAULT_STRIDE=1 cargo test --release --test faults -- --nocapture
cargo test --release -p forebay-nvme --test kernel -- --test-threads=1
FOREBAY_CYCLES=10000 cargo test --release -p forebay-nvme --test lifetimes -- --nocapture ten_thousand
cargo test --release -p forebay-nvme --features tokio-uring --test aio
