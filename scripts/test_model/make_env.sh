#!/bin/sh
# Makes the environment that writes the Unsloth layout: transformers 5 stacks the experts
# and cannot save (nor load) per-expert bitsandbytes matrices, so version 4 lives apart.
# Usage: make_env.sh [DIR]     (default .venv-tf4)
set -eu
dir="${1:-.venv-tf4}"
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0"
"$dir/bin/pip" install --quiet --disable-pip-version-check \
    "transformers==4.57.6" "bitsandbytes==0.50.2" "accelerate==1.15.0" "numpy==2.4.6"
"$dir/bin/python" -c "import torch, transformers, bitsandbytes as b; print(torch.__version__, transformers.__version__, b.__version__)"
