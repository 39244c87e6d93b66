#!/usr/bin/env bash
# Every CUDA source compiles for the oldest and the main architecture, and no kernel spills registers.
# Compiled as the runtime does (kernels/src/cuda/compile.rs): common.cuh in front, no header of CUDA's.
# The compiler comes as Python packages (about 200 MB, once); no GPU is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$PWD/target/cuda13 cu=kernels/src/cuda/cu
bin=$dir/nvidia/cu13/bin
[[ -x $bin/ptxas && -x $bin/nvcc ]] || python3 -m pip install -q --no-deps --target "$dir" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# build NAME ARCH FUSE TEXT...: leaves a line "arch kernel registers shared spills" for each kernel in the table.
build() {
    local name=$1 arch=$2 fuse=$3 options=(-std=c++17 "-arch=$2" -cubin -Xptxas -v)
    shift 3
    [[ $fuse == true ]] || options+=(--fmad=false)
    local text=$out/$arch-$name.cu log=$out/$arch-$name.log
    cat $cu/common.cuh "$@" "$cu/$name.cu" >"$text"
    "$bin/nvcc" "${options[@]}" -o "$out/$name.$arch" "$text" >"$log" 2>&1 ||
        { cat "$log"; echo "$name.cu does not compile for $arch"; exit 1; }
    awk -v arch="$arch" '
        /Function properties for/ { kernel = $NF }
        /spill stores/ { for (i = 1; i < NF; i++) if ($(i + 2) == "spill" && $(i + 3) ~ /^stores/) spills = $i }
        /Used [0-9]+ registers/ {
            shared = 0
            for (i = 1; i < NF; i++) {
                if ($i == "Used") registers = $(i + 1)
                if ($(i + 2) ~ /^smem/) shared = $i
            }
            if (kernel != "") print arch, kernel, registers, shared, spills
            kernel = ""
        }' "$log" >>"$out/table-$arch"
}

# The names and whether products and sums may be fused, as the crate has them.
sources=$(grep -oE 'source!\("[a-z_]+", (true|false)\)' kernels/src/cuda/kernels.rs | tr -d '(),"' | sed 's/source!//')
every() {
    local name fuse
    while read -r name fuse; do build "$name" "$1" "$fuse"; done <<<"$sources"
    for name in attention_mma attention_mma_f16; do
        build $name "$1" true $cu/mma.cuh $cu/attention_mma.cuh
    done
}
every sm_80 &
every sm_90
wait $!
built=$(($(wc -l <<<"$sources") + 2)) there=$(find $cu -name '*.cu' | wc -l)
((built == there)) || { echo "$there sources in $cu, $built of them compiled"; exit 1; }

printf '%-6s %-34s %9s %7s %7s\n' arch kernel registers shared spills
sort -k2,2 -k1,1 "$out"/table-* | while read -r arch kernel registers shared spills; do
    printf '%-6s %-34s %9s %7s %7s\n' "$arch" "$kernel" "$registers" "$shared" "$spills"
done
awk '$5 != 0 { print $2 " spills " $5 " bytes on " $1; bad = 1 } END { exit bad }' "$out"/table-*
