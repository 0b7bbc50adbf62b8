"""Triton kernels of one decode step for matrices, the router and the shared expert.

Each does what several of the transformers model's own small kernels do, and rounds to the model's
dtype where those do.  All sizes are known without Python and nothing is waited for: a CUDA graph
holds them.  `T` is tokens, one of each sequence.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4


@triton.jit
def _linear_kernel(
    x,
    norm,
    first,
    second,
    third,
    fourth,
    residual,
    out,
    normed,
    tiles1,
    tiles2,
    tiles3,
    rows1,
    rows2,
    rows3,
    rows4,
    width,
    eps,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS outputs of up to four matrices that read the same vector, normalised here if NORM."""
    tile = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    weight, rows, before = first, rows1, 0
    if tile >= tiles1:
        weight, rows, before = second, rows2, rows1
        tile -= tiles1
        if tile >= tiles2:
            weight, rows, before = third, rows3, rows1 + rows2
            tile -= tiles2
            if tile >= tiles3:
                weight, rows, before = fourth, rows4, rows1 + rows2 + rows3
                tile -= tiles3
    column = tl.arange(0, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    used = column < width
    inside = (row < rows)[:, None] & used[None, :]
    w = tl.load(weight + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    value = tl.load(x + token * width + column, mask=used, other=0.0)
    if NORM:
        value = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        gain = tl.load(norm + column, mask=used, other=0.0).to(tl.float32)
        value = (value * scale * (1.0 + gain)).to(x.dtype.element_ty)
        if NORMED and tl.program_id(0) == 0:
            tl.store(normed + token * width + column, value, mask=used)
    result = tl.sum(w.to(tl.float32) * value.to(tl.float32)[None, :], 1).to(out.dtype.element_ty)
    place = token * (rows1 + rows2 + rows3 + rows4) + before + row
    if RESIDUAL:
        old = tl.load(residual + place, mask=row < rows, other=0.0)
        result = (old.to(tl.float32) + result.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + place, result, mask=row < rows)


@triton.jit
def _route_kernel(
    logits,
    index,
    weights,
    inner,
    gate,
    experts,
    shared,
    top_k,
    NORMALISE: tl.constexpr,
    CHOSEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The chosen experts and their weights; silu(gate) * up of the shared expert beside it."""
    token = tl.program_id(0).to(tl.int64)
    like = weights.dtype.element_ty
    expert = tl.arange(0, EXPERTS)
    known = expert < experts
    base = logits + token * (experts + 2 * shared + 1)
    score = tl.load(base + expert, mask=known, other=float("-inf")).to(tl.float32)
    score = tl.exp(score - tl.max(score, 0))
    score = tl.where(known, score / tl.sum(score, 0), -1.0)
    place = tl.arange(0, CHOSEN)
    values = tl.zeros((CHOSEN,), tl.float32)
    chosen = tl.zeros((CHOSEN,), tl.int32)
    for number in range(top_k):
        most, best = tl.max(score, 0, return_indices=True)
        values = tl.where(place == number, most, values)
        chosen = tl.where(place == number, best, chosen)
        score = tl.where(expert == best, -1.0, score)
    if NORMALISE:
        values = values / tl.sum(values, 0)
    mine = place < top_k
    tl.store(index + token * top_k + place, chosen.to(tl.int64), mask=mine)
    tl.store(weights + token * top_k + place, values.to(like), mask=mine)
    column = tl.arange(0, SHARED)
    used = column < shared
    x = tl.load(base + experts + column, mask=used, other=0.0).to(tl.float32)
    up = tl.load(base + experts + shared + column, mask=used, other=0.0).to(tl.float32)
    x = (x * tl.sigmoid(x)).to(like).to(tl.float32) * up
    tl.store(inner + token * shared + column, x.to(like), mask=used)
    opening = tl.sigmoid(tl.load(base + experts + 2 * shared).to(tl.float32))
    tl.store(gate + token, opening.to(like))


@triton.jit
def _finish_kernel(
    hidden,
    routed,
    inner,
    weight,
    gate,
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """hidden += routed experts + gate * shared expert, ROWS of it."""
    token = tl.program_id(1).to(tl.int64)
    like = hidden.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    used = column < width
    inside = (row < rows)[:, None] & used[None, :]
    w = tl.load(weight + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    x = tl.load(inner + token * width + column, mask=used, other=0.0).to(tl.float32)
    shared = tl.sum(w.to(tl.float32) * x[None, :], 1).to(like).to(tl.float32)
    shared = (shared * tl.load(gate + token).to(tl.float32)).to(like).to(tl.float32)
    place = token * rows + row
    own = tl.load(routed + place, mask=row < rows, other=0.0).to(like).to(tl.float32)
    own = (own + shared).to(like).to(tl.float32)
    old = tl.load(hidden + place, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(hidden + place, (old + own).to(like), mask=row < rows)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    normed: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """out [T, sum of rows] = each of up to four matrices [rows, in] times x [T, in], side by side.

    norm: weight and epsilon of the "1 + w" norm that x goes through first; normed [T, in]: where
    the normalised x is wanted too.  residual: added to out, and may be out itself.
    """
    width = x.shape[-1]
    rows = [w.shape[0] for w in weights] + [0] * (4 - len(weights))
    four = [*weights, *[weights[0]] * (4 - len(weights))]
    tiles = [triton.cdiv(r, _ROWS) for r in rows]
    gain, eps = norm or (x, 0.0)
    _linear_kernel[(sum(tiles), x.shape[0])](
        x, gain, *four, out if residual is None else residual, out,
        x if normed is None else normed, *tiles[:3], *rows, width, eps,
        NORM=norm is not None, RESIDUAL=residual is not None, NORMED=normed is not None,
        ROWS=_ROWS, COLUMNS=triton.next_power_of_2(width),
    )  # fmt: skip


def route(
    logits: Tensor, index: Tensor, weights: Tensor, inner: Tensor, gate: Tensor, *, normalise: bool
) -> None:
    """Top-k of the router's softmax, and the shared expert up to its down projection.

    logits [T, experts + 2 * shared + 1]: router, shared gate and up, the shared expert's own gate;
    index int64 and weights [T, k]; inner [T, shared]; gate [T].
    """
    shared = inner.shape[1]
    experts = logits.shape[1] - 2 * shared - 1
    _route_kernel[(logits.shape[0],)](
        logits, index, weights, inner, gate, experts, shared, index.shape[1],
        NORMALISE=normalise, CHOSEN=triton.next_power_of_2(index.shape[1]),
        EXPERTS=triton.next_power_of_2(experts),
        SHARED=triton.next_power_of_2(shared),
    )  # fmt: skip


def finish(hidden: Tensor, routed: Tensor, inner: Tensor, weight: Tensor, gate: Tensor) -> None:
    """hidden [T, H] += routed float32 [T, H] + gate [T] * (weight [H, shared] @ inner)."""
    _finish_kernel[(triton.cdiv(hidden.shape[1], _ROWS), hidden.shape[0])](
        hidden, routed, inner, weight, gate, hidden.shape[1], weight.shape[1], ROWS=_ROWS,
        COLUMNS=triton.next_power_of_2(weight.shape[1]),
    )  # fmt: skip
