#!/bin/sh
# Makes the environment of kt-kernel for one_layer.py: it does not belong beside our own packages.
# Usage: make_env.sh [DIR]     (default .env-kt-kernel; two minutes)
set -eu
dir="${1:-.env-kt-kernel}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet "torch==2.13.0"
"$dir/bin/pip" install --quiet "torch==2.13.0" "safetensors==0.8.0" "gguf==0.19.0" "numpy"
# Its wheel (101 MB) pins a torch of its own and is mostly kernels for GPUs: the library that runs on
# CPUs, 41 MB of builds for kinds of them, is taken out of it.
"$dir/bin/pip" download --quiet --no-deps --dest "$dir/wheel" "kt-kernel==0.7.2"
"$dir/bin/python" - "$dir"/wheel/*.whl <<'PYTHON'
import sys
import sysconfig
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    ours = [n for n in wheel.namelist() if n.startswith(("kt_kernel/", "kt_kernel.libs/"))]
    wheel.extractall(sysconfig.get_path("purelib"), ours)
PYTHON
rm -r "$dir/wheel"
"$dir/bin/pip" freeze --quiet > "$dir/versions.txt"
