#!/bin/sh
# Makes the environment of one peer of hybrid_peers: none of them belongs beside our own packages.
# Usage: make_env.sh kt-kernel|llama-cpp [DIR]     (default .env-NAME; needs cmake and a C++ compiler
#        for llama-cpp: ten minutes on two cores)
set -eu
name="${1:-}"
dir="${2:-.env-$name}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
case "$name" in
kt-kernel)
    python3 -m venv "$dir"
    "$dir/bin/pip" install --quiet "torch==2.13.0" "numpy"
    # Its wheel holds a library for each kind of CPU and for CUDA, 101 MB, and pins a torch of its
    # own.  The library that loads here is all that a CPU's experts need.
    "$dir/bin/pip" download --quiet --no-deps --dest "$dir/wheel" "kt-kernel==0.7.2"
    "$dir/bin/pip" install --quiet --no-deps "$dir"/wheel/*.whl
    ;;
llama-cpp)
    python3 -m venv "$dir"
    "$dir/bin/pip" install --quiet "numpy" "gguf==0.19.0"
    # From source, for the instructions of this CPU; without servers, tests and vision.
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF" \
        "$dir/bin/pip" install --quiet "llama-cpp-python==0.3.36"
    ;;
*)
    echo "$0: no peer is called $name" >&2
    exit 2
    ;;
esac
"$dir/bin/pip" freeze --quiet > "$dir/versions.txt"
