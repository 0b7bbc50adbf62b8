"""The one layout in which experts that a GPU computes are held, wherever they lie.

Codes of up to 4 bits two in a byte, neighbouring columns, the lower column in the low half; codes
of more bits one in a byte.  Rows are whole and contiguous, so a kernel reads each with wide loads,
over PCIe too, and an expert moves between host and device as plain bytes, never repacked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


@dataclass(frozen=True)
class PackedStack:
    """Equally shaped matrices `[N, out, in]` of one scheme.

    codes uint8 [N, out, in / 2] (up to 4 bits) or [N, out, in]; scales float16 and zeros uint8
    [N, out, groups].
    """

    scheme: AffineScheme
    columns: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def count(self) -> int:
        """Matrices in the stack."""
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        """Outputs of each matrix."""
        return self.codes.shape[1]

    @property
    def paired(self) -> bool:
        """Whether a byte holds two codes."""
        return self.scheme.bits <= 4

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def to(self, device: torch.device | str) -> PackedStack:
        """The same bytes on another device."""
        return self._with(*(array.to(device) for array in self._arrays()))

    def pinned(self) -> PackedStack:
        """The same bytes in page-locked host memory, which a GPU's kernels can read."""
        return self._with(*(array.pin_memory() for array in self._arrays()))

    def unpack(self) -> QuantizedTensor:
        """The matrices as they were before `pack`."""
        codes = self.codes
        if self.paired:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        arrays = {"codes": codes, "scales": self.scales, "zeros": self.zeros}
        return QuantizedTensor(self.scheme, arrays)

    def _arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.zeros

    def _with(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> PackedStack:
        return PackedStack(self.scheme, self.columns, codes, scales, zeros)


def packable(scheme: AffineScheme, columns: int) -> bool:
    """Whether a byte's codes always share a group, as the kernels take for granted."""
    return scheme.bits > 4 or scheme.group(columns) % 2 == 0


def pack(quantized: QuantizedTensor) -> PackedStack:
    """Take over a batch `[N, out, in]`; ValueError where `packable` says no."""
    codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
    columns = codes.shape[-1]
    if not packable(quantized.scheme, columns):
        raise ValueError(f"{quantized.scheme} has groups of an odd number of columns")
    if quantized.scheme.bits <= 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    arrays = (array.contiguous() for array in (codes, scales, zeros))
    return PackedStack(quantized.scheme, columns, *arrays)
