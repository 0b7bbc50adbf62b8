"""`requant validate`: measure a finished model again, anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.calibration import load_tokenizer, read_text, tokenize
from pipeline.checkpoint.index import read_json
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.writer import sweep, write_json
from pipeline.errors import CalibrationError, CheckpointError, RecipeError
from pipeline.evaluate.reference import Reference
from pipeline.evaluate.windows import Windows, sliding_windows
from pipeline.hub.cache import in_hub_cache
from pipeline.models.skeleton import architecture_of, geometry_of
from pipeline.plain_yaml import read_yaml
from pipeline.progress import announce_rarely
from pipeline.recipe import Recipe, Thresholds, Validate, parse_recipe
from pipeline.report.build import REPORT_FILE, existing_report
from pipeline.report.card import write_card
from pipeline.report.optional import page_beside
from pipeline.sizes import parse_size
from pipeline.stages.source import as_stored, check_original, record_source
from pipeline.stages.units import REFERENCE_FILE
from pipeline.stages.validate import validate_model
from pipeline.threads import use_threads
from pipeline.workdir import CONVERSION


def revalidate(
    model: Path,
    source: Path | None,
    text: Path | None,
    reference: Path | None,
    device_memory: str,
    announce: Callable[[str], None],
    *,
    placement: str = "auto",
    native: bool = True,
    threads: int | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Measure `model` and return its report; a model of ours also keeps it as its report.json.

    `source`: stream this checkpoint anew for the predictions to compare with; without it the
    model's own record serves.  `text`: what to measure on (with `source` only).  `reference`:
    stream this one too, the original that the source was made from.  `placement`,
    `native`: see `hybrid.load`.  `threads`: CPU threads, in place of those of the model's recipe.
    `keep`: false leaves the model untouched.
    """
    if not model.is_dir():
        raise CheckpointError(f"{model} is not a directory")
    if text is not None and source is None:
        raise RecipeError("--text goes with --source: the record in a model is of its own text")
    memory = parse_size(device_memory)
    recipe = _recipe(model)
    use_threads(threads or (recipe.limits.threads if recipe else None))
    original = None if reference is None else _open_original(reference, model)
    against, further = None, None
    if source is not None or original is not None:
        windows, labels = _windows(model, text)
    if source is not None:
        announce(f"recording the source {source}")
        against = _record(_open(source), windows, labels, announce)
    if original is not None:
        name = as_stored(str(reference), original)
        announce(f"recording the reference {name}")
        further = name, _record(original, windows, labels, announce)
    report = validate_model(
        model,
        device_memory=memory,
        placement=placement,
        native=native,
        thresholds=_thresholds(model, recipe),
        reference=against,
        original=further,
        progress=announce_rarely(announce),
    )
    if keep and in_hub_cache(model):
        announce("the report is not kept: the model lies in the Hub's cache, which is only read")
    elif keep and (model / CONVERSION).is_file() and source is None and reference is None:
        sweep(model)
        write_json(model / REPORT_FILE, report)
        page_beside(model)
        write_card(model)
    return report


def _recipe(model: Path) -> Recipe | None:
    """The recipe that made the model, if it is one of ours."""
    path = model / "recipe.resolved.yaml"
    if not path.is_file():
        return None
    data, _ = read_yaml(path)
    return parse_recipe(data, str(path))


def _thresholds(model: Path, recipe: Recipe | None) -> Mapping[str, float | None]:
    """Those of the last report, of the recipe that made the model, or the defaults."""
    report = existing_report(model)
    if report is not None and report.get("thresholds"):
        previous: dict[str, float | None] = report["thresholds"]
        return previous
    return (recipe.validate_.thresholds if recipe else Thresholds()).model_dump()


def _windows(model: Path, text: Path | None) -> tuple[Windows, dict[str, str]]:
    """The windows of the model's own record, or new ones of a text."""
    path = model / REFERENCE_FILE
    if text is None and path.is_file():
        own = Reference.load(path)
        return own.windows, dict(own.labels)
    defaults = Validate()
    chosen = str(text or defaults.text)
    words = read_text(chosen)
    tokens = tokenize(load_tokenizer(model), words)
    if len(tokens) < defaults.window:
        raise CalibrationError(
            f"{chosen} has {len(tokens)} tokens, one window needs {defaults.window}"
        )
    windows = sliding_windows(tokens, defaults.window, defaults.stride, defaults.max_windows)
    digest = hashlib.sha256(words.encode()).hexdigest()
    return windows, {"text": Path(chosen).name, "text_sha256": digest}


def _open(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    if checkpoint.headers_only:
        raise CheckpointError(f"{path} holds headers only; it cannot be measured against")
    return checkpoint


def _open_original(path: Path, model: Path) -> Checkpoint:
    original, config = _open(path), read_json(model, "config.json")
    architecture = architecture_of(config, str(model))
    geometry = geometry_of(architecture, config, str(model))
    other = f"--reference {path} is not the original of {model}"
    check_original(original, model, architecture, geometry, other)
    return original


def _record(
    checkpoint: Checkpoint,
    windows: Windows,
    labels: dict[str, str],
    announce: Callable[[str], None],
) -> Reference:
    architecture = architecture_of(checkpoint.config, str(checkpoint.path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return record_source(checkpoint, architecture, windows, labels, device, progress=announce)
