"""Up to 4 bits on the CPU through torch's int4 kernel.

`aten::_weight_int4pack_mm_for_cpu` computes x @ W.T with w = s * (q - 8) + z, in float32 inside,
for codes q in 0..15 and one (s, z) pair per group of 32, 64, 128 or 256 columns.  Its packed layout
depends on the machine's vector width and is known to torch alone.  Only its bfloat16 form is fast.

Our codes are shifted so that the middle one is 8: with m = 2**(bits - 1), q = code + 8 - m gives
s * (code - zero) = s * (q - 8) + z for z = s * (m - zero).  Symmetric codes have zero = m and
z = 0.  Asymmetric z is rounded to bfloat16, by at most 2**-9 of itself, once per group.  On random
matrices that is an error of 0.0020 where a dense bfloat16 weight makes 0.0023, and in a trained
model's logits it cannot be told from none, so there is no correction for it.  Wider groups, and one
group per row, repeat their pair every 256 columns or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.hybrid.backends import BACKENDS
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor, Scheme

_KERNEL_GROUPS = (256, 128, 64, 32)


def kernel_group(columns_per_group: int) -> int | None:
    """The kernel's group size that subdivides a group of the scheme; None if there is none."""
    return next((size for size in _KERNEL_GROUPS if columns_per_group % size == 0), None)


def kernel_takes(scheme: Scheme, rows: int, columns: int, device: torch.device) -> bool:
    """Whether shape and grouping suit the kernel (rows in blocks of 16)."""
    if device.type != "cpu" or rows % 16 or not isinstance(scheme, AffineScheme):
        return False
    return kernel_group(scheme.group(columns)) is not None


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 `[N, out, in]` -> the kernel's layout, uint8 `[N, out, in / 2]`."""
    count, rows, columns = codes.shape
    packed = torch.empty(count, rows, columns // 2, dtype=torch.uint8)
    for index in range(count):  # the kernel's own converter takes one matrix
        packed[index] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[index].int(), 1)
    return packed


def kernel_pairs(
    scales: Tensor, offsets: Tensor, columns: int, dtype: torch.dtype
) -> tuple[int, Tensor]:
    """The kernel's group size and its pairs (s, offset * s), `[N, columns / size, out, 2]`.

    scales, offsets `[N, out, groups]`, any float dtype; both parts are rounded once, to `dtype`.
    """
    groups = scales.shape[-1]
    size = kernel_group(columns // groups)
    assert size is not None, "the back end accepted a group size the kernel cannot have"
    rounded = scales.to(dtype)
    offset = (rounded.float() * offsets.float()).to(dtype)
    pairs = torch.stack([rounded, offset], dim=-1).transpose(1, 2)
    return size, pairs.repeat_interleave(columns // groups // size, dim=1).contiguous()


class Int4Matrices:
    """A stack in the kernel's layout; see `Matrices`."""

    device = torch.device("cpu")

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
        middle = 1 << (quantized.scheme.bits - 1)
        self._packed = pack_codes(codes + (8 - middle))
        offsets = middle - zeros.float()
        self._group, self._pairs = kernel_pairs(scales, offsets, codes.shape[-1], dtype)
        self.nbytes = self._packed.nbytes + self._pairs.nbytes
        self.rounded_scales = bool((scales.to(dtype) != scales).any())

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """See `Matrices.multiply`."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._packed[index], self._group, self._pairs[index]
        )
        return y


class Int4Pack:
    """See the module's description."""

    name = "int4pack"
    rank = 10

    def accepts(self, scheme: Scheme, rows: int, columns: int, device: torch.device) -> bool:
        """See `Backend.accepts`."""
        return kernel_takes(scheme, rows, columns, device) and scheme.bits <= 4

    def pack(self, quantized: QuantizedTensor, dtype: torch.dtype) -> Int4Matrices:
        """See `Backend.pack`."""
        return Int4Matrices(quantized, dtype)


BACKENDS.register(Int4Pack.name, Int4Pack())
