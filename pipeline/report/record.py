"""What a finished directory says of itself, checked: report.json, conversion.json and the recipe.

A page is made of files that may come from anywhere, so what it needs of them is declared here and
everything else in them is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.checkpoint.index import read_json
from pipeline.errors import CheckpointError
from pipeline.report.build import REPORT_FILE, existing_report

CONVERSION_FILE = "conversion.json"
RECIPE_FILES = ("recipe.yaml", "recipe.resolved.yaml")

Number = Annotated[float, Field(allow_inf_nan=False)]
Interval = tuple[Number, Number]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Perplexity(_Part):
    """Of the source, or of the result."""

    perplexity: Number
    interval: Interval | None = None


class Original(_Part):
    """The result against what the source was made from."""

    name: str
    perplexity: Number
    source_perplexity_ratio: Number
    perplexity_ratio: Number
    perplexity_ratio_interval: Interval
    kl_divergence: Number
    top1_agreement: Number


class Cost(_Part):
    """What the plan said that a stage would take."""

    seconds: Number
    host_bytes: int
    device_bytes: int


class StageRecord(_Part):
    """What a stage took."""

    seconds: Number
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    estimate: Cost | None = None


class Placement(_Part):
    """Where the loaded model lay."""

    device: str = "cpu"
    bytes: dict[str, int] = {}
    experts: dict[str, str | dict[str, int]] = {}
    expert_bytes: dict[str, int] = {}
    use: dict[str, dict[str, Number]] = {}
    request: str = "cpu"
    backends: dict[str, dict[str, int]] = {}
    device_memory_limit: int | None = None
    ledger: dict[str, int] = {}
    prompts: str = ""


class LayerRecord(_Part):
    """Statistics of one layer; lists are over its experts."""

    layer: int
    tokens: list[int] = []
    effective_rank: list[Number] = []
    gate_up_loss: list[Number] = []
    down_loss: list[Number] = []
    dense_loss: dict[str, Number] = {}


class Conversion(_Part):
    """conversion.json; empty for a model that others made."""

    method: str | None = None
    layers: list[LayerRecord] = []
    fingerprint: dict[str, Any] = {}


class Report(_Part):
    """report.json."""

    model: str
    validated: str = "at an unknown time"
    source: Perplexity
    quantized: Perplexity
    perplexity_ratio: Number
    perplexity_ratio_interval: Interval
    kl_divergence: Number
    kl_divergence_interval: Interval | None = None
    top1_agreement: Number
    top1_agreement_interval: Interval | None = None
    reference: Original | None = None
    scored_tokens: int
    decode_tokens_per_second: Number
    prefill_tokens_per_second: Number
    load_seconds: Number
    peak_host_bytes: int
    peak_device_bytes: int
    placement: Placement = Placement()
    experts: dict[str, Any] = {}
    stages: dict[str, StageRecord] = {}
    baseline: str = "the source"
    text: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    thresholds: dict[str, Number | None] = {}
    failures: list[str] = []
    passed: bool
    digest: str


@dataclass(frozen=True)
class Record:
    """All of it."""

    report: Report
    conversion: Conversion
    config: dict[str, Any]
    """config.json; empty when there is none."""
    recipes: dict[str, str]
    """The recipe as written and resolved, by file name."""


def read_record(model: Path) -> Record:
    """Read what a directory's page is made of.

    Raises CheckpointError when there is no report, or one that its digest or form contradicts.
    """
    if not model.is_dir():
        raise CheckpointError(f"{model} is not a directory")
    report = existing_report(model)
    if report is None:
        raise CheckpointError(
            f"{model} holds no {REPORT_FILE}, or a damaged one; measure it first:"
            f" requant validate {model}"
        )
    conversion, config = (_read_json(model / name) for name in (CONVERSION_FILE, "config.json"))
    recipes = {
        name: (model / name).read_text(encoding="utf-8", errors="replace")
        for name in RECIPE_FILES
        if (model / name).is_file()
    }
    try:
        return Record(
            Report.model_validate(report), Conversion.model_validate(conversion), config, recipes
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{model}: {error.title} has no usable {where} ({first['msg']}); measure it again:"
            f" requant validate {model}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON table, empty where the file is missing; CheckpointError where it is damaged."""
    return read_json(path.parent, path.name) if path.is_file() else {}
