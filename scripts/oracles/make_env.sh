#!/bin/sh
# Makes the two environments whose packers ours are held against: AutoAWQ 0.2.9 and AutoGPTQ 0.7.1.
# Both projects have ended, and neither imports beside the other's transformers: hence two.
# Usage: make_env.sh [DIR]     (default .env-oracles; three minutes and 4 GB)
set -eu
dir="${1:-.env-oracles}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# torch goes first and alone: with it in place nothing below asks for another build of it.
for name in autoawq autogptq; do
    python3 -m venv "$dir/$name"
    "$dir/$name/bin/pip" install --quiet "torch==2.13.0" wheel setuptools
done
# AutoAWQ comes as source, and its setup asks for torch without saying so.
"$dir/autoawq/bin/pip" install --quiet --no-build-isolation "torch==2.13.0" "autoawq==0.2.9" \
    "transformers==5.23.0"
"$dir/autogptq/bin/pip" install --quiet "torch==2.13.0" "auto-gptq==0.7.1" \
    "transformers==4.57.6" "peft==0.17.1"
