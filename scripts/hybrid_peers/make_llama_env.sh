#!/bin/sh
# Makes the environment of llama.cpp for llama_side.py, compiled for the CPU it stands on.
# Usage: make_llama_env.sh [DIR]     (default .env-llama-cpp; eight minutes of processor time)
set -eu
dir="${1:-.env-llama-cpp}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$dir"
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" "$dir/bin/pip" install --quiet \
    --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
"$dir/bin/pip" install --quiet "gguf==0.19.0" "safetensors==0.8.0"
"$dir/bin/pip" freeze --quiet > "$dir/versions.txt"
