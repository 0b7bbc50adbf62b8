"""The one layout in which experts that a GPU computes are held, wherever they lie: a record each.

A record is one expert's bytes in a row: codes, scales and zeros of gate and up (gate rows first),
then those of down.  Codes of up to 4 bits lie two in a byte, neighbouring columns, the lower column
in the low half; codes of more bits one in a byte.  So an expert is one address and one length: it
moves between host and device in one copy, a layer in one more, and a kernel reads its rows with
wide loads over PCIe as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.hybrid.host import host_memory
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

_ALIGN = 256


@dataclass(frozen=True)
class Part:
    """Where one matrix `[rows, columns]` lies in a record; offsets in bytes."""

    scheme: AffineScheme
    rows: int
    columns: int
    codes: int
    """uint8 [rows, width]"""
    scales: int
    """float16 [rows, groups]"""
    zeros: int
    """uint8 [rows, groups]; nothing where the scheme is symmetric, as all are `zero`"""

    @property
    def zero(self) -> int:
        """The zero of a symmetric scheme; 0: they are stored."""
        return 1 << (self.scheme.bits - 1) if self.scheme.symmetric else 0

    @property
    def paired(self) -> bool:
        """Whether a byte holds two codes."""
        return self.scheme.bits <= 4

    @property
    def width(self) -> int:
        """Bytes of a row's codes."""
        return self.columns // 2 if self.paired else self.columns

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.scheme.group(self.columns)

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return self.columns // self.group

    @property
    def span(self) -> int:
        """Bytes of codes, a power of two, that always share a scale from any multiple of it on."""
        held = self.group // 2 if self.paired else self.group
        return held & -held

    @property
    def sizes(self) -> tuple[int, ...]:
        """What kernels take: width, group, groups, and the offsets of scales, zeros and codes."""
        return self.width, self.group, self.groups, self.scales, self.zeros, self.codes

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.zeros + (0 if self.zero else self.rows * self.groups)


@dataclass(frozen=True)
class Layout:
    """What a layer's records are made of."""

    gate_up: Part
    down: Part

    @property
    def nbytes(self) -> int:
        """Bytes from one record to the next."""
        return _up(self.down.end)


class Records:
    """Equally built experts, one record after the other."""

    def __init__(self, layout: Layout, data: Tensor) -> None:
        """data: uint8 [N, layout.nbytes], contiguous."""
        self.layout = layout
        self.data = data

    @property
    def count(self) -> int:
        """Experts."""
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.data.nbytes

    def addresses(self) -> Tensor:
        """int64 [N]: where each record begins, for kernels; on the CPU."""
        return torch.arange(self.count) * self.layout.nbytes + self.data.data_ptr()

    def to(self, device: torch.device | str) -> Records:
        """The same bytes on another device."""
        return Records(self.layout, self.data.to(device))

    def unpack(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Gate and up, and down, as they were before `pack`."""
        first, second = (self._unpack(part) for part in (self.layout.gate_up, self.layout.down))
        return first, second

    def _unpack(self, part: Part) -> QuantizedTensor:
        codes, scales = views(self.data, part)
        zeros = torch.full_like(scales, part.zero, dtype=torch.uint8)
        if not part.zero:
            zeros = zeros_of(self.data, part)
        if part.paired:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        arrays = {"codes": codes, "scales": scales, "zeros": zeros}
        return QuantizedTensor(part.scheme, arrays)


def packable(scheme: AffineScheme, columns: int) -> bool:
    """Whether groups are multiples of 16 columns, as the kernels' tiles take for granted."""
    return scheme.group(columns) % 16 == 0


def layout_of(gate_up: QuantizedTensor, down: QuantizedTensor) -> Layout:
    """The record for experts of these shapes; ValueError where `packable` says no."""
    (rows, columns), (outputs, inner) = gate_up.shape[-2:], down.shape[-2:]
    first = _part(gate_up.scheme, rows, columns, 0)
    return Layout(first, _part(down.scheme, outputs, inner, _up(first.end)))


def planned_layout(scheme: AffineScheme, hidden: int, inner: int) -> Layout:
    """The record for experts of these sizes, not read yet; ValueError where `packable` says no."""
    first = _part(scheme, 2 * inner, hidden, 0)
    return Layout(first, _part(scheme, hidden, inner, _up(first.end)))


def empty(layout: Layout, count: int, device: torch.device) -> Records:
    """Room for so many records; RuntimeError where there is none."""
    if device.type == "cpu":
        data = host_memory(count * layout.nbytes, pin=False)
    else:
        data = torch.empty(count * layout.nbytes, dtype=torch.uint8, device=device)
    return Records(layout, data.view(count, layout.nbytes))


def pack(gate_up: QuantizedTensor, down: QuantizedTensor) -> Records:
    """Batches `[N, 2 * inner, hidden]` and `[N, hidden, inner]` as records, where they are.

    ValueError where `packable` says no.
    """
    codes = gate_up.arrays["codes"]
    records = empty(layout_of(gate_up, down), len(codes), codes.device)
    layout = records.layout
    for quantized, part in ((gate_up, layout.gate_up), (down, layout.down)):
        codes, scales = views(records.data, part)
        new = quantized.arrays["codes"]
        codes.copy_(new[..., 0::2] | new[..., 1::2] << 4 if part.paired else new)
        scales.copy_(quantized.arrays["scales"])
        if not part.zero:
            zeros_of(records.data, part).copy_(quantized.arrays["zeros"])
    return records


def views(data: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Codes and scales of one matrix of all records `data`, sharing its memory."""
    codes = _view(data, part.rows, part.codes, part.width, torch.uint8)
    return codes, _view(data, part.rows, part.scales, part.groups, torch.float16)


def zeros_of(data: Tensor, part: Part) -> Tensor:
    """The same of its zeros, where they are stored."""
    return _view(data, part.rows, part.zeros, part.groups, torch.uint8)


def _view(data: Tensor, rows: int, start: int, columns: int, dtype: torch.dtype) -> Tensor:
    flat = data[:, start : start + rows * columns * dtype.itemsize]
    return flat.view(dtype).unflatten(1, (rows, columns))


def _part(scheme: AffineScheme, rows: int, columns: int, start: int) -> Part:
    if not packable(scheme, columns):
        raise ValueError(f"{scheme} has groups that are no multiple of 16 columns")
    width = columns // 2 if scheme.bits <= 4 else columns
    scales = _up(start + rows * width)
    zeros = _up(scales + 2 * rows * (columns // scheme.group(columns)))
    return Part(scheme, rows, columns, start, scales, zeros)


def _up(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
