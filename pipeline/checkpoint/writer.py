"""Writing files that are whole or not there, with the same bytes every time.

Own writer instead of `safetensors.torch.save_file`: that one holds all tensors as bytes at once,
leaves files at mode 0600, and the digest would need a second read of the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipeline.checkpoint.names import natural
from pipeline.checkpoint.seal import json_bytes
from pipeline.checkpoint.stored import DTYPE_NAMES
from pipeline.errors import OutputError
from pipeline.system_errors import advice

CHUNK_BYTES = 16 * 1024 * 1024

FLUSH_BYTES = 128 << 20
"""Written before the disk is set to work on them: left to the end, all of a file would be waited
for, and the disk would have done nothing before."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no room for a file, or may not be."""

_LEFT = re.compile(r"\..+\.(\d+)\.tmp")
"""What `_atomic` calls a file until it is whole: name and process."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    name: str
    size: int
    sha256: str


class _Digest:
    """Counts and digests what passes to a stream; large pieces are digested while written.

    `beside`: two threads, for digests and for flushing.
    """

    def __init__(self, stream: BinaryIO, beside: ThreadPoolExecutor) -> None:
        self.stream = stream
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._beside = beside
        self._flushed: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: bytes | memoryview) -> None:
        if len(data) < CHUNK_BYTES // 16:
            self.sha256.update(data)
            self._store(data)
        else:
            digested = self._beside.submit(self.sha256.update, data)
            self._store(data)
            digested.result()
        self.size += len(data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
            self.flushed()
            self._flushed = self._beside.submit(os.fdatasync, self.stream.fileno())
            self._unflushed = 0

    def flushed(self) -> None:
        """Wait for the flushing that was begun; OSError where it failed."""
        if self._flushed is not None:
            self._flushed.result()

    def _store(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            done = 0
            while done < len(chunk):  # an unbuffered write may stop short, on a full disk say
                done += self.stream.write(chunk[done:])


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[_Digest]:
    """A stream to a file beside `path` that takes its place once flushed to the disk.

    After an error the old file, if any, is as it was.  The lock on it lasts as long as the process:
    `sweep` tells by it what a killed one has left.  Mode 0666 less the umask, as for any other
    new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with (
            os.fdopen(os.open(temporary, flags, 0o666), "wb", buffering=0) as stream,
            ThreadPoolExecutor(2, thread_name_prefix="digest") as beside,
        ):
            with contextlib.suppress(OSError):  # a file system without locks: nothing is swept
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            digest = _Digest(stream, beside)
            yield digest
            digest.flushed()
            os.fsync(stream.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        full = error.errno in FULL
        helps = "; make room and give the same command again" if full else advice(error)
        raise OutputError(f"{path}: cannot be written ({error.strerror}){helps}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Delete the half-written files that killed processes have left in a folder.

    Left alone: what a process writes that still runs, here or in another container, and whatever
    is no plain file or cannot be opened or locked.
    """
    for path in folder.glob(".*.tmp"):
        match = _LEFT.fullmatch(path.name)
        if match is None or (int(match[1]) != os.getpid() and Path(f"/proc/{match[1]}").exists()):
            continue
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(path, flags), "rb", buffering=0) as stream:
                if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file atomically; OutputError when the disk refuses."""
    with _atomic(path) as digest:
        digest.write(data)
    return FileRecord(path.name, digest.size, digest.sha256.hexdigest())


def write_json(path: Path, table: Mapping[str, Any]) -> FileRecord:
    """Write a table as indented JSON, keys in the order given; ValueError for NaN and Inf."""
    return write_bytes(path, json_bytes(table))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write tensors (any device; views are made contiguous one at a time) and digest them.

    Larger element types come first, so that every tensor is aligned, then names in natural order:
    equal tensors make equal bytes whatever order they were given in.  `metadata` is written with
    `format: pt`, which transformers insists on.  Raises OutputError when the disk refuses.
    """
    described = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in tensors}
    order = file_order(described)
    with _atomic(path) as digest:
        digest.write(_header(described, order, metadata))
        for name in order:
            digest.write(tensor_bytes(tensors[name]))
    return FileRecord(path.name, digest.size, digest.sha256.hexdigest())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """What a file holds of a tensor, which may be on any device and a view."""
    plain = tensor.detach().cpu().contiguous()
    if not plain.numel():
        return memoryview(b"")
    data: memoryview = plain.view(-1).view(torch.uint8).numpy().data
    return data


Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensors by name, as dtype and shape."""


def file_order(tensors: Described) -> list[str]:
    """Names in the order of a file: larger elements first, then natural order."""
    return sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, natural(name)))


def write_pieces(
    path: Path, tensors: Described, order: Sequence[str], pieces: Iterable[memoryview]
) -> FileRecord:
    """Write a file whose bytes come piece by piece, in `order` (as `file_order` gives it).

    Equal to `write_safetensors` of the same tensors, which need not be in memory all at once.
    Raises ValueError when the pieces are not as long as the tensors, OutputError when the disk
    refuses, and whatever `pieces` raises; the file is not there then.
    """
    header = _header(tensors, order, None)
    total = len(header) + sum(math.prod(tensors[n][1]) * tensors[n][0].itemsize for n in order)
    with _atomic(path) as digest:
        digest.write(header)
        for piece in pieces:
            digest.write(piece)
        if digest.size != total:
            raise ValueError(f"{path}: {digest.size:,} bytes were given, {total:,} expected")
    return FileRecord(path.name, digest.size, digest.sha256.hexdigest())


def _header(tensors: Described, order: Sequence[str], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))
    }
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
