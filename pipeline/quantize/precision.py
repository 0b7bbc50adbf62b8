"""Full float32 matrix products, whatever the process has switched on.

TF32 (and oneDNN's bfloat16 mode) changes a few per cent of the codes, and whether it is on depends
on what the embedding program did earlier.  Solvers therefore run with both off and put the settings
back, so that their result depends on the numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


def float32_products() -> dict[str, str]:
    """How the process computes float32 products outside the solver, by torch's own names, whether
    or not some thread is inside at the moment.

    "tf32" or "bf16" where they are rounded first, "ieee" where not.
    """
    with _Inside.lock:
        cuda, cpu = _Inside.before if _Inside.count else _settings()
    set_to = {"cuda": cuda, "cpu": cpu}
    # "none" is torch's default and computes the same; it is "ieee" once anybody has put it back.
    return {device: "ieee" if name == "none" else name for device, name in set_to.items()}


def _settings() -> tuple[str, str]:
    """On CUDA and on CPU, as they are now."""
    # Only the fp32_precision names (torch 2.9 on): after one of them was written, torch refuses to
    # read the older allow_tf32 spelling of the same switch.
    backends: Any = torch.backends
    return str(backends.cuda.matmul.fp32_precision), str(backends.mkldnn.matmul.fp32_precision)


class _Inside:
    """How many threads are in `full_float32`, and what the settings were before the first."""

    lock = Lock()
    count = 0
    before: tuple[str, str] = ("none", "none")


@contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 matrix products in IEEE float32 on CUDA and on CPU; restores the settings.

    They are the process's: where several threads are inside, the last one out restores.
    """
    backends: Any = torch.backends
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    with _Inside.lock:
        if not _Inside.count:
            _Inside.before = _settings()
            cuda.fp32_precision = cpu.fp32_precision = "ieee"
        _Inside.count += 1
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.count -= 1
            if not _Inside.count:
                cuda.fp32_precision, cpu.fp32_precision = _Inside.before
