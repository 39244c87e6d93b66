#!/usr/bin/env bash
# 200 real kills at random instants, each resumed on the bits of the whole run.
set -euo pipefail
cd "$(dirname "$0")/.."
FOREBAY_KILL_ROUNDS=${FOREBAY_KILL_ROUNDS:-200} cargo test --release --test kill -- --nocapture
