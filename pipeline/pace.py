"""How fast a machine converts: short probes, and what part of them real work reaches.

A plan reckons with these; docs/performance.md holds them against what was measured.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.checkpoint.sums import THREADS

DISK_BYTES_PER_SECOND = 1.2e9
"""Writing with a checksum, and reading what no cache holds.  A machine with an H200 wrote 1.2 GB/s
with one writer, and read 45 GB that no cache held at 0.95 to 1.4 (2026-11-26)."""

JOB_SECONDS = 0.1
"""What any job takes, however small: launches, small tensors, file operations."""

PROBE_PIECES = 16
PROBE_BYTES = 4 << 20
"""How much of a source is read to know how fast it is read: pieces, and bytes of each."""

PROBE_SECONDS = 0.1
"""For how long products are tried."""


@dataclass(frozen=True)
class Pace:
    """What of its probed rates a kind of device reaches in a conversion."""

    exact: float
    """Part of the float32 rate that the solver's operations reach."""
    half: float
    """Part of the bfloat16 rate that forward passes and sums over tokens reach."""
    step_seconds: float
    """What the solver takes for a column of a tile, however few experts the tile has."""


PACES = {"cuda": Pace(1.0, 1 / 3, 5e-6), "cpu": Pace(1 / 3, 1 / 3, 0.0)}
"""By kind of device.

On an H200 (51 TFLOP/s in float32, 690 in bfloat16; 2026-11-26, commit c68d6b1, 128 x 2048 tokens)
a layer of 512 experts took 2.69 to 2.84 s, of 128 2.11, of 64 2.05.  So the 3.5e13 operations that
512 experts take more than 64 go at the float32 rate itself: products over tensor cores are faster,
which makes up for all else.  Of the 1.95 s that do not depend on the experts 0.7 are the 1.6e14
bfloat16 operations, by a layer of half the tokens, and the rest goes to 16 tiles of 5,120 columns,
those of down once for each of six blocks of rows, three times over: they follow each other,
whatever the number of experts.  On a CPU such steps are no time to speak of, and its part is that
of the demo on two cores."""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in products of a type.

    The best of several tries counts, as whatever else the machine does only slows them.
    """
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    clock = _device_seconds if device.type == "cuda" else _seconds
    clock(lambda: a @ a)
    best = float("inf")
    deadline = time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < deadline:
        best = min(best, clock(lambda: a @ a))
    return 2.0 * n**3 / best


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _device_seconds(work: Callable[[], object]) -> float:
    """By the device's own clock: threads that compile kernels for it keep this one waiting."""
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


def read_rate(paths: Sequence[Path]) -> float:
    """Bytes a second at which files are read with a checksum, as many at once as a run reads.

    Pieces at random places tell whether the files are in memory or on a disk.  Files of no size to
    speak of are not tried.
    """
    sizes = [path.stat().st_size for path in paths]
    if sum(sizes) < PROBE_PIECES * PROBE_BYTES:
        return DISK_BYTES_PER_SECOND
    draw = random.Random()
    chosen = draw.choices(list(zip(paths, sizes, strict=True)), sizes, k=PROBE_PIECES)
    starts = [draw.randrange(max(1, size - PROBE_BYTES)) for _, size in chosen]
    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        read = sum(pool.map(_digest, [path for path, _ in chosen], starts))
        return read / (time.perf_counter() - began)


def _digest(path: Path, start: int) -> int:
    """Bytes read and digested."""
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        data = stream.read(PROBE_BYTES)
    hashlib.sha256(data)
    return len(data)
