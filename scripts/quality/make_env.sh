#!/bin/sh
# Makes the environment of one peer of bench_quality.py: their versions exclude each other and ours.
# Usage: make_env.sh gptqmodel|gptqmodel-awq|llm-compressor|auto-round [DIR]
#        (default .env-NAME; two to four minutes and 1 to 2 GB each)
set -eu
name="${1:-}"
dir="${2:-.env-$name}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
case "$name" in
gptqmodel | gptqmodel-awq)
    "$(dirname "$0")/../readers/make_env.sh" "$dir"
    if [ "$name" = gptqmodel-awq ]; then
        # 7.7.0 asks for a newer torch than its AWQ needs; 7.6.0's AWQ refuses to run without a GPU.
        "$dir/bin/pip" install --quiet --no-deps "gptqmodel==7.7.0"
    fi
    ;;
llm-compressor)
    python3 -m venv "$dir"
    "$dir/bin/pip" install --quiet "torch==2.13.0"
    "$dir/bin/pip" install --quiet "torch==2.13.0" "llmcompressor==0.14.0.1" \
        "compressed-tensors==0.19.0" "transformers==5.17.0" "accelerate==1.15.0"
    ;;
auto-round)
    python3 -m venv "$dir"
    "$dir/bin/pip" install --quiet "torch==2.13.0"
    "$dir/bin/pip" install --quiet "torch==2.13.0" "auto-round==0.16.1" \
        "transformers==5.23.0" "accelerate==1.15.0"
    ;;
*)
    echo "$0: no peer is called $name" >&2
    exit 2
    ;;
esac
"$dir/bin/pip" freeze --quiet > "$dir/versions.txt"
