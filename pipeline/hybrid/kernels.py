"""Triton kernels over `PackedStack`: many experts in one launch, wherever their bytes lie.

A pair is one token and one of its chosen experts.  `matvec` serves decoding: each pair reads its
expert's rows once, which is all the traffic there is.  `grouped` serves prefill: pairs sorted by
expert, tiles of them multiplied by weights dequantised in registers.  Both read the expert of each
pair from a tensor, so nothing is synchronised with Python and a CUDA graph can hold them.  A stack
in pinned host memory is read over PCIe by the same kernels: only the pointer differs.

With TRITON_INTERPRET=1 in the environment when this module is imported they run on a CPU, slowly.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.hybrid.packed import PackedStack, pack
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_VECTOR_ROWS = 8
_VECTOR_BYTES = 256
_TILE_PAIRS = 16
_TILE_ROWS = 64
_TILE_BYTES = 32


@triton.jit
def _matvec_kernel(
    x,
    slots,
    codes,
    scales,
    zeros,
    out,
    rows,
    width,
    group,
    groups,
    share,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """ROWS outputs of one pair; a pair whose slot is negative belongs to another road."""
    pair = tl.program_id(1)
    slot = tl.load(slots + pair).to(tl.int64)
    if slot < 0:
        return
    per: tl.constexpr = 2 if PAIRED else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slab = slot * rows + row
    source = x + (pair // share).to(tl.int64) * (width * per)
    total = tl.zeros((ROWS, BYTES), tl.float32)
    for first in range(0, width, BYTES):
        byte = first + tl.arange(0, BYTES)
        used = byte < width
        inside = (row < rows)[:, None] & used[None, :]
        code = tl.load(codes + slab[:, None] * width + byte[None, :], mask=inside, other=0)
        place = slab[:, None] * groups + (byte * per // group)[None, :]
        scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=inside, other=0).to(tl.float32)
        left = tl.load(source + byte * per, mask=used, other=0.0).to(tl.float32)
        if PAIRED:
            right = tl.load(source + byte * 2 + 1, mask=used, other=0.0).to(tl.float32)
            low = (code & 15).to(tl.float32) - zero
            high = (code >> 4).to(tl.float32) - zero
            total += scale * (low * left[None, :] + high * right[None, :])
        else:
            total += scale * (code.to(tl.float32) - zero) * left[None, :]
    place = out + pair.to(tl.int64) * rows + row
    tl.store(place, tl.sum(total, 1), mask=row < rows)


@triton.jit
def _grouped_kernel(
    x,
    order,
    tile_slot,
    tile_start,
    ends,
    codes,
    scales,
    zeros,
    out,
    rows,
    width,
    group,
    groups,
    share,
    PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A tile of one expert's pairs times a tile of its rows."""
    slot = tl.load(tile_slot + tl.program_id(0)).to(tl.int64)
    if slot < 0:
        return
    per: tl.constexpr = 2 if PAIRED else 1
    place = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, PAIRS)
    mine = place < tl.load(ends + slot)
    pair = tl.load(order + place, mask=mine, other=0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slab = slot * rows + row
    source = x + (pair // share)[:, None] * (width * per)
    total = tl.zeros((PAIRS, ROWS), tl.float32)
    for first in range(0, width, BYTES):
        byte = first + tl.arange(0, BYTES)
        used = byte < width
        inside = used[:, None] & (row < rows)[None, :]
        code = tl.load(codes + slab[None, :] * width + byte[:, None], mask=inside, other=0)
        where = slab[None, :] * groups + (byte * per // group)[:, None]
        scale = tl.load(scales + where, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + where, mask=inside, other=0).to(tl.float32)
        seen = mine[:, None] & used[None, :]
        left = tl.load(source + (byte * per)[None, :], mask=seen, other=0.0)
        if PAIRED:
            right = tl.load(source + (byte * 2 + 1)[None, :], mask=seen, other=0.0)
            low = (((code & 15).to(tl.float32) - zero) * scale).to(left.dtype)
            high = (((code >> 4).to(tl.float32) - zero) * scale).to(left.dtype)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
                low, high = low.to(tl.float32), high.to(tl.float32)
            total = tl.dot(left, low, total, input_precision=PRECISION)
            total = tl.dot(right, high, total, input_precision=PRECISION)
        else:
            weight = ((code.to(tl.float32) - zero) * scale).to(left.dtype)
            if WIDEN:
                left, weight = left.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(left, weight, total, input_precision=PRECISION)
    target = out + pair[:, None] * rows + row[None, :]
    tl.store(target, total, mask=mine[:, None] & (row < rows)[None, :])


def runs_on(device: torch.device) -> bool:
    """Whether these kernels can be tried on `device` at all."""
    return device.type == "cuda" or _INTERPRETED


def self_test(device: torch.device) -> None:
    """Run both kernels on a few numbers; ValueError on a wrong result."""
    codes = torch.arange(128, device=device).remainder(16).byte().view(1, 4, 32)
    scales = torch.ones((1, 4, 1), dtype=torch.float16, device=device)
    arrays = {"codes": codes, "scales": scales, "zeros": torch.full_like(scales, 8).byte()}
    stack = pack(QuantizedTensor(AffineScheme(4, 32, True), arrays))
    x = torch.eye(32, device=device)[:3].bfloat16()
    slots = torch.tensor([0, -1, 0], device=device)
    got = torch.zeros((2, 3, 4), device=device)
    matvec(x, slots, stack, got[0])
    grouped(x, Groups(slots, 1), stack, got[1])
    want = codes[0, :, :3].t().float() - 8
    want[1] = 0
    if not torch.equal(got, want.expand_as(got)):
        raise ValueError("a kernel returned wrong numbers")


def matvec(x: Tensor, slots: Tensor, stack: PackedStack, out: Tensor) -> None:
    """out[p] = W[slots[p]] @ x[p // share] for every pair whose slot is not negative.

    x bfloat16 or float32 [P / share, in], contiguous; slots int [P] on x's device; out float32
    [P, out], other rows of which are left alone.  Sums are float32.
    """
    width = stack.codes.shape[-1]
    _matvec_kernel[(triton.cdiv(stack.rows, _VECTOR_ROWS), slots.numel())](
        x,
        slots,
        stack.codes,
        stack.scales,
        stack.zeros,
        out,
        stack.rows,
        width,
        stack.scheme.group(stack.columns),
        stack.scales.shape[-1],
        slots.numel() // x.shape[0],
        PAIRED=stack.paired,
        ROWS=_VECTOR_ROWS,
        BYTES=min(_VECTOR_BYTES, triton.next_power_of_2(width)),
    )


class Groups:
    """Pairs sorted by expert and cut into tiles, on the device, for any number of `grouped`."""

    def __init__(self, slots: Tensor, count: int) -> None:
        """slots int [P], negative: not of this stack; count: matrices in the stack."""
        pairs = slots.numel()
        keys = torch.where(slots < 0, count, slots).long()
        self.pairs = pairs
        self.order = keys.argsort(stable=True)
        counts = torch.zeros(count + 1, dtype=torch.int64, device=slots.device)
        counts.scatter_add_(0, keys, torch.ones_like(keys))
        counts = counts[:count]
        self.ends = counts.cumsum(0)
        tiles = (counts + _TILE_PAIRS - 1) // _TILE_PAIRS
        last = tiles.cumsum(0)
        # As many tiles as there can be: their true number would have to be waited for.
        most = pairs // _TILE_PAIRS + min(count, pairs)
        tile = torch.arange(most, device=slots.device)
        expert = torch.searchsorted(last, tile, right=True)
        known = expert.clamp(max=count - 1)
        within = tile - (last - tiles)[known]
        self.slot = torch.where(expert < count, expert, -1)
        self.start = (self.ends - counts)[known] + within * _TILE_PAIRS


def grouped(x: Tensor, groups: Groups, stack: PackedStack, out: Tensor) -> None:
    """What `matvec` computes, for many pairs; weights are rounded to x's dtype before the product.

    x bfloat16 or float32 [P / share, in], contiguous; out float32 [P, out], rows of pairs that are
    not of this stack left alone.
    """
    width = stack.codes.shape[-1]
    tiles = (groups.slot.numel(), triton.cdiv(stack.rows, _TILE_ROWS))
    _grouped_kernel[tiles](
        x,
        groups.order,
        groups.slot,
        groups.start,
        groups.ends,
        stack.codes,
        stack.scales,
        stack.zeros,
        out,
        stack.rows,
        width,
        stack.scheme.group(stack.columns),
        stack.scales.shape[-1],
        groups.pairs // x.shape[0],
        PAIRED=stack.paired,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        WIDEN=_INTERPRETED,  # the interpreter's dot takes bfloat16's bits for integers
        PAIRS=_TILE_PAIRS,
        ROWS=_TILE_ROWS,
        BYTES=_TILE_BYTES,
    )
