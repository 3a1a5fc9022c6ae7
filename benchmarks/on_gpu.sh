#!/usr/bin/env bash
# What is to be measured on a GPU: tests, the table of `auto`, attention, encoders, memory. Nobody has timed it on one;
# each part is meant to take less than ten minutes, most of it for compiling.
#
#     bash benchmarks/on_gpu.sh                       # everything, on CUDA
#     bash benchmarks/on_gpu.sh cuda tests table      # some parts: tests table attention flex encoder memory
#     SMALL=1 bash benchmarks/on_gpu.sh cpu           # tries the commands on a CPU, on small pages; proves nothing
#
# Results land in benchmarks/results/ and, for `auto`, in sfa_adapters/backend_times.json. A command that fails is named
# at the end, and the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${1:-cuda}
dtype=bfloat16 grids=(32 48 72x80 96x128) towers=(internvit siglip qwen3_vl qwen3_vl_large) rounds=20
# CPUs are very slow at bf16 with gradients.
if [[ -n ${SMALL:-} ]]; then dtype=float32 grids=(8) towers=(internvit) rounds=1; fi
parts=("${@:2}")
if ((${#parts[@]} == 0)); then parts=(tests table attention flex encoder memory); fi
failed=()
run() { echo "== $*"; "$@" || failed+=("$*"); }
attention=(python -m benchmarks.attention --device "$device" --dtypes "$dtype" --grids "${grids[@]}" --rounds "$rounds")

for part in "${parts[@]}"; do
  case $part in
    tests) run python -m pytest -q -m gpu tests ;;
    table) [[ -n ${SMALL:-} ]] || run python -m benchmarks.attention --device "$device" --write-table ;;
    attention)
      run "${attention[@]}" --widths 64 72 80 --candidates folded blocked triton dense auto
      run "${attention[@]}" --terms row,col,dist,block --candidates folded blocked triton dense auto ;;
    flex) run "${attention[@]}" --widths 72 --terms row,col --prefix 0 --candidates triton flex ;;
    encoder)
      for tower in "${towers[@]}"; do
        run python -m benchmarks.encoder --device "$device" --tower "$tower" --layers 2 --terms row,col \
          --dtypes "$dtype" --candidates folded triton dense auto --rounds "$rounds"
      done ;;
    memory) [[ -n ${SMALL:-} ]] || run python -m benchmarks.attention_memory --device "$device" --dtype bfloat16 \
      --candidates folded blocked triton dense ;;
    *) echo "There is no part $part: tests table attention flex encoder memory." >&2; exit 2 ;;
  esac
done
if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; fi
