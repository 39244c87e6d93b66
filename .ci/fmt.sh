#!/usr/bin/env bash
# The source is formatted.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
