"""Triton kernels of one decode step for gated DeltaNet (arXiv 2412.06464).

Each does what several of the transformers model's own small kernels do, and rounds to the model's
dtype where those do.  All sizes are known without Python and nothing is waited for: a CUDA graph
holds them.  `T` is tokens, one of each sequence.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _convolve_kernel(
    mixed,
    state,
    weight,
    out,
    keys,
    values,
    ratio,
    taps,
    stride,
    K: tl.constexpr,
    V: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the causal convolution, and silu; the window of each channel moves on by one.

    mixed holds q, k, v and z of one key head after the other; channels are all q, all k, all v.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    channels = 2 * keys + values
    used = channel < channels
    head = tl.where(channel < 2 * keys, channel % keys // K, (channel - 2 * keys) // (V * ratio))
    inner = tl.where(
        channel < 2 * keys,
        channel // keys * K + channel % K,
        2 * K + (channel - 2 * keys) % (V * ratio),
    )
    new = tl.load(mixed + token * stride + head * (2 * K + 2 * V * ratio) + inner, mask=used)
    tap = tl.arange(0, TAPS)
    window = state + (token * channels + channel)[:, None] * taps + tap[None, :]
    inside = used[:, None] & (tap < taps)[None, :]
    older = inside & (tap + 1 < taps)[None, :]
    now = tl.where((tap == taps - 1)[None, :], new[:, None], tl.load(window + 1, mask=older))
    kernel = tl.load(weight + channel[:, None] * taps + tap[None, :], mask=inside, other=0.0)
    total = tl.sum(tl.where(inside, now.to(tl.float32) * kernel.to(tl.float32), 0.0), 1)
    tl.debug_barrier()
    tl.store(window, now, mask=inside)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * channels + channel, total * tl.sigmoid(total), mask=used)


@triton.jit
def _delta_kernel(
    mixed,
    gates,
    convolved,
    state,
    a_log,
    dt_bias,
    norm,
    out,
    heads,
    keys,
    values,
    ratio,
    stride,
    gate_stride,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """One step of the gated delta rule for one value head, and the gated norm of its output."""
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    group = head // ratio
    within = head % ratio
    like = out.dtype.element_ty
    row = tl.arange(0, K)
    column = tl.arange(0, V)
    base = convolved + token * (2 * keys + values)
    query = tl.load(base + group * K + row).to(tl.float32)
    key = tl.load(base + keys + group * K + row).to(tl.float32)
    value = tl.load(base + 2 * keys + head * V + column).to(tl.float32)
    query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6) / tl.sqrt(K * 1.0)
    key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
    gate = gates + token * gate_stride + group * 2 * ratio + within
    beta = tl.sigmoid(tl.load(gate).to(tl.float32)).to(like).to(tl.float32)
    time = tl.load(gate + ratio).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    soft = tl.where(time > 20.0, time, tl.log(1.0 + tl.exp(time)))
    decay = tl.exp(-tl.exp(tl.load(a_log + head).to(tl.float32)) * soft)
    place = state + ((token * heads + head) * K + row[:, None]) * V + column[None, :]
    memory = tl.load(place) * decay
    known = tl.sum(memory * key[:, None], 0)
    memory += key[:, None] * ((value - known) * beta)[None, :]
    tl.store(place, memory)
    result = tl.sum(memory * query[:, None], 0).to(like).to(tl.float32)
    result = result * tl.rsqrt(tl.sum(result * result, 0) / V + eps)
    result = tl.load(norm + column).to(tl.float32) * result.to(like).to(tl.float32)
    result = result.to(like).to(tl.float32)
    z = mixed + token * stride + group * (2 * K + 2 * V * ratio) + 2 * K + V * ratio + within * V
    z = tl.load(z + column).to(tl.float32)
    tl.store(out + token * values + head * V + column, (result * (z * tl.sigmoid(z))).to(like))


@dataclass(frozen=True)
class Heads:
    """Heads of a DeltaNet layer: so many, and of so many channels each."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int

    @property
    def keys(self) -> int:
        """Channels of all keys."""
        return self.key_heads * self.key_size

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_size

    @property
    def ratio(self) -> int:
        """Value heads of one key head."""
        return self.value_heads // self.key_heads


def convolve(mixed: Tensor, state: Tensor, weight: Tensor, out: Tensor, sizes: Heads) -> None:
    """One step of DeltaNet's convolution.

    mixed [T, q, k, v, z by key head]; state [T, channels, taps], moved on; weight
    [channels, 1, taps]; out [T, channels].
    """
    channels, taps = state.shape[1:]
    _convolve_kernel[(triton.cdiv(channels, 128), mixed.shape[0])](
        mixed, state, weight, out, sizes.keys, sizes.values, sizes.ratio, taps, mixed.stride(0),
        K=sizes.key_size, V=sizes.value_size, TAPS=triton.next_power_of_2(taps), BLOCK=128,
    )  # fmt: skip


def delta(
    mixed: Tensor, gates: Tensor, convolved: Tensor, state: Tensor, a_log: Tensor, dt_bias: Tensor,
    norm: tuple[Tensor, float], out: Tensor, sizes: Heads,
) -> None:  # fmt: skip
    """One step of the gated delta rule and the gated norm behind it.

    mixed, gates: the two input projections, rows of which may be longer; convolved: see `convolve`;
    state float32 [T, value heads, key size, value size], changed; out [T, values].
    """
    _delta_kernel[(sizes.value_heads, mixed.shape[0])](
        mixed, gates, convolved, state, a_log, dt_bias, norm[0], out, sizes.value_heads,
        sizes.keys, sizes.values, sizes.ratio, mixed.stride(0), gates.stride(0), norm[1],
        K=sizes.key_size, V=sizes.value_size, num_warps=8,
    )  # fmt: skip
