"""8 bits on the CPU as two 4-bit halves, through the same kernel as `int4pack`.

A code is 16 * high + low, so

    s * (code - zero) = 16 s * (high - 8) + s * (low - 8) + s * (136 - zero)

is two of the kernel's products, with the constant given to the high half.  Symmetric codes
have zero = 128 and the constant 8 s, exact in bfloat16; others are rounded, see `int4pack`.  Both
halves are centred, so the low product is small and its rounding does not show.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.hybrid.backends import BACKENDS
from pipeline.hybrid.backends.int4pack import kernel_pairs, kernel_takes, pack_codes
from pipeline.quantize.tensor import QuantizedTensor, Scheme


class HalvesMatrices:
    """A stack as high and low halves; see `Matrices`."""

    device = torch.device("cpu")

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
        self._high, self._low = pack_codes(codes >> 4), pack_codes(codes & 15)
        columns = codes.shape[-1]
        # in float32: 16 s leaves float16's range, and the offset counts in sixteenths of 16 s
        coarse, offsets = scales.float() * 16, (136 - zeros.float()) / 16
        self._group, self._coarse = kernel_pairs(coarse, offsets, columns, dtype)
        _, self._fine = kernel_pairs(scales, torch.zeros_like(zeros), columns, dtype)
        parts = (self._high, self._low, self._coarse, self._fine)
        self.nbytes = sum(part.nbytes for part in parts)
        self.rounded_scales = bool((scales.to(dtype) != scales).any())

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """See `Matrices.multiply`."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        high: Tensor = product(x, self._high[index], self._group, self._coarse[index])
        low: Tensor = product(x, self._low[index], self._group, self._fine[index])
        return high + low


class Int4Halves:
    """See the module's description."""

    name = "int4halves"
    rank = 20

    def accepts(self, scheme: Scheme, rows: int, columns: int, device: torch.device) -> bool:
        """See `Backend.accepts`."""
        return kernel_takes(scheme, rows, columns, device) and scheme.bits == 8

    def pack(self, quantized: QuantizedTensor, dtype: torch.dtype) -> HalvesMatrices:
        """See `Backend.pack`."""
        return HalvesMatrices(quantized, dtype)


BACKENDS.register(Int4Halves.name, Int4Halves())
