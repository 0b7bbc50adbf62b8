"""Reading and checking the header of a safetensors file.

The format: 8 bytes little-endian header length n, n bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the
tensors without gaps (safetensors documentation).  Written here, not taken from the
safetensors package, because that one opens no file that ends after its header, tells little about
what is wrong, and hands out tensors, not byte ranges.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.canonical import MAX_DIMENSIONS, Table, parse_canonical
from pipeline.checkpoint.stored import DTYPES, TensorEntry
from pipeline.checkpoint.untrusted import (
    Limits,
    check_tensor_names,
    is_size,
    parse_table,
    shown,
)
from pipeline.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""
MAX_TENSORS = 500_000
"""In one file.  A shard of the largest models has a tenth of that; more would take gigabytes."""
LIMITS = Limits(MAX_HEADER_BYTES, 10 * MAX_TENSORS)

ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileHeader:
    """One file's tensors and where its bytes end."""

    file: str
    entries: list[TensorEntry]
    metadata: Mapping[str, str]
    size: int
    """Bytes the file has."""
    data_start: int
    data_end: int
    """Bytes the file should have."""

    @property
    def headers_only(self) -> bool:
        """Whether the file ends right after a header that lists tensors."""
        return self.size == self.data_start < self.data_end


def read_header(path: Path, file: str) -> FileHeader:
    """Parse and check one header; `file` is the name to use in entries and errors.

    Raises CheckpointError, naming file and tensor, for everything a header can get wrong: its
    length, its JSON, names twice, unknown dtypes, shapes that do not make the bytes, ranges that
    overlap, leave gaps or pass the end of the file.  A file that ends right after its header is
    allowed (see `FileHeader.headers_only`).
    """
    size, text = _header_bytes(path, file)
    return parse_header(text, size, file)


def parse_header(text: bytes, size: int, file: str) -> FileHeader:
    """The header of a file of `size` bytes from the `text` between its length and its data.

    Raises CheckpointError as `read_header` does.
    """
    if text.count(b"{") > MAX_TENSORS + 2:
        raise _bad(file, f"its header lists more than {MAX_TENSORS:,} tensors; refused")
    start = 8 + len(text)
    entries, metadata, end = parse_canonical(text, file) or _parse_any(text, file)
    if size not in (start, end):
        if size < end:
            raise _bad(file, f"truncated, {size:,} of {end:,} bytes are there; download it again")
        raise _bad(file, f"{size - end:,} bytes follow the last tensor; download it again")
    return FileHeader(file, entries, metadata, size, start, end)


def _parse_any(text: bytes, file: str) -> Table:
    """As `parse_canonical`, for any JSON; says what is wrong."""
    table = parse_table(text, f"{file}: its header", LIMITS)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _bad(file, "its __metadata__ is not a table of strings")
    start = 8 + len(text)
    check_tensor_names(table, file)
    entries = [_entry(file, name, value, start) for name, value in table.items()]
    return entries, metadata, _check_ranges(file, entries, start)


def _header_bytes(path: Path, file: str) -> tuple[int, bytes]:
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            if len(head) < 8:
                raise _bad(file, f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER_BYTES:
                raise _bad(file, f"header length {length:,} is absurd; not a safetensors file?")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if len(text) < length:
        raise _bad(file, f"truncated within its header ({size:,} bytes); download it again")
    return size, text


def _entry(file: str, name: str, value: dict[str, Any], start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = len(shape) <= MAX_DIMENSIONS and all(map(is_size, (*shape, begin, end)))
    except (TypeError, KeyError, ValueError) as error:
        raise _bad(file, f"{name} has no proper dtype, shape and data_offsets") from error
    if not whole or begin > end:
        numbers = f"shape {shown(shape, 60)}, bytes {shown(begin, 30)}:{shown(end, 30)}"
        raise _bad(file, f"{name} has impossible numbers ({numbers})")
    item = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item is None:
        raise _bad(file, f"{name} has unknown dtype {shown(dtype, 40)!r}")
    if math.prod(shape) * item != end - begin:
        raise _bad(
            file, f"{name} is {dtype} {shape}, {math.prod(shape) * item:,} bytes, in a range of "
            f"{end - begin:,}"
        )  # fmt: skip
    return TensorEntry(name, file, dtype, tuple(shape), start + begin, end - begin)


def _check_ranges(file: str, entries: list[TensorEntry], start: int) -> int:
    """End of the data, once every byte between header and end belongs to exactly one tensor."""
    position = start
    previous = ""
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset < position:
            raise _bad(file, f"{entry.name} overlaps {previous}")
        if entry.offset > position:
            raise _bad(file, f"{entry.offset - position:,} bytes before {entry.name} are no tensor")
        position += entry.nbytes
        previous = entry.name
    return position


def _bad(file: str, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}")
