#!/usr/bin/env bash
# What is to be measured on a GPU, in one call of under ten minutes: tests, the table of `auto`, attention, encoders.
#
#     bash benchmarks/on_gpu.sh              # on CUDA
#     SMALL=1 bash benchmarks/on_gpu.sh cpu  # tries every command on a CPU, on small pages; takes minutes, proves nothing
#
# Results land in benchmarks/results/ and, for `auto`, in sfa_adapters/backend_times.json. A part that fails is named at
# the end, and the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${1:-cuda}
dtype=bfloat16 grids=(32 48 72x80 96x128) towers=(internvit siglip qwen3_vl qwen3_vl_large) rounds=20
# CPUs are very slow at bf16 with gradients.
if [[ -n ${SMALL:-} ]]; then dtype=float32 grids=(8) towers=(internvit) rounds=1; fi
failed=()
run() { echo "== $*"; "$@" || failed+=("$*"); }

run python -m pytest -q -m gpu tests
[[ -n ${SMALL:-} ]] || run python -m benchmarks.attention --device "$device" --write-table
run python -m benchmarks.attention --device "$device" --dtypes "$dtype" --grids "${grids[@]}" --widths 64 72 80 \
  --rounds "$rounds" --candidates folded blocked triton dense flex auto
run python -m benchmarks.attention --device "$device" --dtypes "$dtype" --grids "${grids[@]}" --widths 64 \
  --terms row,col,dist,block --rounds "$rounds" --candidates folded blocked triton dense auto
for tower in "${towers[@]}"; do
  run python -m benchmarks.encoder --device "$device" --tower "$tower" --layers 2 --terms row,col --dtypes "$dtype" \
    --candidates folded triton dense auto --rounds "$rounds"
done
[[ -n ${SMALL:-} ]] || run python -m benchmarks.attention_memory --device "$device" --dtype bfloat16 \
  --candidates folded blocked triton dense
if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; fi
