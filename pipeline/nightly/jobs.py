"""What a night validates: the command's arguments, as jobs with names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.untrusted import expanded
from pipeline.errors import RecipeError, UserError
from pipeline.nightly.recipe import Bounds, NightlyRecipe, load_nightly, read_mapping
from pipeline.recipe import parse_recipe

SUFFIXES = (".yaml", ".yml")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
"""ORG/NAME, or ORG/NAME@REVISION on the command line."""


@dataclass(frozen=True)
class NightlyJob:
    """One model to validate; exactly one of `recipe` and `problem` is there."""

    name: str
    """Its name in the history and in file names."""
    recipe: NightlyRecipe | None
    problem: str | None = None
    """Why the job cannot be started: a recipe that cannot be read must not stop the others."""


def collect(targets: Sequence[str], roots: Sequence[Path]) -> tuple[NightlyJob, ...]:
    """Jobs of recipes, directories of recipes, models and Hub ids, in the order given.

    Paths that a recipe names must lie below one of `roots`: a night runs unattended over
    files that others may have put there.  Raises UserError for a target that is nothing of the
    kind, for a directory without recipes, and for two jobs of one name.
    """
    jobs = [job for target in targets for job in _jobs(target, roots)]
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise UserError(f"two jobs are called {twice[0]}; rename one, its history goes by its name")
    return tuple(jobs)


def _jobs(target: str, roots: Sequence[Path]) -> Iterator[NightlyJob]:
    path = expanded(target)
    if path.is_dir() and not (path / "config.json").is_file():
        recipes = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not recipes:
            raise UserError(f"{target} holds neither a model (config.json) nor recipes (*.yaml)")
        for recipe in recipes:
            yield _from_recipe(recipe, roots)
    elif path.is_dir():
        yield NightlyJob(_name(path.resolve().name), NightlyRecipe(model=str(path)))
    elif path.suffix in SUFFIXES:
        if not path.is_file():
            raise RecipeError(f"no recipe at {target}")
        yield _from_recipe(path, roots)
    elif not path.exists() and HUB_ID.fullmatch(target):
        model, _, revision = target.partition("@")
        yield NightlyJob(_name(target), NightlyRecipe(model=model, revision=revision or None))
    else:
        raise UserError(
            f"{target} is neither a recipe (*.yaml), a directory of recipes, a model directory"
            " nor a Hub id (ORG/NAME)"
        )


def _from_recipe(path: Path, roots: Sequence[Path]) -> NightlyJob:
    try:
        data = read_mapping(path)
        if "output" not in data:
            recipe = load_nightly(path)
        else:
            made = parse_recipe(data, str(path))
            recipe = NightlyRecipe(
                model=made.output.path,
                device_memory=made.validate_.device_memory,
                threads=made.limits.threads,
                thresholds=Bounds(**made.validate_.thresholds.model_dump()),
            )
        _check_roots(recipe, path, roots)
    except UserError as error:
        return NightlyJob(_name(path.stem), None, str(error))
    return NightlyJob(_name(path.stem), recipe)


def _check_roots(recipe: NightlyRecipe, where: Path, roots: Sequence[Path]) -> None:
    resolved = [root.resolve() for root in roots]
    for key in ("model", "source", "text"):
        value: str | None = getattr(recipe, key)
        if value is None:
            continue
        path = expanded(value)
        if key == "model" and not path.exists() and HUB_ID.fullmatch(value):
            continue  # not a path but a Hub id
        if not any(path.resolve().is_relative_to(root) for root in resolved):
            allowed = ", ".join(str(root) for root in resolved)
            raise RecipeError(
                f"{where}: {key} {value} lies outside {allowed}; allow its folder with --root"
            )


def _name(text: str) -> str:
    """Fit for a file name on any system."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "job"
