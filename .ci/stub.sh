#!/usr/bin/env bash
# The cuda device with no GPU, on the stub of CUDA (tests/stub): the kernels' own tests, then whole training
# runs that elsewhere run on the host device, under some seeds. The stub has the names of CUDA 13's libraries
# and no others. SEEDS and more time find more.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${SEEDS:-20}

cargo build -q -p forebay-cuda-stub
library=$(realpath "${CARGO_TARGET_DIR:-target}/debug/libforebay_cuda_stub.so")
names=$(mktemp -d)
trap 'rm -rf "$names"' EXIT
for name in libcuda.so.1 libnvrtc.so.13 libcublasLt.so.13; do
    ln -s "$library" "$names/$name"
done

FOREBAY_STUB_SEEDS=$seeds cargo test -q -p forebay --lib stub_of_cuda
export LD_LIBRARY_PATH=$names FOREBAY_KERNELS=$names/kernels FOREBAY_REQUIRE_GPU=1 FOREBAY_DEVICE=cuda
FOREBAY_STUB_MEMORY=$((1 << 30)) cargo test -q -p forebay-kernels --test cuda
for seed in 1 $((RANDOM + 2)); do
    echo "seed $seed"
    FOREBAY_STUB_SEED=$seed cargo test -q -p forebay --test bits --test combinations --test optimizers --test parity --test faults
done
