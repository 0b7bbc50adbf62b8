"""Shards of all tensors but the routed experts', out of what every layer has left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.header import read_header
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.split import Shard, plan_split
from pipeline.checkpoint.stored import DTYPES
from pipeline.checkpoint.writer import (
    Described,
    FileRecord,
    file_order,
    tensor_bytes,
    write_pieces,
)

NONEXPERT_BYTES = 1 << 30
"""Largest shard.  Several are written side by side, and digested by whoever verifies them: one file
of 4 GiB took longer than the rest of a verification."""

AT_ONCE = 4
"""Shards written at once; a disk that took 1.2 GB/s from one writer took 2.2 from four
(docs/performance.md)."""

PATTERN = "model-nonexpert-*.safetensors"

Sizes = dict[FileRecord, dict[str, int]]
"""Files, each with its tensors and their bytes."""


def write_nonexpert(root: Path, tensors: Described, read: Callable[[str], Tensor]) -> Sizes:
    """Write the tensors outside the routed experts as shards of at most NONEXPERT_BYTES each.

    `read` gives a tensor by name, to several threads; two of each shard that is being written are
    in memory at once.
    """
    for stale in root.glob(PATTERN):
        stale.unlink()
    nbytes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}

    def write(shard: Shard) -> FileRecord:
        its = {name: tensors[name] for name in shard.tensors}
        order = file_order(its)
        pieces = map(tensor_bytes, _one_ahead(read, order))
        return write_pieces(root / shard.name, its, order, pieces)

    shards = plan_split(nbytes, NONEXPERT_BYTES)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shards") as pool:
        records = list(pool.map(write, shards))
    return {
        record: {name: nbytes[name] for name in shard.tensors}
        for record, shard in zip(records, shards, strict=True)
    }


def gather_nonexpert(
    root: Path, files: Sequence[str], source: Checkpoint, outer: Sequence[str]
) -> Sizes:
    """The same from tensors that lie in `files` of the directory, under their own names, and from
    the `outer` ones of the source, decoded."""
    homes = {
        entry.name: (root / file, entry)
        for file in files
        for entry in read_header(root / file, file).entries
    }
    described = {name: (DTYPES[entry.dtype], entry.shape) for name, (_, entry) in homes.items()}
    source.check_states(outer)
    for name in outer:
        weight = source.weights[name]
        assert weight.dtype is not None
        assert weight.shape is not None
        described[name] = (weight.dtype, tuple(weight.shape))

    def read(name: str) -> Tensor:
        if name not in homes:
            return source.load(name)
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
