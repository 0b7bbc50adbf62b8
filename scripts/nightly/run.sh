#!/usr/bin/env bash
# One night, as cron, systemd and GitHub Actions all start it: from the checkout, in its .venv.
# Arguments are those of `requant nightly`; without any: the recipes in recipes/nightly.
# Exit code: 0 all well, 1 a regression, 2 something could not be validated.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
exec .venv/bin/requant nightly "${@:-recipes/nightly}"
