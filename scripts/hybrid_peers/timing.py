"""One side of a comparison: how it reads a prompt and decodes, as one line of JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

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


class Plain:
    """A transformers model decoding as transformers does, on a cache that grows."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._last = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._cache: Any = None

    def read(self, ids: Tensor) -> Tensor:
        """See `Read`."""
        self._cache = DynamicCache(config=self._model.config)
        return self._forward(ids.to(self._device))

    def step(self) -> None:
        """See `Step`."""
        self._forward(self._last)

    def _forward(self, ids: Tensor) -> Tensor:
        model: Any = self._model
        out = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._last = out.logits[:, -1:].argmax(-1)
        logits: Tensor = out.logits[:, -1]
        return logits


@dataclass(frozen=True)
class Speed:
    """Tokens per second, by the clock and by what the process's threads were busy.

    On a machine that others use, one thread's busy time is the figure that still means something;
    threads that wait for each other spin, and are busy then as well.
    """

    decode: float
    prefill: float
    decode_busy: float
    prefill_busy: float


def speeds(read: Read, step: Step, ids: Tensor, steps: int, wait: Step) -> Speed:
    """Of greedy decoding behind SHORT tokens, by the median step; of all of `ids`, the second time.

    wait: returns when a GPU, if there is one, has done what it was given.
    """
    for _ in range(2):
        prefill = _timed(lambda: read(ids), wait)
    read(ids[:, :SHORT])
    taken = [_timed(step, wait) for _ in range(WARM + steps)][WARM:]
    clock, busy = (statistics.median(column) for column in zip(*taken, strict=True))
    return Speed(1 / clock, ids.shape[1] / prefill[0], 1 / busy, ids.shape[1] / prefill[1])


def _timed(call: Step, wait: Step) -> tuple[float, float]:
    clock, busy = time.perf_counter(), time.process_time()
    call()
    wait()
    return time.perf_counter() - clock, time.process_time() - busy


def say(side: str, speed: Speed, note: str = "") -> None:
    """What `table.py` reads."""
    print(json.dumps({"side": side, "note": note} | asdict(speed)))
