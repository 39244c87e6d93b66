#!/usr/bin/env bash
# The disk tier under AddressSanitizer: no buffer is used after it was given back, whatever is dropped,
# cancelled, timed out or panics with I/O in flight.
set -euo pipefail
cd "$(dirname "$0")/.."
# Leaks are part of it: memory that a disk may still touch is given up on purpose.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0
export CARGO_TARGET_DIR=target/asan FOREBAY_SIM_SEEDS=${FOREBAY_SIM_SEEDS:-40}
# The sanitizer makes mlock do nothing and keeps freed memory for a while, and starts too slowly to be
# killed in time: those are tested
# elsewhere.
cargo test -p forebay-nvme --target x86_64-unknown-linux-gnu --tests -- --skip memlock --skip ten_thousand --skip killed
