"""Headers and indexes in the form that every writer gives them, taken apart in a few passes.

safetensors writes compact JSON of printable ASCII, each tensor as

    "NAME":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}

so that between quotes ten pieces a tensor follow each other.  The headers of a large model list
half a million tensors: as columns they are read and checked in half the time that JSON and a check
of each tensor take.  Whatever is of another form, or wrong, is left to `header.py`, which reads any
JSON and says what is wrong with which tensor.
"""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np

from pipeline.checkpoint.stored import DTYPES, TensorEntry
from pipeline.checkpoint.untrusted import LARGEST, NAME_LENGTH, parse_table
from pipeline.errors import CheckpointError

MAX_DIMENSIONS = 8
PLAIN = bytes(byte for byte in range(0x20, 0x7F) if chr(byte) not in "\\/")
"""What the text may hold; a name with anything else is looked at by itself."""
DIGITS = str.maketrans("", "", "0123456789")
MARKS = str.maketrans("", "", ":[]}")
LONGEST = len(":[,]},") + 2 * 18
"""Of a pair of offsets: 18 digits are below 2**63."""

_METADATA = re.compile(rb'\{(?:"__metadata__":(\{[^{}]*\})(?:,(?=")|(?=\})))?')
_SHAPE = re.compile(r":\[((?:0|[1-9]\d{0,17})(?:,(?:0|[1-9]\d{0,17}))*|)\],")
_PIECES = {2: ":{", 3: "dtype", 4: ":", 6: ",", 7: "shape", 9: "data_offsets"}
"""What stands between a tensor's quotes besides its name, type, shape and offsets."""
_LEADING_ZERO = re.compile(r"[\[,]0\d")

Table = tuple[list[TensorEntry], dict[str, str], int]
"""Tensors in the order of the header, its metadata, and where its tensors' bytes end."""


_INDEX = re.compile(
    rb'\s*\{\s*"metadata"\s*:\s*(\{[^{}]*\})\s*,'
    rb'\s*"weight_map"\s*:\s*\{([^{}\\]*)\}\s*\}\s*'
)
_SPACE = " \t\n\r"


class _Unusual(Exception):
    """Another form, or something wrong."""


def parse_canonical(text: bytes, file: str) -> Table | None:
    """What a header says, or None where it is not of the usual form or anything in it is wrong.

    text: between the header's length and the data.  Everything that `header.parse_header` checks of
    names, types, shapes and byte ranges holds for what is returned.
    """
    try:
        metadata, body = _metadata(text, file)
        names, dtypes, shapes, spans = _columns(body)
        begins, ends = _offsets(spans)
        sizes = _sizes(dtypes, shapes)
        if not np.array_equal(ends - begins, sizes):
            raise _Unusual
    except _Unusual:
        return None
    start = 8 + len(text)
    known = {shape: _dimensions(shape) for shape in set(shapes)}
    columns = zip(  # no `strict`, as `repeat` has no end
        names,
        repeat(file),
        dtypes,
        map(known.__getitem__, shapes),
        (begins + start).tolist(),
        sizes.tolist(),
    )
    entries: list[TensorEntry] = list(map(partial(tuple.__new__, TensorEntry), columns))
    return entries, metadata, start + int(ends.max())


def parse_index(data: bytes, where: str) -> dict[str, Any] | None:
    """An index, its metadata and its map of names to names; None as for `parse_canonical`."""
    found = _INDEX.fullmatch(data)
    if found is None or not found[2].isascii():
        return None
    first, *pieces = found[2].decode("ascii").split('"')
    names, colons, files, commas = (pieces[i::4] for i in range(4))
    if not names:
        return None
    last = commas.pop() if len(names) == len(commas) else "?"
    between = {
        (first, ""),
        (last, ""),
        *((c, ":") for c in {*colons}),
        *((c, ",") for c in {*commas}),
    }
    table = dict(zip(names, files, strict=False))
    if len(table) != len(names) or any(text.strip(_SPACE) != mark for text, mark in between):
        return None
    if not "".join((*names, *set(files))).isprintable():
        return None
    try:
        metadata = parse_table(found[1], where)
    except CheckpointError:
        return None
    return {"metadata": metadata, "weight_map": table}


def _metadata(text: bytes, file: str) -> tuple[dict[str, str], bytes]:
    """The header's `__metadata__`, and what follows it."""
    begin = _METADATA.match(text)
    if begin is None or text.translate(None, PLAIN):
        raise _Unusual
    try:
        metadata = parse_table(begin[1], file) if begin[1] else {}
    except CheckpointError as error:
        raise _Unusual from error
    return metadata, text[begin.end() :].rstrip(b" ")


def _columns(body: bytes) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names, types, shapes and offsets of all tensors, as they are written."""
    count = body.count(b"{")
    if not count or body.count(b'"') != 10 * count:
        raise _Unusual
    pieces = body.decode("ascii").split('"')
    if pieces[0] or any(pieces[i::10].count(piece) != count for i, piece in _PIECES.items()):
        raise _Unusual
    names = pieces[1::10]
    distinct = set(names)
    if len(distinct) != count or {"", "__metadata__"} & distinct:
        raise _Unusual
    if max(map(len, names)) > NAME_LENGTH:
        raise _Unusual
    return names, pieces[5::10], pieces[8::10], pieces[10::10]


def _offsets(spans: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of every tensor, int64; together they leave no byte out and none twice."""
    joined = "".join(spans)
    marks = ":[,]}," * (len(spans) - 1) + ":[,]}}"
    whole = joined.startswith(":[") and joined.count("]},:[") == len(spans) - 1
    if not whole or joined[-3:] != "]}}" or joined.translate(DIGITS) != marks:
        raise _Unusual
    if "[," in joined or ",]" in joined or _LEADING_ZERO.search(joined):
        raise _Unusual
    if max(map(len, spans)) > LONGEST:
        raise _Unusual
    numbers = np.fromstring(joined.translate(MARKS), dtype=np.int64, sep=",")
    begins, ends = numbers[::2], numbers[1::2]
    order = np.lexsort((ends, begins))
    first, last = begins[order], ends[order]
    if first[0] or (first[1:] != last[:-1]).any() or (last < first).any():
        raise _Unusual
    return begins, ends


def _sizes(dtypes: list[str], shapes: list[str]) -> np.ndarray:
    """Bytes that types and shapes make, int64."""
    kinds = list(zip(dtypes, shapes, strict=True))
    sizes = {}
    for dtype, shape in set(kinds):
        found = _SHAPE.fullmatch(shape)
        if found is None or dtype not in DTYPES or found[1].count(",") >= MAX_DIMENSIONS:
            raise _Unusual
        sizes[dtype, shape] = math.prod(_dimensions(shape)) * DTYPES[dtype].itemsize
    if max(sizes.values()) >= LARGEST:
        raise _Unusual
    return np.fromiter(map(sizes.__getitem__, kinds), dtype=np.int64, count=len(kinds))


def _dimensions(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape[2:-2].split(","))) if len(shape) > len(":[],") else ()
