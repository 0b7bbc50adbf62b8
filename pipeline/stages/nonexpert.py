"""Shards of all tensors but the routed experts', out of what every layer has left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.header import read_header
from pipeline.checkpoint.split import plan_split
from pipeline.checkpoint.stored import DTYPES
from pipeline.checkpoint.writer import (
    Described,
    FileRecord,
    file_order,
    tensor_bytes,
    write_pieces,
)

NONEXPERT_BYTES = 4 << 30
"""Largest shard."""

PATTERN = "model-nonexpert-*.safetensors"

Sizes = dict[FileRecord, dict[str, int]]
"""Files, each with its tensors and their bytes."""


def write_nonexpert(root: Path, tensors: Described, read: Callable[[str], Tensor]) -> Sizes:
    """Write the tensors outside the routed experts as shards of at most NONEXPERT_BYTES each.

    `read` gives a tensor by name; two of them are in memory at once.
    """
    for stale in root.glob(PATTERN):
        stale.unlink()
    nbytes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    written: Sizes = {}
    for shard in plan_split(nbytes, NONEXPERT_BYTES):
        its = {name: tensors[name] for name in shard.tensors}
        order = file_order(its)
        pieces = map(tensor_bytes, _one_ahead(read, order))
        record = write_pieces(root / shard.name, its, order, pieces)
        written[record] = {name: nbytes[name] for name in shard.tensors}
    return written


def gather_nonexpert(root: Path, files: Sequence[str]) -> Sizes:
    """The same from tensors that lie in `files` of the directory, under their own names."""
    homes = {
        entry.name: (root / file, entry)
        for file in files
        for entry in read_header(root / file, file).entries
    }
    described = {name: (DTYPES[entry.dtype], entry.shape) for name, (_, entry) in homes.items()}

    def read(name: str) -> Tensor:
        with safe_open(homes[name][0], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return write_nonexpert(root, described, read)


def _one_ahead(read: Callable[[str], Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    """Tensors in the order of their names, each being read while the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="nonexpert") as beside:
        waiting = None
        for name in names:
            following = beside.submit(read, name)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
