#!/usr/bin/env bash
# The documentation builds without warnings.
set -euo pipefail
cd "$(dirname "$0")/.."
RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps
