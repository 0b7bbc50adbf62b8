#!/bin/sh
# Makes an environment with lm-eval beside the packages of .venv, for scripts/lm_eval_hybrid.py.
# Usage: lm_eval_env.sh [DIR]     (default .env-lm-eval; after `make`, a minute or two)
set -eu
dir="${1:-.env-lm-eval}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$dir"
# What .venv has counts as installed here, so that torch and transformers stay the ones we test with.
ours="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
site="$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
printf '%s\n%s\n' "$ours" "$PWD" > "$site/requant.pth"
"$dir/bin/pip" install --quiet -c constraints.txt "lm_eval==0.4.12"
"$dir/bin/pip" freeze --quiet > "$dir/versions.txt"
