"""Threads: how many torch uses, one default for every verb, and how they share the interpreter."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

SWITCH_SECONDS = 0.0005
"""After which a thread that runs Python makes way.  Those that read, write, digest or feed a GPU
hold the interpreter for microseconds; with Python's own 5 ms they wait a thousand times as long
whenever another one parses or counts."""

POLITE = 10
"""The system's niceness of a thread that makes way: a tenth of a processor beside one that does
not."""


def share_interpreter() -> None:
    """Let threads that do little Python have their turn soon."""
    sys.setswitchinterval(SWITCH_SECONDS)


def give_way() -> None:
    """Let all others have the processors first, for a thread that only digests: what goes on beside
    it, opening a source or looking at values, takes longer than the digests do."""
    with suppress(OSError):  # a system that lets nobody be polite
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), POLITE)


def use_threads(wanted: int | None = None) -> None:
    """Set torch's thread count; without `wanted` one per physical core that we may run on."""
    allowed = len(os.sched_getaffinity(0))
    cores = psutil.cpu_count(logical=False) or allowed
    torch.set_num_threads(wanted or least_of(min(cores, allowed)))
    share_interpreter()


def least_of(threads: int, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """So many threads, or as many whole cores' time as a container has (`docker run --cpus`), which
    `groups` says on Linux: one thread more, and all are stopped for a part of every tenth of a
    second, while some wait for others."""
    return max(1, int(min(threads, _quota(groups))))


def _quota(groups: Path) -> float:
    """Cores' worth of time of the topmost control group, a container's own within it."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((groups / name).read_text() for name in names).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError):
            continue  # not this version's files
    return math.inf


@contextmanager
def single_threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which torch has one; those not done are dropped at the end."""
    everywhere = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, name, initializer=use_inside, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # What a thread sets holds for itself, and for all threads that begin after it.
        torch.set_num_threads(everywhere)


def use_inside(threads: int) -> None:
    """Set torch's threads within the thread that this is called in."""
    torch.get_num_threads()  # a new thread takes the process's number when it first asks
    torch.set_num_threads(threads)
