#!/usr/bin/env bash
# The stated Rust version is that of the toolchain in use.
set -euo pipefail
cd "$(dirname "$0")/.."
stated=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rustc --version | grep -q "^rustc $stated\." || { echo "Cargo.toml says $stated, this is $(rustc --version)"; exit 1; }
