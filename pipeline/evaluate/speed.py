"""How fast a loaded model decodes and reads prompts, and how much memory the process took."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and peak memory in bytes since the process began.

    peak_device_bytes counts what torch allocated on CUDA devices; 0 without one.  The CUDA context
    (some 0.5 GiB) comes on top.
    """

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_tokens: int
    prefill_tokens: int
    peak_host_bytes: int
    peak_device_bytes: int


def timed(load: Callable[[], T]) -> tuple[T, float]:
    """What `load` returns and the seconds it took, copies to a GPU included."""
    started = time.perf_counter()
    loaded = load()
    _synchronise()
    return loaded, time.perf_counter() - started


def measure(
    model: PreTrainedModel,
    prompt: Tensor,
    *,
    decode_tokens: int = 64,
    warmup_tokens: int = 8,
    repeats: int = 2,
) -> Speed:
    """Measure greedy decoding at batch 1 through `model.generate`, and prefill of `prompt`.

    prompt: token ids, int64 [t], ideally text of the kind the model is for, since experts are
    routed by content.  Decoding is timed from token to token after `warmup_tokens`, so the prompt
    is not in it; the sampling loop of `generate` is.  Prefill is one forward pass over the prompt
    that keeps the last logits only.  The best of `repeats` counts for both, as anything else the
    machine does only slows them down; a first prefill for warm-up is not counted.
    """
    ids = prompt.reshape(1, -1).to(model.device)
    with torch.inference_mode():
        _prefill_seconds(model, ids)
        prefill = min(_prefill_seconds(model, ids) for _ in range(repeats))
        decode = min(
            _decode_seconds(model, ids, decode_tokens, warmup_tokens) for _ in range(repeats)
        )
    return Speed(
        decode_tokens_per_second=decode_tokens / decode,
        prefill_tokens_per_second=ids.shape[1] / prefill,
        decode_tokens=decode_tokens,
        prefill_tokens=int(ids.shape[1]),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
    )


def reset_peaks() -> None:
    """Let both peaks count from now on; that of the host where the system can (Linux)."""
    if torch.cuda.is_available():  # what nobody holds any more is no part of what comes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Refused in some containers: the peak then counts from the start of the process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_host_bytes() -> int:
    """Most resident memory this process has had since `reset_peaks`, or since it began;
    memory-mapped pages included."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_device_bytes() -> int:
    """Most memory torch ever held allocated on CUDA devices, all of them together."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


class _Clock(BaseStreamer):
    """Notes when each token is there; `generate` hands over the prompt first, then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """One call per step; the token has been copied to the CPU, so the step is done."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _decode_seconds(model: PreTrainedModel, ids: Tensor, tokens: int, warmup: int) -> float:
    clock = _Clock()
    steps = 1 + warmup + tokens  # the first token comes out of the prefill
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        min_new_tokens=steps,  # an end token must not cut the measurement short
        do_sample=False,
        streamer=clock,
    )
    made = clock.times[1:]  # without the prompt
    return made[-1] - made[-1 - tokens]


def _prefill_seconds(model: PreTrainedModel, ids: Tensor) -> float:
    _synchronise()
    started = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
