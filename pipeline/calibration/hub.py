"""The rows of a data set on the Hub, streamed: only what is looked at is downloaded.

The `datasets` library finds configurations, splits and files of any layout, so that all data sets
that its users can load work here too.  Code of a data set is never run: the library has none left
that could.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.calibration.source import Rows, TextSource
from pipeline.errors import CalibrationError


def hub_rows(source: TextSource) -> Rows:
    """Row numbers, from 1, and rows, in the data set's own order.

    Raises CalibrationError, in one line, for a data set, revision, configuration, split or column
    that is not there, and for a Hub that cannot be reached.
    """
    assert source.dataset is not None
    datasets.disable_progress_bars()
    name, revision = source.dataset, _commit(source)
    known = _ask(source, lambda: datasets.get_dataset_config_names(name, revision=revision))
    if source.config is not None and source.config not in known:
        raise CalibrationError(
            f"{source.name} has no config {source.config!r}; it has: {', '.join(known)}"
        )
    if source.config is None and len(known) > 1 and "default" not in known:
        raise CalibrationError(
            f"{source.name} has several configs; set config to one of: {', '.join(known)}"
        )
    config = source.config or (known[0] if len(known) == 1 else "default")
    splits = _ask(
        source, lambda: datasets.load_dataset(name, config, revision=revision, streaming=True)
    )
    if source.split not in splits:
        raise CalibrationError(
            f"{source.name} has no split {source.split!r}; it has: {', '.join(map(str, splits))}"
        )
    rows = splits[source.split]
    columns = rows.column_names
    if columns is not None and source.field not in columns:
        raise CalibrationError(
            f"{source.name} has no column {source.field!r}; it has: {', '.join(columns)}"
        )
    return _numbered(source, iter(rows))


def _numbered(source: TextSource, rows: Any) -> Rows:  # noqa: ANN401  (the library's own iterator)
    end = object()
    number = 0
    while (row := _ask(source, lambda: next(rows, end))) is not end:
        number += 1
        yield number, row


def _commit(source: TextSource) -> str | None:
    """The commit that a revision stands for now, so that all requests see one state."""
    assert source.dataset is not None
    if Path(source.dataset).is_dir():
        return None
    info = _ask(source, lambda: HfApi().dataset_info(source.dataset, revision=source.revision))
    sha: str | None = info.sha
    return sha


def _ask(source: TextSource, question: Any) -> Any:  # noqa: ANN401  (whatever the question gives)
    """Ask the library; its errors become one line."""
    try:
        return question()
    except RevisionNotFoundError:
        raise CalibrationError(f"{source.name} has no revision {source.revision!r}") from None
    except GatedRepoError:
        raise CalibrationError(
            f"{source.name} is gated: accept its terms on the Hub and log in (hf auth login)"
        ) from None
    except (RepositoryNotFoundError, DatasetNotFoundError, HFValidationError):
        raise CalibrationError(
            f"{source.name} is not on the Hub, or not for you; check the id, or hf auth login"
        ) from None
    except Exception as error:  # its readers and its network layers raise classes of many packages
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise CalibrationError(f"{source.name} cannot be read ({line[:300]})") from None
