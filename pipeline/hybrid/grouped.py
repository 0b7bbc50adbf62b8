"""Triton kernels for prefill: pairs of a token and an expert, sorted by expert, tile by tile.

Weights are dequantised in registers and rounded to the type of what they are multiplied by.  The
table of addresses is that of `matvec`.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202, RET505
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.hybrid.records import Part

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_ROWS = 64
_BYTES = 32


@triton.jit
def _tile(
    address,
    row,
    limit,
    first,
    width,
    group,
    groups,
    scales_at,
    zeros_at,
    codes_at,
    like,
    PAIRED: tl.constexpr,
    ZERO: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Dequantised weights [ROWS, columns of BYTES bytes from `first`], which share a group,
    rounded to the type of `like`."""
    byte = first + tl.arange(0, BYTES)
    per: tl.constexpr = 2 if PAIRED else 1
    codes = tl.multiple_of((address + codes_at).to(tl.pointer_type(tl.uint8)), 16)
    scales = (address + scales_at).to(tl.pointer_type(tl.float16))
    zeros = (address + zeros_at).to(tl.pointer_type(tl.uint8))
    inside = (row < limit)[:, None] & (byte < width)[None, :]
    code = tl.load(codes + row[:, None] * width + byte[None, :], mask=inside, other=0)
    place = row * groups + first * per // group
    scale = tl.load(scales + place, mask=row < limit, other=0.0).to(tl.float32)[:, None]
    zero = ZERO * 1.0
    if ZERO == 0:
        zero = tl.load(zeros + place, mask=row < limit, other=0).to(tl.float32)[:, None]
    if PAIRED:
        low = (((code & 15).to(tl.float32) - zero) * scale).to(like)
        high = (((code >> 4).to(tl.float32) - zero) * scale).to(like)
        return tl.interleave(low, high)
    else:
        return ((code.to(tl.float32) - zero) * scale).to(like)


@triton.jit
def _grouped_kernel(
    x,
    order,
    tile_expert,
    tile_start,
    ends,
    table,
    out,
    rows,
    width,
    group,
    groups,
    scales_at,
    zeros_at,
    codes_at,
    share,
    GATED: tl.constexpr,
    PAIRED: tl.constexpr,
    ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A tile of one expert's pairs times a tile of its rows; GATED: silu(gate) * up of them."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    address = tl.load(table + expert)
    if address == 0:
        return
    per: tl.constexpr = 2 if PAIRED else 1
    place = tl.load(tile_start + tl.program_id(1)) + tl.arange(0, PAIRS)
    mine = place < tl.load(ends + expert)
    pair = tl.load(order + place, mask=mine, other=0).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = x + (pair // share)[:, None] * (width * per)
    total = tl.zeros((PAIRS, ROWS), tl.float32)
    other = tl.zeros((PAIRS, ROWS), tl.float32)
    for first in range(0, width, BYTES):
        column = first * per + tl.arange(0, BYTES * per)
        seen = mine[:, None] & (column < width * per)[None, :]
        left = tl.load(source + column[None, :], mask=seen, other=0.0)
        like = x.dtype.element_ty
        weight = _tile(
            address,
            row,
            rows,
            first,
            width,
            group,
            groups,
            scales_at,
            zeros_at,
            codes_at,
            like,
            PAIRED,
            ZERO,
            BYTES,
        )
        if WIDEN:
            left, weight = left.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(left, tl.trans(weight), total, input_precision=PRECISION)
        if GATED:
            weight = _tile(
                address,
                row + rows,
                2 * rows,
                first,
                width,
                group,
                groups,
                scales_at,
                zeros_at,
                codes_at,
                like,
                PAIRED,
                ZERO,
                BYTES,
            )
            if WIDEN:
                weight = weight.to(tl.float32)
            other = tl.dot(left, tl.trans(weight), other, input_precision=PRECISION)
    if GATED:
        total = total * tl.sigmoid(total) * other
    target = out + pair[:, None] * rows + row[None, :]
    inside = mine[:, None] & (row < rows)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


class Groups:
    """Pairs sorted by expert and cut into tiles, on the device, for any number of `grouped`."""

    def __init__(self, index: Tensor, count: int) -> None:
        """index int [P]: each pair's expert; count: experts."""
        pairs = index.numel()
        keys = index.long()
        self.pairs = pairs
        self.tile = 64 if pairs >= 32 * count else 16
        self.order = keys.argsort(stable=True)
        counts = torch.zeros(count, dtype=torch.int64, device=index.device)
        counts.scatter_add_(0, keys, torch.ones_like(keys))
        self.ends = counts.cumsum(0)
        tiles = (counts + self.tile - 1) // self.tile
        last = tiles.cumsum(0)
        # As many tiles as there can be: their true number would have to be waited for.
        most = pairs // self.tile + min(count, pairs)
        tile = torch.arange(most, device=index.device)
        expert = torch.searchsorted(last, tile, right=True)
        known = expert.clamp(max=count - 1)
        within = tile - (last - tiles)[known]
        self.expert = torch.where(expert < count, expert, -1)
        self.start = (self.ends - counts)[known] + within * self.tile


def grouped(
    x: Tensor, groups: Groups, table: Tensor, part: Part, out: Tensor, *, gated: bool
) -> None:
    """out[p] = W x[p // share], or silu(G x) * (U x) where `gated`, for many pairs.

    Weights are rounded to x's dtype before the product.  x bfloat16 or float32 [P / share, in],
    contiguous; out [P, rows] or [P, rows / 2], rows of another road's pairs left alone.
    """
    rows = part.rows // 2 if gated else part.rows
    tiles = (triton.cdiv(rows, _ROWS), groups.expert.numel())
    _grouped_kernel[tiles](
        x, groups.order, groups.expert, groups.start, groups.ends, table, out, rows,
        *part.sizes, groups.pairs // x.shape[0],
        GATED=gated, PAIRED=part.paired,
        ZERO=part.zero,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        WIDEN=_INTERPRETED,  # numpy multiplies no bfloat16
        PAIRS=groups.tile, ROWS=_ROWS,
        BYTES=min(_BYTES, part.span),
        num_warps=4,
    )  # fmt: skip
