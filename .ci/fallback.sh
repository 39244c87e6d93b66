#!/usr/bin/env bash
# The disk tier on its thread pool, as where io_uring is refused.
set -euo pipefail
cd "$(dirname "$0")/.."
FOREBAY_IO=threads cargo test -p forebay-nvme
FOREBAY_IO=threads cargo test --test bits
