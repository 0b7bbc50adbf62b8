#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests marked gpu, the demo recipe, quality, benchmarks.
# Usage: scripts/gpu_run.sh [COMMIT]     in an environment that has the package's dependencies.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
step() { printf '\n## %s\n' "$*"; }

step "machine"
date -u +%Y-%m-%dT%H:%MZ
echo "commit ${1:-$(git rev-parse HEAD)}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -m pipeline doctor

step "tests marked gpu"
python3 -m pytest tests -m gpu -p no:cacheprovider -rs

step "the demo recipe, unchanged"
rm -rf out/demo
time python3 -m pipeline run recipes/demo.yaml
cp out/demo/report.json "${OUT:-out}/report-gpu.json" 2>/dev/null

step "quality"
time python3 scripts/bench_quality.py

step "dequantise throughput"
python3 scripts/bench_dequantize.py --device cuda --experts 512

step "solver"
python3 scripts/bench_solver.py --device cuda --experts 512 --out 1024 --in 2048 --loop-experts 8
