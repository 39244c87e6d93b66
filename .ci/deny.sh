#!/usr/bin/env bash
# Dependencies: licences, sources, bans.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/target/ci-tools/bin:$PATH"
command -v cargo-deny >/dev/null || cargo install cargo-deny --version 0.20.2 --locked --root target/ci-tools
cargo deny check bans licenses sources
