"""5 to 8 bits on the CPU as two 4-bit halves, through the same kernel as `int4pack`.

A code is 16 * high + low, so

    s * (code - zero) = 16 s * (high - 8) + s * (low - 8) + s * (136 - zero)

is two of the kernel's products, with the constant given to the high half.  Symmetric 8-bit codes
have zero = 128 and the constant 8 s, exact in bfloat16; for others see `GroupPairs`.  Both halves
are centred, so the low product is small and its rounding does not show.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.hybrid.backends import BACKENDS
from pipeline.hybrid.backends.int4pack import GroupPairs, kernel_takes, pack_codes
from pipeline.quantize.tensor import QuantizedTensor, Scheme


class HalvesMatrices:
    """A stack as high and low halves; see `Matrices`."""

    device = torch.device("cpu")

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
        self._high, self._low = pack_codes(codes >> 4), pack_codes(codes & 15)
        columns = codes.shape[-1]
        # 16 s * (high - 8) + 16 s * (136 - zero) / 16, float32 for the sixteenths and the range
        self._coarse = GroupPairs(scales.float() * 16, (136 - zeros.float()) / 16, columns, dtype)
        self._fine = GroupPairs(scales, torch.zeros_like(zeros), columns, dtype)
        parts = (self._high, self._low, self._coarse, self._fine)
        self.nbytes = sum(part.nbytes for part in parts)
        self.rounded_scales = self._fine.rounded_scales

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """See `Matrices.multiply`."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        high: Tensor = product(x, self._high[index], self._coarse.size, self._coarse.pairs[index])
        low: Tensor = product(x, self._low[index], self._fine.size, self._fine.pairs[index])
        y = high.float() + low.float()
        correction = self._coarse.correction(index, x)
        return (y if correction is None else y + correction).to(x.dtype)


class Int4Halves:
    """See the module's description."""

    name = "int4halves"
    rank = 20

    def accepts(self, scheme: Scheme, rows: int, columns: int, device: torch.device) -> bool:
        """See `Backend.accepts`."""
        return kernel_takes(scheme, rows, columns, device) and scheme.bits <= 8

    def pack(self, quantized: QuantizedTensor, dtype: torch.dtype) -> HalvesMatrices:
        """See `Backend.pack`."""
        return HalvesMatrices(quantized, dtype)


BACKENDS.register(Int4Halves.name, Int4Halves())
