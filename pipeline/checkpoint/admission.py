"""Directories that are not opened at all, whatever their tensors are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.index import read_json
from pipeline.errors import CheckpointError

WORK = ".work"
"""What only an unfinished directory has: markers and state of the run."""
CONFIGS_WITH_CODE = ("config.json", "tokenizer_config.json")
"""Where a model can name Python files of its own, under `auto_map`."""


def refuse_unfinished(path: Path) -> None:
    """CheckpointError for the directory that a conversion is being built in: its tables may be in
    place before all else is."""
    if (path / WORK).is_dir():
        raise CheckpointError(
            f"{path} is the work of a conversion that is not finished; give the command that began"
            " it once more, and use the result"
        )


def refuse_code(path: Path) -> None:
    """CheckpointError for a model that asks for Python files of its own to be run.

    Nothing here would run them; but a result that still asked for it would hand that on to
    readers who do.
    """
    for name in CONFIGS_WITH_CODE:
        if (path / name).exists() and _asks_for_code(read_json(path, name)):
            raise CheckpointError(
                f"{name}: asks for code of its own to be run (auto_map); no code of a model is"
                " ever run here, refused"
            )


def _asks_for_code(table: Any) -> bool:  # noqa: ANN401  (any JSON)
    todo = [table]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                return True
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return False
