"""SHA256SUMS: the seal of a finished directory, in the format of coreutils' `sha256sum`."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.checkpoint.index import resolve_inside
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.untrusted import SMALL, read_limited, shown
from pipeline.checkpoint.writer import FileRecord, write_bytes
from pipeline.errors import CheckpointError
from pipeline.threads import give_way

THREADS = min(16, os.cpu_count() or 1)
"""Files digested at once."""

BLOCK_BYTES = 32 << 20
"""Read and digested at once.  Between two blocks a thread asks for the interpreter, and waits while
others run Python."""

SUMS_NAME = "SHA256SUMS"
UNSEALED = (
    "recipe.yaml",
    "recipe.resolved.yaml",
    "conversion.json",
    "report.json",
    "report.html",
    "README.md",
)
"""Files that may change after the seal; they have seals of their own (`seal.py`)."""
ADDED = ("LICENSE",)
"""Sealed where it is there; it may also be added to a directory later."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def digest_file(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file, hexadecimal; "" once `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        block = memoryview(bytearray(max(1, min(BLOCK_BYTES, size))))
        while count := stream.readinto(block):
            if stop is not None and stop.is_set():
                return ""
            digest.update(block[:count])
    return digest.hexdigest()


class EarlyDigests:
    """Digests of files, begun before anybody asks; a context manager, which ends them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, "digests", initializer=give_way)
        self._begun = {path: self._pool.submit(self._digest, path) for path in paths}

    def __enter__(self) -> EarlyDigests:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def of(self, path: Path) -> str:
        """SHA-256 of a file as it is now, whether it was begun or has changed since or not."""
        begun = self._begun.get(path)
        if begun is not None and not self._stop.is_set():
            known, digest = begun.result()
            if known == identity(path):
                return digest
        return digest_file(path)

    def _digest(self, path: Path) -> tuple[dict[str, int], str]:
        return identity(path), digest_file(path, self._stop)


def identity(path: Path) -> dict[str, int]:
    """Size and time of change: equal ones spare reading the file again."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def sealed_files(directory: Path) -> list[str]:
    """Files of a directory that a seal covers, sorted: all but hidden and unsealed ones."""
    found = []
    for path in directory.rglob("*"):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and str(relative) not in (SUMS_NAME, *UNSEALED):
            found.append(relative.as_posix())
    return sorted(found)


def write_sums(directory: Path, known: Mapping[str, str] | None = None) -> FileRecord:
    """Seal a directory; `known` spares reading files digested while they were written.

    Raises ValueError for a file name that the format can only hold escaped.
    """
    lines = []
    for name in sealed_files(directory):
        if "\n" in name or "\\" in name:
            raise ValueError(f"{name!r} cannot be listed in {SUMS_NAME}")
        digest = (known or {}).get(name) or digest_file(directory / name)
        lines.append(f"{digest}  {name}\n")
    return write_bytes(directory / SUMS_NAME, "".join(lines).encode())


def read_sums(directory: Path) -> dict[str, str]:
    """File name -> digest; CheckpointError when SHA256SUMS is missing or has another form."""
    try:
        data = read_limited(resolve_inside(directory, SUMS_NAME), SUMS_NAME, SMALL)
        # By line feeds alone: `splitlines` would pass over one that a flipped bit has changed.
        *lines, rest = data.decode("utf-8").split("\n")
    except (OSError, CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory}: {SUMS_NAME} cannot be read") from error
    sums: dict[str, str] = {}
    for number, line in enumerate([*lines, *([rest] if rest else [])], 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{SUMS_NAME}: line {number} is not `digest  name`")
        if match[2] in sums:
            raise CheckpointError(f"{SUMS_NAME}: lists {shown(match[2])} twice")
        sums[match[2]] = match[1]
    return sums


def check_sums(
    directory: Path,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _message: None,
) -> list[Problem]:
    """Files changed, missing and extra (only `names`, where given: neither extra nor others).

    `progress` is told of each file before it is read.
    """
    try:
        sums = read_sums(directory)
    except CheckpointError as error:
        return [Problem(SUMS_NAME, str(error))]
    chosen = {n: d for n, d in sums.items() if names is None or n in names}
    problems = []
    # The longest first: none of them is begun when others have nothing left to do.
    order = sorted(chosen, key=lambda name: _size(directory / name), reverse=True)
    with ThreadPoolExecutor(THREADS, "sums", initializer=give_way) as pool:
        checked = {n: pool.submit(_check_sum, directory, n, chosen[n]) for n in order}
        for name in chosen:
            progress(f"checksum of {name}")
            problem = checked[name].result()
            problems += [] if problem is None else [problem]
    if names is None:
        extra = [name for name in sealed_files(directory) if name not in (*sums, *ADDED)]
        problems += [Problem(name, f"not listed in {SUMS_NAME}") for name in extra]
    return problems


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # told of by whoever reads it
        return 0


def _check_sum(directory: Path, name: str, digest: str) -> Problem | None:
    try:
        path = resolve_inside(directory, name)
    except CheckpointError:
        return Problem(name, f"listed in {SUMS_NAME}, but not in the directory")
    if digest_file(path) != digest:
        return Problem(name, f"its SHA-256 is not the one in {SUMS_NAME}")
    return None
