"""How many CPU threads torch uses: one default for every verb, so that figures can be compared."""

from __future__ import annotations

import os

import psutil
import torch


def use_threads(wanted: int | None = None) -> None:
    """Set torch's thread count; without `wanted` one per physical core that we may run on."""
    allowed = len(os.sched_getaffinity(0))
    cores = psutil.cpu_count(logical=False) or allowed
    torch.set_num_threads(wanted or min(cores, allowed))
