#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests marked gpu, the demo recipe, quality, benchmarks.
# Usage: scripts/gpu_run.sh [COMMIT]     in an environment that has the package's dependencies.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
step() { printf '\n## %s\n' "$*"; }
check() { "$@" || { failed=1; echo "FAILED: $*"; }; }

step "machine"
date -u +%Y-%m-%dT%H:%MZ
echo "commit ${1:-$(git rev-parse HEAD)}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -m pipeline doctor

step "tests marked gpu"
check python3 -m pytest tests -m gpu -p no:cacheprovider -rs

step "the demo recipe, unchanged"
rm -rf out/demo
time check python3 -m pipeline run recipes/demo.yaml

step "quality"
time check python3 scripts/bench_quality.py --rows ours

step "dequantise throughput"
check python3 scripts/bench_dequantize.py --device cuda --experts 512

step "solver"
for shape in "--out 1024 --in 2048" "--out 2048 --in 512"; do
    # shellcheck disable=SC2086  # two words each
    check python3 scripts/bench_solver.py --device cuda --experts 512 --loop-experts 8 $shape
done
exit "$failed"
