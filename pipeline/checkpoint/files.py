"""Bytes of tensors out of the files of a directory, many at a time; safe to share by threads."""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.index import resolve_inside
from pipeline.checkpoint.stored import DTYPES, TensorEntry
from pipeline.errors import CheckpointError
from pipeline.system_errors import advice

PIECE_BYTES = 8 << 20
"""Read at once of a tensor that is only looked at."""

GAP_BYTES = 64 * 1024
"""Bytes worth reading and dropping to save one call (a matrix's small parts lie a few kB apart)."""

Memory = Callable[[int], Tensor]
"""Gives so many bytes on the CPU, uint8, to read into."""


def fresh(nbytes: int) -> Tensor:
    """Memory of nobody else."""
    return torch.empty(nbytes, dtype=torch.uint8)


def page_locked(nbytes: int) -> Tensor:
    """The same, from where a GPU fetches bytes without a copy in between."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=nbytes > 0)


@dataclass(frozen=True)
class Gathered:
    """Bytes of many tensors in one buffer."""

    data: Tensor
    """uint8, on any device."""
    places: Mapping[str, int]
    """Stored name -> first byte in `data`."""

    def to(self, device: torch.device | str) -> Gathered:
        """The same bytes on a device; from pinned memory the copy is asynchronous."""
        return Gathered(self.data.to(device, non_blocking=True), self.places)

    def stack(self, entries: Sequence[TensorEntry]) -> Tensor:
        """Tensors of equal dtype and shape as one `[N, *shape]`, a copy but for a single one."""
        first = entries[0]
        if any(e.dtype != first.dtype or e.shape != first.shape for e in entries):
            raise ValueError(f"{first.name} and others to be stacked differ in dtype or shape")
        dtype = DTYPES[first.dtype]
        shape = (len(entries), *first.shape)
        if not first.nbytes:
            return torch.empty(shape, dtype=dtype, device=self.data.device)
        places = [self.places[entry.name] for entry in entries]
        rows = [self.data[place : place + first.nbytes] for place in places]
        aligned = len(rows) == 1 and places[0] % dtype.itemsize == 0
        stacked = rows[0] if aligned else torch.stack(rows)
        return stacked.view(dtype).view(shape)


class TensorFiles:
    """Open files of one model directory, read at absolute offsets (pread: no shared position)."""

    def __init__(self, paths: dict[str, str]) -> None:
        """`paths`: file name as entries give it -> real path."""
        self._paths = paths
        self.bytes_read = 0
        """So far; threads that read at once may make it a little less than it was."""
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def of(cls, directory: Path, files: Sequence[str]) -> TensorFiles:
        """The files of a directory, each checked to lie inside it."""
        return cls({file: str(resolve_inside(directory, file)) for file in files})

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            _close_all(self._descriptors)

    def read(self, entries: Sequence[TensorEntry]) -> list[bytes]:
        """The bytes of each entry, in the order given; meant for small tensors."""
        found: list[bytes] = [b""] * len(entries)
        for file, start, stop, members in _runs(entries):
            blob = self._bytes(file, start, stop - start)
            for index in members:
                begin = entries[index].offset - start
                found[index] = blob[begin : begin + entries[index].nbytes]
        return found

    def gather(self, entries: Sequence[TensorEntry], memory: Memory = fresh) -> Gathered:
        """The bytes of many tensors in one buffer from `memory`, read with few large calls.

        Raises CheckpointError when a file has become shorter or unreadable.
        """
        runs = list(_runs(entries))
        total = sum(stop - start for _, start, stop, _ in runs)
        data = memory(total)
        target = data.numpy().data
        places = [0] * len(entries)
        base = 0
        for file, start, stop, members in runs:
            self._fill(file, start, target[base : base + stop - start])
            for index in members:
                places[index] = base + entries[index].offset - start
            base += stop - start
        found = {entry.name: place for entry, place in zip(entries, places, strict=True)}
        return Gathered(data, found)

    def pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        """A tensor's elements in order, flat, some at a time; each piece takes the place of the
        one before.

        Raises CheckpointError as `gather` does.
        """
        dtype = DTYPES[entry.dtype]
        buffer = torch.empty(min(PIECE_BYTES, entry.nbytes), dtype=torch.uint8)
        for start in range(0, entry.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, entry.nbytes - start)]
            self._fill(entry.file, entry.offset + start, piece.numpy().data)
            yield piece.view(dtype)

    def _bytes(self, file: str, offset: int, count: int) -> bytes:
        with suppress(OSError):
            blob = os.pread(self._descriptor(file), count, offset)
            if len(blob) == count:  # small reads nearly always are whole
                self.bytes_read += count
                return blob
        data = bytearray(count)
        self._fill(file, offset, memoryview(data))
        return bytes(data)

    def _fill(self, file: str, offset: int, target: memoryview) -> None:
        descriptor = self._descriptor(file)
        done = 0
        while done < len(target):
            try:
                count = os.preadv(descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{file}: cannot be read ({error.strerror}){advice(error)}"
                ) from error
            if count == 0:
                raise CheckpointError(f"{file}: ends before byte {offset + len(target):,}; it has "
                                      "been changed since it was opened; put the old file back, "
                                      "then give the same command again")  # fmt: skip
            done += count
        self.bytes_read += len(target)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            descriptor = self._descriptors.get(file)
            if descriptor is None:
                try:
                    descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(
                        f"{file}: cannot be opened ({error.strerror}){advice(error)}"
                    ) from error
                self._descriptors[file] = descriptor
            return descriptor


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _runs(entries: Sequence[TensorEntry]) -> Iterator[tuple[str, int, int, list[int]]]:
    """(file, start, stop, indices) of byte ranges that hold neighbouring entries."""
    by_file: dict[str, list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        by_file[entry.file].append(index)
    for file, indices in by_file.items():
        indices.sort(key=lambda i: entries[i].offset)
        run: list[int] = []
        start = stop = 0
        for index in indices:
            entry = entries[index]
            if run and entry.offset - stop > GAP_BYTES:
                yield file, start, stop, run
                run = []
            if not run:
                start = stop = entry.offset
            run.append(index)
            stop = max(stop, entry.offset + entry.nbytes)
        yield file, start, stop, run
