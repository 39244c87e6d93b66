#!/usr/bin/env bash
# Goes on looking for faults with fresh seeds and real kills, for as many seconds as are given (one
# hour by default): the simulated disk, training over it, kill -9, the kernel's own failures, and at
# the end, with time left for it, the planted defects. Prints what was done; stops at the first
# failure, with what repeats it.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-3600}
end=$((SECONDS + seconds))
export FOREBAY_CI=1
log=$(mktemp)
trap 'rm -f $log' EXIT
seeds=0 cuts=0 kills=0 faults=0 kernels=0 combinations=0 rounds=0

check() { # a command that must pass
    if ! "$@" >"$log" 2>&1; then
        tail -40 "$log"
        echo "FAILED after $seeds seeds, $kills kills: FOREBAY_SIM_FIRST=${FOREBAY_SIM_FIRST:-} $*"
        exit 1
    fi
}
number() { # sums the numbers that stand before a word in the log
    grep -oE "[0-9]+ $1" "$log" | awk '{n += $1} END {print n + 0}'
}

bash .ci/tools.sh
cargo test --release --workspace --no-run 2>/dev/null
while ((SECONDS < end)); do
    rounds=$((rounds + 1))
    export FOREBAY_SIM_FIRST=$((RANDOM * 32768 * 1000 + RANDOM * 1000)) FOREBAY_SIM_SEEDS=1000
    check cargo test --release -p forebay-nvme --test faults -- --nocapture
    seeds=$((seeds + $(number seeds,))) cuts=$((cuts + $(number "power cuts")))
    ((SECONDS < end)) || break
    FOREBAY_KILL_ROUNDS=200 check cargo test --release --test kill -- --nocapture
    kills=$((kills + $(number kills,)))
    ((SECONDS < end)) || break
    FOREBAY_FAULT_STRIDE=1 check cargo test --release --test faults -- --nocapture
    faults=$((faults + $(number errors,) + $(number "without harm")))
    ((SECONDS < end)) || break
    check cargo test --release -p forebay-nvme --test kernel -- --test-threads=1
    kernels=$((kernels + 1))
    ((SECONDS < end)) || break
    FOREBAY_COMBINATIONS=300 FOREBAY_COMBINATIONS_SEED=$FOREBAY_SIM_FIRST check cargo test --release --test combinations
    combinations=$((combinations + 300))
    echo "$((SECONDS / 60)) min: $seeds seeds, $cuts power cuts, $faults single faults in training, $kills kills, $kernels kernel rounds, $combinations combinations"
done
echo "$SECONDS s, $rounds rounds: $seeds seeds of all faults, $cuts power cuts, $faults single faults in a training run, $kills kill -9, $kernels rounds of kernel faults, $combinations combinations of settings; no wrong byte, no hang"
