#!/usr/bin/env bash
# The README's own test command.
set -euo pipefail
cd "$(dirname "$0")/.."
command=$(grep -m1 '^cargo test' README.md)
test "$command" = 'cargo test --workspace'
$command
