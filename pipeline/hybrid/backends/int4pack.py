"""Up to 4 bits on the CPU through torch's int4 kernel, exactly.

`aten::_weight_int4pack_mm_for_cpu` computes x @ W.T with w = s * (q - 8) + z, in float32 inside,
for codes q in 0..15 and one (s, z) pair per group of 32, 64, 128 or 256 columns.  Its packed layout
depends on the machine's vector width and is known to torch alone.  Only its bfloat16 form is fast.

Our w = s * (q - zero) is that with z = s * (8 - zero).  Symmetric codes have zero = 8 and z = 0
(2 and 3 bits: a power of two times s, which bfloat16 holds exactly).  Asymmetric ones need up to
3 more bits than bfloat16 has; the residual of z, shared by a whole group, would be a coherent
error, so it is multiplied by the group's sum of inputs and added: a thin product of in / group
columns.  Wider groups, and one group per row, repeat their scales every 256 columns or less.
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


class GroupPairs:
    """Scales and offsets of a stack for w = s * code + offset * s, and what bfloat16 loses."""

    def __init__(self, scales: Tensor, offsets: Tensor, columns: int, dtype: torch.dtype) -> None:
        """scales float16 `[N, out, groups]`; offsets: integers of that shape, in units of s."""
        groups = scales.shape[-1]
        size = kernel_group(columns // groups)
        assert size is not None, "the back end accepted a group size the kernel cannot have"
        self.size = size
        rounded = scales.to(dtype)
        self.rounded_scales = bool((rounded != scales).any())
        exact = rounded.float() * offsets.float()
        offset = exact.to(dtype)
        pairs = torch.stack([rounded, offset], dim=-1).transpose(1, 2)  # [N, groups, out, 2]
        self.pairs = pairs.repeat_interleave(columns // groups // size, dim=1).contiguous()
        lost = (exact - offset.float()).transpose(1, 2)
        self.lost = lost.to(dtype).contiguous() if bool(lost.any()) else None
        """`[N, groups, out]` in units of the weight, or None; exact, a residual of 8 bits."""

    @property
    def nbytes(self) -> int:
        """Bytes of pairs and residuals."""
        return self.pairs.nbytes + (0 if self.lost is None else self.lost.nbytes)

    def correction(self, index: int, x: Tensor) -> Tensor | None:
        """float32 `[tokens, out]` to add to the kernel's product, or None where it is exact."""
        if self.lost is None:
            return None
        lost = self.lost[index].float()
        sums = x.float().reshape(x.shape[0], lost.shape[0], -1).sum(-1)
        return sums @ lost


class Int4Matrices:
    """A stack in the kernel's layout; see `Matrices`."""

    device = torch.device("cpu")

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
        self._packed = pack_codes(codes)
        self._groups = GroupPairs(scales, 8 - zeros.int(), codes.shape[-1], dtype)
        self.nbytes = self._packed.nbytes + self._groups.nbytes
        self.rounded_scales = self._groups.rounded_scales

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """See `Matrices.multiply`."""
        groups = self._groups
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._packed[index], groups.size, groups.pairs[index]
        )
        correction = groups.correction(index, x)
        return y if correction is None else (y + correction).to(x.dtype)


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
