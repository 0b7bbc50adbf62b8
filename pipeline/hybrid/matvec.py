"""Triton kernels for decoding: each pair of a token and an expert reads its rows once.

That is all the traffic there is.  A table gives the address of every expert's record, 0 for one
that is computed elsewhere; it is read on the device, so nothing is synchronised with Python, a CUDA
graph can hold the kernels, and an expert moves by a change of its entry.  Records in pinned host
memory are read over PCIe by the same kernels: only the address differs.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pipeline.hybrid.records import Part

_ROWS = 4
_BYTES = 512


@triton.jit
def _product(
    source,
    address,
    row,
    rows,
    width,
    group,
    groups,
    scales_at,
    zeros_at,
    codes_at,
    PAIRED: tl.constexpr,
    ZERO: tl.constexpr,
    BYTES: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """float32 [ROWS]: rows of the matrix at an address times the vector at `source`."""
    per: tl.constexpr = 2 if PAIRED else 1
    codes = tl.multiple_of((address + codes_at).to(tl.pointer_type(tl.uint8)), 16)
    scales = (address + scales_at).to(tl.pointer_type(tl.float16))
    zeros = (address + zeros_at).to(tl.pointer_type(tl.uint8))
    # bytes by group, so that each scale is read once: over PCIe every read counts
    spans: tl.constexpr = BYTES // SPAN
    lane = tl.arange(0, spans)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    total = tl.zeros((ROWS, spans, SPAN), tl.float32)
    for first in range(0, width, BYTES):
        byte = first + lane
        used = byte < width
        inside = (row < rows)[:, None, None] & used[None, :, :]
        code = tl.load(codes + row[:, None, None] * width + byte[None, :, :], mask=inside, other=0)
        number = (first + tl.arange(0, spans) * SPAN) * per // group
        there = (row < rows)[:, None] & (number < groups)[None, :]
        place = row[:, None] * groups + number[None, :]
        scale = tl.load(scales + place, mask=there, other=0.0).to(tl.float32)[:, :, None]
        zero = ZERO * 1.0
        if ZERO == 0:
            zero = tl.load(zeros + place, mask=there, other=0).to(tl.float32)[:, :, None]
        left = tl.load(source + byte * per, mask=used, other=0.0).to(tl.float32)[None, :, :]
        if PAIRED:
            right = tl.load(source + byte * 2 + 1, mask=used, other=0.0).to(tl.float32)
            low = (code & 15).to(tl.float32) - zero
            high = (code >> 4).to(tl.float32) - zero
            total += scale * (low * left + high * right[None, :, :])
        else:
            total += scale * (code.to(tl.float32) - zero) * left
    return tl.sum(tl.sum(total, 2), 1)


@triton.jit
def _gate_up_kernel(
    x,
    index,
    table,
    out,
    inner,
    width,
    group,
    groups,
    scales_at,
    zeros_at,
    codes_at,
    share,
    PAIRED: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """silu(gate) * up of one pair, ROWS of each; a pair whose address is 0 is another road's."""
    pair = tl.program_id(1)
    address = tl.load(table + tl.load(index + pair))
    if address == 0:
        return
    per: tl.constexpr = 2 if PAIRED else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = x + (pair // share).to(tl.int64) * (width * per)
    gate = _product(
        source,
        address,
        row,
        inner,
        width,
        group,
        groups,
        scales_at,
        zeros_at,
        codes_at,
        PAIRED,
        ZERO,
        BYTES,
        SPAN,
        ROWS,
    )
    up = _product(
        source,
        address,
        row + inner,
        2 * inner,
        width,
        group,
        groups,
        scales_at,
        zeros_at,
        codes_at,
        PAIRED,
        ZERO,
        BYTES,
        SPAN,
        ROWS,
    )
    result = gate * tl.sigmoid(gate) * up
    place = out + pair.to(tl.int64) * inner + row
    tl.store(place, result.to(out.dtype.element_ty), mask=row < inner)


@triton.jit
def _down_kernel(
    x,
    index,
    table,
    weights,
    out,
    rows,
    width,
    group,
    groups,
    scales_at,
    zeros_at,
    codes_at,
    share,
    PAIRED: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The weighted sum over one token's pairs, ROWS outputs of it."""
    token = tl.program_id(1)
    per: tl.constexpr = 2 if PAIRED else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for number in range(share):
        pair = token * share + number
        address = tl.load(table + tl.load(index + pair))
        if address != 0:
            source = x + pair.to(tl.int64) * (width * per)
            found = _product(
                source,
                address,
                row,
                rows,
                width,
                group,
                groups,
                scales_at,
                zeros_at,
                codes_at,
                PAIRED,
                ZERO,
                BYTES,
                SPAN,
                ROWS,
            )
            total += found * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token.to(tl.int64) * rows + row, total, mask=row < rows)


def gate_up(x: Tensor, index: Tensor, table: Tensor, part: Part, out: Tensor) -> None:
    """out[p] = silu(G x) * (U x) of expert index[p] and row p // share of x, for every pair.

    x bfloat16 or float32 [P / share, in], contiguous; index int [P], table int64 [experts], on x's
    device; out [P, inner], rows of another road's pairs left alone.  Sums are float32.
    """
    inner = part.rows // 2
    _gate_up_kernel[(triton.cdiv(inner, _ROWS), index.numel())](
        x, index, table, out, inner, *part.sizes, index.numel() // x.shape[0],
        PAIRED=part.paired,
        ZERO=part.zero, ROWS=_ROWS, **_spans(part),
    )  # fmt: skip


def down(x: Tensor, index: Tensor, table: Tensor, weights: Tensor, part: Part, out: Tensor) -> None:
    """out[t] = the sum over the pairs p of token t of weights[p] * W x[p].

    x bfloat16 or float32 [P, inner]; weights [P]; out float32 [T, hidden], 0 for a token whose
    pairs are all another road's.
    """
    _down_kernel[(triton.cdiv(part.rows, _ROWS), out.shape[0])](
        x, index, table, weights, out, part.rows, *part.sizes, index.numel() // out.shape[0],
        PAIRED=part.paired,
        ZERO=part.zero, ROWS=_ROWS, **_spans(part),
    )  # fmt: skip


def _spans(part: Part) -> dict[str, int]:
    """Bytes of a row read at a time, and of those how many at least share a scale."""
    at_once = min(_BYTES, int(triton.next_power_of_2(part.width)))
    return {"BYTES": at_once, "SPAN": min(part.span, at_once)}
