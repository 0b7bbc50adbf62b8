"""Decode steps, one file per architecture: its layers, taken through one token in fixed buffers.

An architecture without a file here decodes as transformers does it.
"""

# transformers' modules are known by the attributes they have, not by types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pipeline.hybrid.cache import FixedCache
from pipeline.registry import Registry


@dataclass(frozen=True)
class Frame:
    """What one step works on; all tensors stay where they are from step to step."""

    hidden: Tensor
    """[T, hidden], the residual stream."""
    rotary: tuple[Tensor, Tensor]
    """cos and sin, [T, 1, turned]."""
    position: Tensor
    """int64 [1]: where in the cache the token goes."""
    begins: Tensor
    """int64 [T]: where in the cache each sequence begins."""
    cache: FixedCache


Half = Callable[[Frame], Generator[Callable[[], None], None, None]]
"""Half a layer; yields what the CPU has to do in between."""


class Halves(Protocol):
    """Makes both halves of a decoder layer."""

    def __call__(self, layer: Any, number: int, frame: Frame, *, kernels: bool) -> list[Half]:
        """`number`: of the layer; `kernels`: fused where possible."""


STEPS: Registry[Halves] = Registry("pipeline.hybrid.steps", "decode step")
"""By the `model_type` of config.json."""
