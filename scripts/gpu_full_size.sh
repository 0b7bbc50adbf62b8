#!/usr/bin/env bash
# Full size on a GPU, in one go: machine, a layer's parts, kernels, whole conversions.
# Usage: scripts/gpu_full_size.sh STEP...   (machine parts trace two four eight experts whole rtn oom)
# Sources go to a memory file system, results to out/; every step has a time limit of its own, and
# all together TOTAL_SECONDS: a step that has less left than it may take gets what is left.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
memory="${MEMORY_DIR:-/dev/shm}"
mkdir -p out
step() { printf '\n## %s\n' "$*"; }
limit() {
    local seconds="$1" left=$((${TOTAL_SECONDS:-565} - SECONDS))
    shift
    if ((left < 20)); then
        echo "NO TIME LEFT: $*"
        return
    fi
    ((seconds > left)) && seconds="$left"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 || echo "FAILED ($?): $*"
}
bench() {
    local seconds="$1"
    shift
    limit "$seconds" python3 scripts/bench_full_size.py --source-root "$memory" "$@"
    rm -rf out/bench-*
}

for name in "$@"; do
    step "$name $(date -u +%H:%M:%S)"
    case "$name" in
        machine)
            nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
            df -h . "$memory" | tail -2
            limit 100 python3 scripts/bench_machine.py --disk out ;;
        parts) bench 150 --layers 2 --profile --no-verify ;;
        trace) bench 120 --layers 2 --trace --no-verify ;;
        two) bench 100 --layers 2 ;;
        smoke) bench 70 --layers 2 ;;
        four) bench 150 --layers 4 ;;
        eight) bench 200 --layers 8 ;;
        uncorrected) bench 120 --layers 4 --no-correction ;;
        rtn4) bench 60 --layers 4 --method rtn ;;
        experts) for n in 64 128 512; do bench 90 --layers 2 --experts "$n"; done ;;
        whole) bench "${WHOLE_SECONDS:-560}" --source "$memory/whole" ;;
        rtn) bench 180 --source "$memory/whole" --method rtn ;;
        oom) limit 80 python3 -m pytest -q -n 0 -p no:cacheprovider tests/stages/test_on_a_gpu.py ;;
        drop) rm -rf "$memory/whole" ;;
        *) echo "unknown step $name" ;;
    esac
done
