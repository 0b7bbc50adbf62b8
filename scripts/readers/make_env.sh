#!/bin/sh
# Makes the environment in which other readers open our output: GPTQModel, and transformers through
# optimum + GPTQModel with defuser's unfusing of the experts. It lives apart from the package's own
# environment because GPTQModel pins numpy and brings two dozen packages that we do not need.
# Usage: make_env.sh [DIR]     (default .venv-readers; one to two minutes and 1.6 GB)
set -eu
dir="${1:-.venv-readers}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$dir"
# torch goes first and alone: with it in place nothing below asks for another build of it.
"$dir/bin/pip" install --quiet "torch==2.13.0"
# GPTQModel 7.6.0 is the newest that runs beside torch 2.13; it comes as source and builds in
# seconds (its kernels are compiled on first use, if at all). gcc is needed for pypcre and for
# torch.compile at run time.
"$dir/bin/pip" install --quiet "torch==2.13.0" "gptqmodel==7.6.0" "optimum==2.3.0" \
    "defuser==0.0.28" "transformers==5.23.0" "accelerate==1.15.0"
"$dir/bin/python" - <<'PYTHON'
from importlib.metadata import version

names = ("torch", "transformers", "gptqmodel", "optimum", "defuser", "accelerate")
print(", ".join(f"{name} {version(name)}" for name in names))
PYTHON
