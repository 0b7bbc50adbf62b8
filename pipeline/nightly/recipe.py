"""A nightly recipe: one job, in one small YAML file (recipes/nightly/).

Frozen, unknown keys refused, like a conversion's recipe (pipeline/recipe.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field, ValidationError

from pipeline.errors import RecipeError
from pipeline.plain_yaml import read_yaml
from pipeline.recipe import Section, Size, first_error


class Bounds(Section):
    """Absolute bounds; null: the model's own threshold where it has one, else not judged."""

    perplexity_ratio: float | None = Field(default=None, gt=0)
    kl_divergence: float | None = Field(default=None, gt=0)
    top1_agreement: float | None = Field(default=None, gt=0, le=1)
    decode_tokens_per_second: float | None = Field(default=None, gt=0)
    prefill_tokens_per_second: float | None = Field(default=None, gt=0)
    load_seconds: float | None = Field(default=None, gt=0)
    peak_host_bytes: Size | None = None
    peak_device_bytes: Size | None = None


class Relative(Section):
    """Comparison with the trailing median of the same machine."""

    nights: int = Field(default=60, ge=1)
    """Good nights that the median and the noise are taken from."""
    minimum: int = Field(default=7, ge=1)
    """Good nights before speed, memory and load time are compared; quality, which has no noise on
    one machine, is compared from the second night."""


class NightlyRecipe(Section):
    """What one job validates, on what, and what it must reach."""

    model: str = Field(min_length=1)
    """A model directory, or a Hub id."""
    revision: str | None = Field(default=None, min_length=1)
    """Hub revision (branch, tag or commit); only with a Hub id."""
    source: str | None = Field(default=None, min_length=1)
    """Directory it was made from, to be streamed anew; without it the model's record serves."""
    text: str | None = Field(default=None, min_length=1)
    """What to measure on; only with `source`."""
    device_memory: Size = ByteSize(10 << 30)
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: those of the model's recipe, else one per physical core."""
    seed: int = Field(default=0, ge=0)
    verify: bool = True
    """Check checksums and values first (reads all bytes twice)."""
    time_limit_minutes: float = Field(default=120, gt=0)
    """For one attempt; it is ended after that."""
    thresholds: Bounds = Bounds()
    relative: Relative = Relative()


def load_nightly(path: Path) -> NightlyRecipe:
    """Read a nightly recipe; RecipeError, in one line, for what cannot be understood."""
    return parse_nightly(read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; RecipeError for anything else."""
    data, _ = read_yaml(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: the top level must be a mapping of keys")
    return data


def parse_nightly(data: dict[str, Any], where: str) -> NightlyRecipe:
    """Check a nightly recipe given as plain data; `where` names it in messages."""
    try:
        recipe = NightlyRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_error(error, NightlyRecipe)}") from None
    if recipe.text is not None and recipe.source is None:
        raise RecipeError(
            f"{where}: text goes with source: the record in a model is of its own text"
        )
    return recipe
