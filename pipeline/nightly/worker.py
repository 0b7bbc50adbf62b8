"""One job in a process of its own: `python -m pipeline.nightly.worker RECIPE.json RESULT.json`.

The result is a JSON object with either `report` (what `requant validate` measures), `problems`
(what `requant verify` finds), `revision` and `sums` (which files they are of), or `error`, one line
that says what the user is to do.  Anything else that goes wrong leaves a traceback on standard
error and no result.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from pipeline.checkpoint.sums import SUMS_NAME, digest_file
from pipeline.checkpoint.untrusted import expanded
from pipeline.errors import CheckpointError, HubError, RecipeError, UserError
from pipeline.hub.fetch import download
from pipeline.nightly.recipe import NightlyRecipe, parse_nightly
from pipeline.progress import duration, size
from pipeline.secrets import redact_tracebacks, redacted
from pipeline.stages.revalidate import revalidate
from pipeline.stages.verify import verify_model

COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN_PROBLEMS = 5


def main(recipe_file: Path, result_file: Path) -> None:
    """Validate what the recipe says; write the result."""
    logging.disable(logging.WARNING)  # as on the command line
    redact_tracebacks()
    recipe = parse_nightly(json.loads(recipe_file.read_text()), str(recipe_file))
    try:
        result = examine(recipe)
    except UserError as error:
        result = {"error": redacted(str(error))}
    # NaN is a figure here, one that no threshold lets pass; Python reads back what it writes.
    result_file.write_text(json.dumps(result, indent=2))


def examine(recipe: NightlyRecipe) -> dict[str, Any]:
    """Verify and validate one model; returns the result without ever writing to the model."""
    started = time.monotonic()

    def say(line: str) -> None:
        line = redacted(f"[{duration(time.monotonic() - started):>7}] {line}")
        print(line, file=sys.stderr, flush=True)

    random.seed(recipe.seed)
    numpy.random.seed(recipe.seed % 2**32)  # numpy's own limit
    torch.manual_seed(recipe.seed)
    if recipe.revision is not None and expanded(recipe.model).exists():
        raise RecipeError(f"{recipe.model} is a directory here; revision goes with a Hub id")
    try:
        model = download(recipe.model, recipe.revision, say)
    except (CheckpointError, HubError) as error:
        if recipe.revision is None:
            raise
        raise CheckpointError(f"revision {recipe.revision}: {error}") from None
    say(f"validating {model}, within {size(recipe.device_memory)} of GPU memory")
    problems = [str(p) for p in verify_model(model)] if recipe.verify else []
    for problem in problems:
        say(problem)
    try:
        report = revalidate(
            model,
            Path(recipe.source) if recipe.source else None,
            Path(recipe.text) if recipe.text else None,
            None,
            str(recipe.device_memory),
            say,
            threads=recipe.threads,
            keep=False,
        )
    except UserError as error:
        if problems:
            raise UserError(f"{error} (requant verify: {problems[0]})") from error
        raise
    sums = model / SUMS_NAME
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return {
        "report": report,
        "problems": shown,
        # The Hub cache names a snapshot after its commit.
        "revision": model.name if COMMIT.fullmatch(model.name) else None,
        "sums": digest_file(sums) if sums.is_file() else None,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
