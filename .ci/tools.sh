#!/usr/bin/env bash
# What the checks need beside Rust and gcc, on a machine that may be new.
set -euo pipefail
# A file system that shares blocks, for snapshots.
command -v mkfs.xfs >/dev/null || { apt-get update -qq && apt-get install -y -qq xfsprogs; } >/dev/null
