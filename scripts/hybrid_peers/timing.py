"""One side of a comparison: how it reads a prompt and decodes, as one line of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

PROMPT, SHORT = 512, 128
"""Tokens of the prompt whose reading is timed, and of the one that decoding is timed behind."""
WARM = 3

Read = Callable[[Tensor], Tensor]
"""int64 [1, n] -> logits [1, vocabulary] behind the last; begins anew."""
Step = Callable[[], object]
"""One greedy token more."""


def prompt(vocabulary: int) -> Tensor:
    """int64 [1, PROMPT]; the same every time."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(5, vocabulary, (1, PROMPT), generator=generator)


def speeds(read: Read, step: Step, ids: Tensor, steps: int, wait: Step) -> tuple[float, float]:
    """Tokens per second: greedy, behind SHORT tokens; and of all of `ids`, the second time."""
    prefill = 0.0
    for _ in range(2):
        started = time.perf_counter()
        read(ids)
        wait()
        prefill = ids.shape[1] / (time.perf_counter() - started)
    read(ids[:, :SHORT])
    for _ in range(WARM):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return steps / (time.perf_counter() - started), prefill


def say(side: str, decode: float, prefill: float, note: str = "") -> None:
    """What `table.py` reads."""
    print(json.dumps({"side": side, "decode": decode, "prefill": prefill, "note": note}))
