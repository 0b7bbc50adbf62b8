"""What a quantised tensor is: a scheme and named arrays.

This is the one thing that travels between quantisers (which produce it), storage formats (which
pack and unpack it) and the hybrid runtime (which reads the packed form).  Affine integers are the
first kind; code books, FP8 blocks and others would be further scheme classes with arrays of their
own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class AffineScheme:
    """Integer codes with one scale and one zero point per row and group of input columns.

    weight[o, i] = scales[o, i // group] * (codes[o, i] - zeros[o, i // group])

    Arrays, each with optional leading batch dimensions (an expert dimension, usually):
      codes  uint8   [..., out, in]            0 <= code < 2**bits
      scales float16 [..., out, in / group]    finite, not 0; below 0 only if symmetric
      zeros  uint8   [..., out, in / group]    symmetric: 2**(bits-1) everywhere
    """

    kind: ClassVar[str] = "affine"

    bits: int
    group_size: int
    """Input columns that share a scale; -1: the whole row."""
    symmetric: bool

    def group(self, columns: int) -> int:
        """Columns per group of a matrix with `columns` inputs; ValueError if not a divisor."""
        size = columns if self.group_size == -1 else self.group_size
        if size <= 0 or columns % size:
            raise ValueError(f"group size {self.group_size} does not divide {columns} columns")
        return size


Scheme = AffineScheme
"""All scheme kinds (a union, once there are more)."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix, or a batch of equally shaped matrices, in quantised form."""

    scheme: Scheme
    arrays: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this stands for, `[..., out, in]`."""
        return tuple(self.arrays["codes"].shape)

    def __getitem__(self, index: int | slice) -> QuantizedTensor:
        """One matrix, or a range of matrices, of a batch."""
        return QuantizedTensor(self.scheme, {k: v[index] for k, v in self.arrays.items()})

    def select(self, indices: Sequence[int]) -> QuantizedTensor:
        """These matrices of a batch, in this order."""
        which = torch.tensor(indices, device=self.arrays["codes"].device)
        return QuantizedTensor(self.scheme, {k: v[which] for k, v in self.arrays.items()})

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Output rows [start, stop) of every matrix (gate and up are solved stacked)."""
        return QuantizedTensor(
            self.scheme, {k: v[..., start:stop, :] for k, v in self.arrays.items()}
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        return QuantizedTensor(self.scheme, {k: v.to(device) for k, v in self.arrays.items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight `[..., out, in]`, computed in float32 and rounded once to `dtype`."""
        codes, scales, zeros = (self.arrays[k] for k in ("codes", "scales", "zeros"))
        columns = codes.shape[-1]
        group = self.scheme.group(columns)
        shape = (*codes.shape[:-1], columns // group, group)
        centred = codes.reshape(shape).float() - zeros.unsqueeze(-1).float()
        return (centred * scales.unsqueeze(-1).float()).reshape(codes.shape).to(dtype)
