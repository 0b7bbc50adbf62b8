"""What others wrote, before anything relies on it: JSON of bounded size, names that are only names.

A checkpoint is a stranger's file.  Everything that is parsed from one goes through here first, so
that a few bytes of it cannot take gigabytes, and so that its names can be printed and compared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError

NAME_LENGTH = 512
LARGEST = 2**63
"""No size, offset or dimension reaches it."""


@dataclass(frozen=True)
class Limits:
    """What a JSON text may hold; far more than any sound file has."""

    nbytes: int
    values: int
    """Commas and opening brackets: no text holds more values than these and one."""


SMALL = Limits(64 << 20, 4_000_000)
"""config.json and the like; conversion.json has a few values for every expert."""


def read_limited(path: Path, where: str, limits: Limits) -> bytes:
    """A whole file; CheckpointError for one that is too large, OSError as for any file."""
    with path.open("rb") as stream:
        data = stream.read(limits.nbytes + 1)
    if len(data) > limits.nbytes:
        raise CheckpointError(f"{where}: more than {limits.nbytes:,} bytes; refused")
    return data


def parse_table(data: bytes, where: str, limits: Limits = SMALL) -> dict[str, Any]:
    """A JSON object; what it takes is bounded before it is parsed.

    Raises CheckpointError for text that is too large, no JSON, too deep, no object, or holds a key
    twice in one object (readers disagree on which counts).
    """
    if len(data) > limits.nbytes or _values(data) > limits.values:
        raise CheckpointError(f"{where}: holds more than any sound file does; refused")
    try:
        table = json.loads(data)
        if data.count(b":") != _keys(table):
            # A key twice; or a colon in a string or a list's object, and then nothing is wrong.
            table = json.loads(data, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON ({shown(error)})") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested without end; refused") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: holds a number of thousands of digits; refused") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: a table was expected")
    return table


def _values(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _keys(table: object) -> int:
    """Keys of an object and of the objects inside it, those in lists left out.

    Every key in the text has a colon, and one that is there twice is parsed once.
    """
    total = 0
    level = [table] if isinstance(table, dict) else []
    while level:
        total += sum(map(len, level))
        level = [value for inner in level for value in inner.values() if type(value) is dict]
    return total


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise CheckpointError(f"{where}: {shown(_first_repeated(k for k, _ in pairs))} is listed "
                              "twice")  # fmt: skip
    return table


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def check_name(name: str, where: str) -> None:
    """CheckpointError for a tensor's or file's name that could pass for something else.

    Control and invisible characters, separators of paths and absurd lengths: no model has them.
    """
    if not 0 < len(name) <= NAME_LENGTH or not name.isprintable() or "\\" in name:
        raise CheckpointError(f"{where}: '{shown(name)}' is no proper name; refused")


def check_tensor_names(names: Collection[str], where: str) -> None:
    """As `check_name` for each; a tensor's name holds no slash either."""
    text = "".join(names)
    lengths = set(map(len, names))
    sound = text.isprintable() and "\\" not in text and "/" not in text
    if sound and min(lengths, default=1) > 0 and max(lengths, default=1) <= NAME_LENGTH:
        return
    for name in names:
        check_name(name, where)
        if "/" in name:
            raise CheckpointError(f"{where}: '{shown(name)}' is no proper name; refused")


def twins(names: Collection[str]) -> tuple[str, str] | None:
    """Two names that some file systems and readers take for one: equal but for case."""
    # Nearly all are ASCII in lower case, and fold to themselves.
    folded = [name.casefold() for name in names if not (name.isascii() and name.islower())]
    every = names if isinstance(names, Mapping) else set(names)
    if len(set(folded)) == len(folded) and not any(fold in every for fold in folded):
        return None
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None


def shown(value: object, length: int = 120) -> str:
    """Anything as one short printable line, for messages."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a value of {type(value).__name__} too large to print"
    text = " ".join(text[: 4 * length].split())
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= length else f"{text[: length - 3]}..."


def expanded(text: str) -> Path:
    """A path as a person wrote it, with ~ resolved where it means somebody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def is_size(value: object) -> bool:
    """Whether it is a whole number that can be a size: 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < LARGEST
