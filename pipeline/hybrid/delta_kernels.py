"""Triton kernels of gated DeltaNet over many tokens (arXiv 2412.06464).

Convolution; what lies within chunks of tokens, for all chunks at once; the scan that carries the
state from chunk to chunk; the gated norm.  Each rounds to the model's dtype where the transformers
module does, and computes in float32 between; products are those of float32 numbers split in two.
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

from pipeline.hybrid.fused_delta import Heads

CHUNK = 64
_PRECISION = "tf32x3"
_SCAN_COLUMNS = 32
_SCAN_WARPS = 4
_SCAN_STAGES = 1
_CHUNK_WARPS = 4
_PIECE = 32
_TOKENS = 16
_CHANNELS = 256
_NORM_ROWS = 16


@triton.jit
def _convolve_kernel(
    source, weight, out, length, shift, channels, keys, ratio, of_batch, of_token, of_channel,
    K: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr, MIXED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The causal convolution of some tokens' channels (all q, all k, all v), and silu.

    MIXED: the source's rows hold q, k, v and z of one key head after the other, else the channels
    in order, `shift` tokens of an earlier text first.
    """
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    used = channel < channels
    place = channel * of_channel
    if MIXED:
        narrow = channel < 2 * keys
        wide = V * ratio
        head = tl.where(narrow, channel % keys // K, (channel - 2 * keys) // wide)
        inner = tl.where(
            narrow, channel // keys * K + channel % K, 2 * K + (channel - 2 * keys) % wide
        )
        place = head * (2 * K + 2 * wide) + inner
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for tap in tl.static_range(TAPS):
        at = token + shift - (TAPS - 1) + tap
        inside = ((at >= 0) & (token < length))[:, None] & used[None, :]
        row = source + batch * of_batch + at.to(tl.int64)[:, None] * of_token + place[None, :]
        kernel = tl.load(weight + channel * TAPS + tap, mask=used, other=0.0).to(tl.float32)
        total += tl.load(row, mask=inside, other=0.0).to(tl.float32) * kernel[None, :]
    total = total.to(out.dtype.element_ty).to(tl.float32)
    there = out + (batch * length + token)[:, None] * channels + channel[None, :]
    tl.store(there, total * tl.sigmoid(total), mask=(token < length)[:, None] & used[None, :])


@triton.jit
def _inverse(strict, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)^-1 of a strictly lower triangular N, C x C: blocks of 16 row by row, as powers of N
    can grow without bound, the four blocks of a row by products."""
    S: tl.constexpr = 16
    B: tl.constexpr = C // S
    lane = tl.arange(0, C)
    same = (lane[:, None] // S) == (lane[None, :] // S)
    blocks = tl.permute(tl.reshape(tl.where(same, -strict, 0.0), (B, S, B, S)), (0, 2, 1, 3))
    found = tl.sum(blocks, 1)  # [B, S, S]: what is off the diagonal is 0
    row = tl.arange(0, S)[None, :, None]
    for i in range(1, S):
        own = tl.sum(tl.where(row == i, found, 0.0), 1)
        own += tl.sum(own[:, :, None] * found, 1)
        found = tl.where(row == i, own[:, None, :], found)
    spread = tl.broadcast_to(found[:, None, :, :], (B, B, S, S))
    spread = tl.reshape(tl.permute(spread, (0, 2, 1, 3)), (C, C))
    near = tl.where(same, spread, 0.0) + tl.where(lane[:, None] == lane[None, :], 1.0, 0.0)
    far = tl.dot(near, tl.where(same, 0.0, strict), input_precision=PRECISION)
    # (I + M)^-1 = (I - M) (I + M^2), as M^4 = 0 for C = 4 * S
    twice = tl.dot(far, far, input_precision=PRECISION)
    some = near + tl.dot(twice, near, input_precision=PRECISION)
    return some - tl.dot(far, some, input_precision=PRECISION)


@triton.jit
def _chunk_kernel(
    mixed, decay, beta, query, key, read, value, within, kept, length, chunks, heads, ratio, keys,
    channels, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one head's scan needs of one chunk; PIECE channels at a time, as registers are few."""
    head = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0)
    batch, own = head // heads, head % heads
    lane = tl.arange(0, C)
    token = number * C + lane
    some = (token < length)[:, None]
    piece = tl.arange(0, PIECE)
    row = mixed + (batch * length + token)[:, None] * channels + piece[None, :]
    of_query = row + own // ratio * K
    of_key = of_query + keys
    alike = tl.zeros((C, C), tl.float32)
    near = tl.zeros((C, C), tl.float32)
    q_length = tl.zeros((C,), tl.float32) + 1e-6
    k_length = tl.zeros((C,), tl.float32) + 1e-6
    for at in range(0, K, PIECE):
        q = tl.load(of_query + at, mask=some, other=0.0).to(tl.float32)
        k = tl.load(of_key + at, mask=some, other=0.0).to(tl.float32)
        q_length += tl.sum(q * q, 1)
        k_length += tl.sum(k * k, 1)
        turned = tl.trans(k)
        alike = tl.dot(k, turned, alike, input_precision=PRECISION)
        near = tl.dot(q, turned, near, input_precision=PRECISION)
    q_scale = tl.rsqrt(q_length) / tl.sqrt(K * 1.0)
    k_scale = tl.rsqrt(k_length)
    gate = (batch * length + token) * heads + own
    g = tl.cumsum(tl.load(decay + gate, mask=token < length, other=0.0).to(tl.float32), 0)
    b = tl.load(beta + gate, mask=token < length, other=0.0).to(tl.float32)
    last = tl.sum(tl.where(lane == C - 1, g, 0.0), 0)
    later = lane[:, None] < lane[None, :]
    fade = tl.exp(tl.where(later, float("-inf"), g[:, None] - g[None, :])) * k_scale[None, :]
    first = (head * chunks + number) * C + lane
    tl.store(within + first[:, None] * C + lane[None, :], near * fade * q_scale[:, None])
    tl.store(kept + head * chunks + number, tl.exp(last))
    system = alike * fade * (k_scale * b)[:, None]
    inverse = _inverse(tl.where(lane[:, None] > lane[None, :], system, 0.0), C, PRECISION)
    faded = tl.exp(g)
    of_read = (k_scale * b * faded)[:, None]
    for at in range(0, K, PIECE):
        q = tl.load(of_query + at, mask=some, other=0.0).to(tl.float32)
        k = tl.load(of_key + at, mask=some, other=0.0).to(tl.float32)
        there = first[:, None] * K + at + piece[None, :]
        tl.store(query + there, q * (q_scale * faded)[:, None])
        tl.store(key + there, k * (k_scale * tl.exp(last - g))[:, None])
        tl.store(read + there, tl.dot(inverse, k * of_read, input_precision=PRECISION))
    of_value = row + 2 * keys + own * V
    for at in range(0, V, PIECE):
        v = tl.load(of_value + at, mask=some, other=0.0).to(tl.float32)
        found = tl.dot(inverse, v * b[:, None], input_precision=PRECISION)
        tl.store(value + first[:, None] * V + at + piece[None, :], found)


