"""What a calibration text can come from, and the records it gives, one at a time.

A plain text is one record.  In a .jsonl file every line is one, in a .parquet file or a data set of
the Hub every row: the value of one field (column), a text or a list of chat messages.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import CalibrationError

BUILTIN_FOLDER = Path(__file__).parents[2] / "calibration"
"""The repository's own texts; an installation without the repository has none."""

LINES = {".jsonl", ".ndjson"}
PARQUET = {".parquet"}


@dataclass(frozen=True)
class TextSource:
    """One entry of `calibration.sources`; one of builtin, file and dataset is given."""

    builtin: str | None = None
    """Name of a text in the repository's calibration/, without its ending."""
    file: str | None = None
    """A UTF-8 text, or records in .jsonl, .ndjson or .parquet."""
    dataset: str | None = None
    """A Hub id, or a directory laid out as a data set's repository."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    """Field or column of a record; None: `messages` of a chat, `text` otherwise."""
    chat: bool = False
    """The field holds a list of {role, content}."""
    weight: float | None = None
    """Share of the sequences, relative to the other sources'."""

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.dataset is not None:
            return f"data set {self.dataset}"
        return self.file if self.file is not None else f"{self.builtin}"

    @property
    def field(self) -> str:
        """The field of a record that is read."""
        return self.column or ("messages" if self.chat else "text")

    @property
    def path(self) -> Path:
        """The local file; CalibrationError for a built-in text that there is none of."""
        if self.file is not None:
            return Path(self.file)
        path = BUILTIN_FOLDER / f"{self.builtin}.txt"
        if not path.is_file() or path.parent != BUILTIN_FOLDER:
            known = sorted(p.stem for p in BUILTIN_FOLDER.glob("*.txt"))
            there = f"known: {', '.join(known)}" if known else "this installation has none"
            raise CalibrationError(f"there is no built-in text {self.builtin}; {there}")
        return path

    @property
    def is_text(self) -> bool:
        """Whether it is one plain text, not records."""
        return self.dataset is None and self.path.suffix.lower() not in LINES | PARQUET


@dataclass(frozen=True)
class Record:
    """The wanted field of one record."""

    where: str
    """Source and record number, for messages."""
    value: object


def read_text(path: str) -> str:
    """A whole UTF-8 text; raises CalibrationError when it is missing, empty or not UTF-8."""
    try:
        text = _open(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text {path} is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise CalibrationError(f"text {path} is empty")
    return text


def check_source(source: TextSource) -> None:
    """Refuse now what can be refused without reading all of it or asking the Hub."""
    if source.is_text:
        read_text(str(source.path))
    elif source.dataset is None:
        next(iter(records(source)))
    else:
        need("datasets", source.name)


def records(source: TextSource) -> Iterator[Record]:
    """The wanted field of every record, in the source's order.

    Raises CalibrationError naming the record for one that is malformed or lacks the field.
    """
    if source.dataset is not None:
        need("datasets", source.name)
        from pipeline.calibration.hub import hub_rows  # noqa: PLC0415  (an extra, slow to import)

        rows = hub_rows(source)
    elif source.path.suffix.lower() in PARQUET:
        rows = _parquet_rows(source)
    else:
        rows = _json_rows(source)
    found = False
    for number, row in rows:
        found = True
        where = f"{source.name}, record {number}"
        if source.field not in row:
            raise CalibrationError(
                f"{where}: has no field {source.field!r}; it has: {', '.join(map(str, row))}"
            )
        yield Record(where, row[source.field])
    if not found:
        raise CalibrationError(f"{source.name} is empty")


def need(package: str, what: str) -> ModuleType:
    """An optional package, or the line that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise CalibrationError(
            f"{what}: {package} is needed for it; pip install -e '.[data]' in requant's checkout"
        ) from None


Rows = Iterable[tuple[int, dict[str, Any]]]
"""Record numbers, from 1, and records."""


def _json_rows(source: TextSource) -> Rows:
    name = source.name
    for number, line in enumerate(_lines(source), start=1):
        try:
            row = json.loads(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{name}, record {number}: is not UTF-8 (byte {error.start} of the line)"
            ) from None
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{name}, record {number}: is not JSON ({error.msg}, column {error.colno})"
            ) from None
        if not isinstance(row, dict):
            raise CalibrationError(f"{name}, record {number}: is no object with fields")
        yield number, row


def _lines(source: TextSource) -> Iterator[bytes]:
    try:
        with source.path.open("rb") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        raise CalibrationError(f"text {source.name} does not exist") from None
    except OSError as error:
        raise CalibrationError(f"text {source.name} cannot be read: {error.strerror}") from None


def _parquet_rows(source: TextSource) -> Rows:
    need("pyarrow", source.name)
    arrow = importlib.import_module("pyarrow.parquet")
    errors: Any = importlib.import_module("pyarrow").ArrowException
    if not source.path.is_file():
        raise CalibrationError(f"text {source.name} does not exist")
    number = 0
    try:
        with arrow.ParquetFile(source.path) as file:
            columns = file.schema_arrow.names
            if source.field not in columns:
                raise CalibrationError(
                    f"{source.name}: has no column {source.field!r}; it has: {', '.join(columns)}"
                )
            for batch in file.iter_batches(256, columns=[source.field]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (errors, OSError) as error:
        line = " ".join(str(error).split())
        raise CalibrationError(f"{source.name} cannot be read as parquet: {line}") from None


def _open(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise CalibrationError(f"text {path} does not exist") from None
    except OSError as error:
        raise CalibrationError(f"text {path} cannot be read: {error.strerror}") from None
