#!/usr/bin/env bash
# No lint fires, in any target of any crate.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo clippy --workspace --all-targets -- -D warnings
cargo clippy -p forebay-nvme --all-targets --all-features -- -D warnings