@triton.jit
def _scan_kernel(
    query, key, read, value, within, decay, state, out, chunks, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's chunks one after the other, for some columns of its values.

    The state is held in two halves of its channels where it is large, as registers are few.
    """
    TWO: tl.constexpr = K >= 32
    HALF: tl.constexpr = K // 2 if TWO else K
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, C)
    channel = tl.arange(0, HALF)
    place = state + (head * K + channel[:, None]) * V + column[None, :]
    upper = tl.load(place)
    if TWO:
        lower = tl.load(place + HALF * V)
    for number in range(chunks):
        first = (head * chunks + number) * C
        wide = (first + token)[:, None] * K + channel[None, :]
        spot = (first + token)[:, None] * V + column[None, :]
        known = tl.dot(tl.load(read + wide), upper, input_precision=PRECISION)
        result = tl.dot(tl.load(query + wide), upper, input_precision=PRECISION)
        if TWO:
            more = wide + HALF
            known = tl.dot(tl.load(read + more), lower, known, input_precision=PRECISION)
            result = tl.dot(tl.load(query + more), lower, result, input_precision=PRECISION)
        new = tl.load(value + spot) - known
        near = tl.load(within + (first + token)[:, None] * C + token[None, :])
        result = tl.dot(near, new, result, input_precision=PRECISION)
        tl.store(out + spot, result)
        kept = tl.load(decay + head * chunks + number)
        turned = tl.trans(tl.load(key + wide))
        upper = tl.dot(turned, new, upper * kept, input_precision=PRECISION)
        if TWO:
            turned = tl.trans(tl.load(key + more))
            lower = tl.dot(turned, new, lower * kept, input_precision=PRECISION)
    tl.store(place, upper)
    if TWO:
        tl.store(place + HALF * V, lower)


@triton.jit
def _norm_kernel(
    core, gated, weight, out, length, padded, heads, ratio, eps, K: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The norm of one head's outputs of some tokens, times silu of their gates."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, V)
    some = (token < length)[:, None]
    like = out.dtype.element_ty
    place = core + ((batch * heads + head) * padded + token)[:, None] * V + column[None, :]
    x = tl.load(place, mask=some, other=0.0).to(like).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
    x = tl.load(weight + column).to(tl.float32)[None, :] * x.to(like).to(tl.float32)
    x = x.to(like).to(tl.float32)
    line = batch * length + token
    wide = 2 * K + 2 * V * ratio
    within = head // ratio * wide + 2 * K + V * ratio + head % ratio * V
    z = gated + line[:, None] * (heads // ratio * wide) + within + column[None, :]
    z = tl.load(z, mask=some, other=0.0).to(tl.float32)
    there = out + line[:, None] * (heads * V) + head * V + column[None, :]
    tl.store(there, (x * (z * tl.sigmoid(z))).to(like), mask=some)


def convolve(projected: Tensor, weight: Tensor, sizes: Heads) -> Tensor:
    """DeltaNet's convolution over texts, and silu: [B, n, channels], all q, all k, all v.

    projected [B, n, q, k, v, z by key head], contiguous; weight [channels, 1, taps].
    """
    batch, length, width = projected.shape
    out = projected.new_empty(batch, length, len(weight))
    _convolve(projected, weight, out, 0, (length * width, width, 1), sizes, mixed=True)
    return out


def convolve_on(mixed: Tensor, weight: Tensor, length: int, sizes: Heads) -> Tensor:
    """The same of texts that go on: mixed [B, channels, earlier tokens and `length` new ones]."""
    out = mixed.new_empty(len(mixed), length, len(weight))
    strides = mixed.stride(0), mixed.stride(2), mixed.stride(1)
    _convolve(mixed, weight, out, mixed.shape[2] - length, strides, sizes, mixed=False)
    return out


def _convolve(
    source: Tensor,
    weight: Tensor,
    out: Tensor,
    shift: int,
    strides: tuple[int, int, int],
    sizes: Heads,
    *,
    mixed: bool,
) -> None:
    batch, length, channels = out.shape
    grid = triton.cdiv(length, _TOKENS), triton.cdiv(channels, _CHANNELS), batch
    _convolve_kernel[grid](
        source, weight.contiguous(), out, length, shift, channels, sizes.keys, sizes.ratio,
        *strides, K=sizes.key_size, V=sizes.value_size, TAPS=weight.shape[-1], MIXED=mixed,
        TOKENS=_TOKENS, CHANNELS=_CHANNELS,
    )  # fmt: skip


def chunked(mixed: Tensor, decay: Tensor, beta: Tensor, state: Tensor, sizes: Heads) -> Tensor:
    """The gated delta rule: float32 [B, heads, n filled up to whole chunks, value size].

    mixed [B, n, channels], see `convolve`; decay, in logarithms, and beta [B, n, heads]; state
    float32 [B, heads, size, value size] is carried on in place.
    """
    batch, length, channels = mixed.shape
    heads, key_size, size = sizes.value_heads, sizes.key_size, sizes.value_size
    chunks = triton.cdiv(length, CHUNK)
    keys = [
        torch.empty(
            (batch, heads, chunks * CHUNK, key_size), dtype=torch.float32, device=mixed.device
        )
        for _ in range(3)
    ]
    value = keys[0].new_empty(batch, heads, chunks * CHUNK, size)
    within = keys[0].new_empty(batch, heads, chunks * CHUNK, CHUNK)
    kept = keys[0].new_empty(batch, heads, chunks)
    query, key, read = keys
    _chunk_kernel[(chunks, batch * heads)](
        mixed, decay.contiguous(), beta.contiguous(), query, key, read, value, within, kept,
        length, chunks, heads, sizes.ratio, sizes.keys, channels, C=CHUNK, K=key_size, V=size,
        PIECE=min(_PIECE, key_size, size), PRECISION=_PRECISION, num_warps=_CHUNK_WARPS,
        num_stages=1,
    )  # fmt: skip
    out = torch.empty_like(value)
    columns = min(_SCAN_COLUMNS, size)
    _scan_kernel[(batch * heads, size // columns)](
        query, key, read, value, within, kept, state, out, chunks, C=CHUNK, K=key_size, V=size,
        COLUMNS=columns, PRECISION=_PRECISION, num_warps=_SCAN_WARPS, num_stages=_SCAN_STAGES,
    )  # fmt: skip
    return out


def gated_norm(core: Tensor, projected: Tensor, weight: Tensor, eps: float, sizes: Heads) -> Tensor:
    """What out_proj reads: [B, n, values].  `core`: see `chunked`; `projected`: see `convolve`."""
    batch, length = projected.shape[:2]
    out = projected.new_empty(batch, length, sizes.values)
    _norm_kernel[(triton.cdiv(length, _NORM_ROWS), sizes.value_heads, batch)](
        core, projected, weight, out, length, core.shape[2], sizes.value_heads, sizes.ratio, eps,
        K=sizes.key_size, V=sizes.value_size, ROWS=_NORM_ROWS,
    )  # fmt: skip
    return out
