"""A layer's experts as one file that is written tile by tile, while later tiles are still solved.

A file holds larger elements first and, within those, expert after expert.  So a tile's part of the
file is one stretch of bytes for each element size.  It is laid out on the device and travels to the
host in one copy, and nothing is done tensor by tensor but naming them in the header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.names import natural
from pipeline.checkpoint.writer import FileRecord, write_pieces

Name = Callable[[int, str], str]
"""(expert, projection) -> module name on disk."""


@dataclass(frozen=True)
class Part:
    """One stored part of a projection, equal for all experts."""

    projection: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedTile:
    """The stored bytes of some experts, on their way to the host."""

    stretches: tuple[tuple[tuple[Part, ...], Tensor], ...]
    """For each element size, largest first: the parts of an expert in the order of the file, and
    the bytes of all experts, uint8 [experts, bytes] in host memory."""
    arrived: torch.cuda.Event | None
    """Reached when the bytes are there; None: they are."""

    def wait(self) -> None:
        """Until the bytes are there."""
        if self.arrived is not None:
            self.arrived.synchronize()


def pack_tile(projections: Mapping[str, Mapping[str, Tensor]]) -> PackedTile:
    """Lay out packed parts [experts, ...] by projection, and send them to the host."""
    tensors = {
        Part(projection, name, tensor.dtype, tuple(tensor.shape[1:])): tensor
        for projection, parts in projections.items()
        for name, tensor in parts.items()
    }
    ordered = sorted(
        tensors, key=lambda p: (-p.dtype.itemsize, natural(f"{p.projection}.{p.name}"))
    )
    stretches = []
    arrived = None
    for size in dict.fromkeys(part.dtype.itemsize for part in ordered):
        parts = tuple(part for part in ordered if part.dtype.itemsize == size)
        raw = [tensors[part].contiguous().flatten(1).view(torch.uint8) for part in parts]
        joined = torch.cat(raw, dim=1)
        if joined.is_cuda:
            there = torch.empty(joined.shape, dtype=torch.uint8, pin_memory=True)
            joined = there.copy_(joined, non_blocking=True)
        stretches.append((parts, joined))
    if tensors[ordered[0]].is_cuda:
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(tensors[ordered[0]].device))
    return PackedTile(tuple(stretches), arrived)


def write_experts(path: Path, experts: int, name: Name, tiles: Iterator[PackedTile]) -> FileRecord:
    """Write a layer's file from its tiles, which come in order and together hold `experts`.

    The bytes are those of `write_safetensors` for the same tensors.  Only the largest elements are
    written at once; of the others (scales), a few per cent, all tiles' are kept until the end.
    """
    first = next(tiles)
    described = {}
    order = []
    for parts, _ in first.stretches:
        for expert in range(experts):
            for part in parts:
                stored = f"{name(expert, part.projection)}.{part.name}"
                described[stored] = (part.dtype, part.shape)
                order.append(stored)
    later: list[list[Tensor]] = [[] for _ in first.stretches[1:]]

    def pieces() -> Iterator[memoryview]:
        for tile in chain([first], tiles):
            tile.wait()
            yield _bytes(tile.stretches[0][1])
            for kept, (_, data) in zip(later, tile.stretches[1:], strict=True):
                kept.append(data)
        for kept in later:
            yield from map(_bytes, kept)

    return write_pieces(path, described, order, pieces())


def _bytes(data: Tensor) -> memoryview:
    view: memoryview = data.reshape(-1).numpy().data
    return view
