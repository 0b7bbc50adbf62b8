"""The token sequences of a run, made once before the first long job."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.calibration import (
    TextSource,
    calibration_sequences,
    digest,
    load_tokenizer,
    read_text,
    tokenize,
)
from pipeline.errors import CalibrationError
from pipeline.evaluate.windows import Windows, sliding_windows
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """Calibration sequences and evaluation windows of one recipe, tokenised by the source's
    tokenizer."""

    calibration: Tensor
    """int64 [samples, length]"""
    windows: Windows
    labels: dict[str, str]
    """What the evaluation windows are, kept with the reference."""

    @property
    def digests(self) -> dict[str, Any]:
        """What identifies both, for the fingerprint."""
        return {
            "calibration": digest(self.calibration),
            "windows": digest(self.windows.token_ids),
            "stride": self.windows.stride,
            "labels": self.labels,
        }


def planned_windows(recipe: Recipe) -> int:
    """How many evaluation windows a recipe has, at most; without reading its text."""
    validate = recipe.validate_
    if validate.max_windows is not None:
        return validate.max_windows
    text = Path(validate.text)
    # Tokens of running text are 2 bytes and more, 4 where the vocabulary is large.
    return (text.stat().st_size // 2 // validate.stride if text.is_file() else 0) + 1


def calibration_sources(recipe: Recipe) -> list[TextSource]:
    """What the recipe names, in the terms of `pipeline.calibration`."""
    return [TextSource(**source.model_dump()) for source in recipe.calibration.sources]


def text_licences(recipe: Recipe) -> dict[str, str]:
    """Licences of calibration texts, where a licences.json beside a text names them."""
    found = {}
    for source, text in zip(recipe.calibration.sources, calibration_sources(recipe), strict=True):
        if text.dataset is not None:
            continue
        listed = text.path.with_name("licences.json")
        if listed.is_file():
            known = json.loads(listed.read_text(encoding="utf-8")).get(text.path.name)
            if known:
                found[str(source.file or source.builtin)] = str(known)
    return found


def prepare_texts(recipe: Recipe, model: Path, vocabulary: int) -> Texts:
    """Read and tokenise what the recipe names; raises CalibrationError for what cannot be used."""
    tokenizer = load_tokenizer(model)
    calibration = calibration_sequences(
        tokenizer,
        calibration_sources(recipe),
        samples=recipe.calibration.samples,
        length=recipe.calibration.sequence_length,
        seed=recipe.calibration.seed,
        packing=recipe.calibration.packing,
    )
    validate = recipe.validate_
    text = read_text(validate.text)
    tokens = tokenize(tokenizer, text)
    if len(tokens) < validate.window:
        raise CalibrationError(
            f"{validate.text} has {len(tokens)} tokens, one window needs {validate.window};"
            " use a longer text or a smaller validate.window"
        )
    windows = sliding_windows(tokens, validate.window, validate.stride, validate.max_windows)
    highest = max(int(calibration.max()), int(windows.token_ids.max()))
    if highest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer of {model} gives token {highest},"
            f" the model's vocabulary has {vocabulary}; tokenizer and model do not belong together"
        )
    labels = {
        "text": Path(validate.text).name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": str(len(tokens)),
    }
    return Texts(calibration, windows, labels)
