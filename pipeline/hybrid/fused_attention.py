"""Triton kernels of one decode step for gated attention.

Each does what several of the transformers model's own small kernels do, and rounds to the model's
dtype where those do.  All sizes are known without Python and nothing is waited for: a CUDA graph
holds them.  `T` is tokens, one of each sequence.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_SPLITS = 64
_KEYS = 32


@triton.jit
def _rotate_kernel(
    mixed,
    q_norm,
    k_norm,
    cos,
    sin,
    position,
    query,
    keys,
    values,
    heads,
    kv_heads,
    length,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Norm and rotary embedding of a query or key head; keys and values go to their place."""
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    like = query.dtype.element_ty
    column = tl.arange(0, D)
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    partner = tl.where(column < 2 * HALF, partner, column)
    own = mixed + token * ((2 * heads + 2 * kv_heads) * D)
    is_query = head < heads
    at = tl.where(is_query, 2 * head, heads + head) * D
    norm = q_norm if is_query else k_norm
    x = tl.load(own + at + column).to(tl.float32)
    other = tl.load(own + at + partner).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    x = (x * scale * (1.0 + tl.load(norm + column).to(tl.float32))).to(like).to(tl.float32)
    gain = tl.load(norm + partner).to(tl.float32)
    other = (other * scale * (1.0 + gain)).to(like).to(tl.float32)
    turned = column < 2 * HALF
    c = tl.load(cos + token * (2 * HALF) + column, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + token * (2 * HALF) + column, mask=turned, other=0.0).to(tl.float32)
    other = tl.where(column < HALF, -other, other)
    x = ((x * c).to(like).to(tl.float32) + (other * s).to(like).to(tl.float32)).to(like)
    if is_query:
        tl.store(query + (token * heads + head) * D + column, x)
    else:
        number = head - heads
        now = tl.load(position)
        place = ((token * kv_heads + number) * length + now) * D + column
        tl.store(keys + place, x)
        tl.store(values + place, tl.load(own + at + kv_heads * D + column))


@triton.jit
def _attend_kernel(
    query,
    keys,
    values,
    position,
    begins,
    partial,
    heads,
    kv_heads,
    length,
    scaling,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attention of one key head's queries to one part of what is cached."""
    number = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    total = tl.load(position) + 1
    begin = tl.load(begins + token)
    share = tl.cdiv(total, SPLITS * KEYS) * KEYS
    row = tl.arange(0, PADDED)
    column = tl.arange(0, D)
    ours = row < GROUP
    q = query + ((token * heads + number * GROUP + row) * D)[:, None] + column[None, :]
    q = tl.load(q, mask=ours[:, None], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    highest = tl.full((PADDED,), -1e30, tl.float32)
    weight = tl.zeros((PADDED,), tl.float32)
    sums = tl.zeros((PADDED, D), tl.float32)
    base = (token * kv_heads + number) * length * D
    for first in range(split * share, tl.minimum(split * share + share, total), KEYS):
        spot = first + tl.arange(0, KEYS)
        seen = (spot < total) & (spot >= begin)
        at = base + spot[:, None] * D + column[None, :]
        k = tl.load(keys + at, mask=seen[:, None], other=0.0)
        v = tl.load(values + at, mask=seen[:, None], other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        score = tl.where(seen[None, :], score, -1e30)
        top = tl.maximum(highest, tl.max(score, 1))
        part = tl.where(seen[None, :], tl.exp(score - top[:, None]), 0.0)
        fade = tl.exp(highest - top)
        weight = weight * fade + tl.sum(part, 1)
        sums = sums * fade[:, None] + tl.dot(part.to(v.dtype), v, input_precision="ieee")
        highest = top
    place = partial + ((token * heads + number * GROUP + row) * SPLITS + split) * (D + 2)
    tl.store(place[:, None] + column[None, :], sums, mask=ours[:, None])
    tl.store(place + D, highest, mask=ours)
    tl.store(place + D + 1, weight, mask=ours)


@triton.jit
def _combine_kernel(
    partial,
    mixed,
    out,
    heads,
    kv_heads,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head's output from all parts, times its gate."""
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    like = out.dtype.element_ty
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, D)
    place = partial + ((token * heads + head) * SPLITS + split) * (D + 2)
    highest = tl.load(place + D)
    scale = tl.exp(highest - tl.max(highest, 0))
    weight = tl.sum(tl.load(place + D + 1) * scale, 0)
    sums = tl.load(place[:, None] + column[None, :]) * scale[:, None]
    result = (tl.sum(sums, 0) / weight).to(like).to(tl.float32)
    gate = mixed + token * ((2 * heads + 2 * kv_heads) * D) + (2 * head + 1) * D + column
    gate = tl.sigmoid(tl.load(gate).to(tl.float32)).to(like).to(tl.float32)
    tl.store(out + (token * heads + head) * D + column, (result * gate).to(like))


def rotate(
    mixed: Tensor, norms: tuple[Tensor, Tensor, float], rotary: tuple[Tensor, Tensor],
    position: Tensor, query: Tensor, keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    """Queries made ready, keys and values written to the cache at `position`.

    mixed [T, q and gate by head, k, v]; rotary: cos and sin [T, 1, turned]; position int [1];
    query [T, heads, size]; keys and values [T, key heads, length, size].
    """
    heads, size = query.shape[1:]
    kv_heads, length = keys.shape[1:3]
    _rotate_kernel[(heads + kv_heads, query.shape[0])](
        mixed, norms[0], norms[1], *rotary, position, query, keys, values, heads, kv_heads,
        length, norms[2], D=size, HALF=rotary[0].shape[-1] // 2,
    )  # fmt: skip


def attend(
    mixed: Tensor, query: Tensor, keys: Tensor, values: Tensor, position: Tensor, begins: Tensor,
    partial: Tensor, out: Tensor, scaling: float,
) -> None:  # fmt: skip
    """Gated attention to the keys from begins [T] up to and with `position`; out [T, heads, size].

    partial: scratch of `scratch_size`; parts of the cache are read side by side.
    """
    heads, size = query.shape[1:]
    kv_heads, length = keys.shape[1:3]
    group = heads // kv_heads
    _attend_kernel[(kv_heads, _SPLITS, query.shape[0])](
        query, keys, values, position, begins, partial, heads, kv_heads, length, scaling,
        GROUP=group, PADDED=max(16, triton.next_power_of_2(group)), D=size, KEYS=_KEYS,
        SPLITS=_SPLITS, WIDEN=_INTERPRETED,
    )  # fmt: skip
    _combine_kernel[(heads, query.shape[0])](
        partial, mixed, out, heads, kv_heads, D=size, SPLITS=_SPLITS
    )


def scratch_size(tokens: int, heads: int, size: int) -> int:
    """float32 elements of `attend`'s scratch."""
    return tokens * heads * _SPLITS * (size + 2)
