"""How a quantised matrix is multiplied by: one file a back end.

A back end takes a stack of equally shaped matrices (a layer's experts, or a stack of one for a
linear layer), keeps it in the one layout it multiplies by, and lets go of everything else.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pipeline.quantize.tensor import QuantizedTensor, Scheme
from pipeline.registry import Registry


class Matrices(Protocol):
    """Equally shaped matrices W[i], each `[out, in]`, ready to be multiplied by."""

    device: torch.device
    """Where they live and where `multiply` wants its input."""
    nbytes: int
    """Bytes they take there."""
    rounded_scales: bool
    """Whether scales of the checkpoint had to be rounded to the compute dtype."""

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """x [tokens, in] -> x @ W[index].T, [tokens, out], in the dtype they were packed for."""


class Backend(Protocol):
    """One way to multiply; registered by name."""

    name: str
    rank: int
    """The first in rising order that accepts a matrix gets it."""

    def accepts(self, scheme: Scheme, rows: int, columns: int, device: torch.device) -> bool:
        """Whether matrices `[rows, columns]` of that scheme can be multiplied on that device."""

    def pack(self, quantized: QuantizedTensor, dtype: torch.dtype) -> Matrices:
        """Take over a batch `[N, out, in]`, on the device it is on; `dtype`: bfloat16 or float32,
        that of all inputs and outputs."""


BACKENDS: Registry[Backend] = Registry("pipeline.hybrid.backends", "back end")


def choose(scheme: Scheme, rows: int, columns: int, device: torch.device) -> Backend:
    """The best back end for matrices of that kind; there always is one."""
    members = sorted((BACKENDS[name] for name in BACKENDS), key=lambda backend: backend.rank)
    return next(b for b in members if b.accepts(scheme, rows, columns, device))
