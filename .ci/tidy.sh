#!/usr/bin/env bash
# What a linter does not see: long files, leftovers, the direction of the crates, dependencies
# that no line of ARCHITECTURE.md explains.
set -euo pipefail
cd "$(dirname "$0")/.."
fail=0
complain() { echo "tidy: $*"; fail=1; }

while read -r file; do
    lines=$(wc -l <"$file")
    ((lines <= 650)) || complain "$file has $lines lines: what is it doing?"
done < <(git ls-files '*.rs' | grep -v '^tests/oracle/')

leftovers='todo!\(|unimplemented!\(|dbg!\(|FIXM[E]|XX[X]|#\[ignore'
! git grep -nE "$leftovers" -- '*.rs' || complain "leftovers"

# A crate names only crates to its left.
left=""
for crate in kernels pinned nvme; do
    names=$(grep -oE '^forebay[a-z-]*' "$crate/Cargo.toml" | sed 's/forebay-//' || true)
    for name in $names; do
        [[ " $left " == *" $name "* ]] || complain "$crate names $name, which is not to its left"
    done
    left="$left $crate"
done
! grep -qE '^forebay' prefetch/Cargo.toml || complain "prefetch names a crate of ours"
for crate in prefetch examples/decoder; do
    grep -q '^#!\[forbid(unsafe_code)\]' "$crate/src/lib.rs" || complain "$crate may hold unsafe code"
done

for name in $(sed -n '/^\[workspace.dependencies\]/,/^\[workspace.lints/s/^\([a-z][a-z0-9_-]*\) = .*/\1/p' Cargo.toml); do
    [[ $name == forebay* ]] || grep -q "\`$name\`" ARCHITECTURE.md || complain "$name: no line in ARCHITECTURE.md"
done
exit $fail
