"""Gated DeltaNet over a whole prompt, its scan over chunks in one kernel (arXiv 2412.06464).

transformers launches ten kernels for each chunk of 64 tokens, 640 in a layer of 4,096, which takes
the CPU longer than a layer's experts take over PCIe.  Here what lies within chunks is computed for
all of them at once, as there, and one Triton kernel carries the state from chunk to chunk: in
float32, in the order of transformers.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202, ANN401
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

CHUNK = 64
_COLUMNS = 32


@triton.jit
def _scan_kernel(
    query,
    key,
    read,
    value,
    within,
    decay,
    state,
    out,
    chunks,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One head's chunks one after the other, for some columns of its values."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, C)
    channel = tl.arange(0, K)
    place = state + (head * K + channel[:, None]) * V + column[None, :]
    memory = tl.load(place)
    for number in range(chunks):
        first = (head * chunks + number) * C
        wide = (first + token)[:, None] * K + channel[None, :]
        spot = (first + token)[:, None] * V + column[None, :]
        known = tl.dot(tl.load(read + wide), memory, input_precision="ieee")
        new = tl.load(value + spot) - known
        result = tl.dot(tl.load(query + wide), memory, input_precision="ieee")
        near = tl.load(within + (first + token)[:, None] * C + token[None, :])
        result += tl.dot(near, new, input_precision="ieee")
        tl.store(out + spot, result)
        kept = tl.load(decay + head * chunks + number)
        added = tl.dot(tl.trans(tl.load(key + wide)), new, input_precision="ieee")
        memory = memory * kept + added
    tl.store(place, memory)


def chunked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """The gated delta rule over [B, n] tokens; [B, n, heads, value size], in query's dtype.

    query and key [B, n, heads, size], value [B, n, heads, value size]; decay, in logarithms, and
    beta [B, n, heads]; state float32 [B, heads, size, value size] is carried on in place.
    """
    dtype, length, key_size, size = query.dtype, query.shape[1], key.shape[-1], value.shape[-1]
    pad = -length % CHUNK

    def by_chunk(x: Tensor) -> Tensor:
        x = x.transpose(1, 2).float()
        x = functional.pad(x, (0, 0) * (x.ndim - 3) + (0, pad))
        return x.unflatten(2, (-1, CHUNK)).contiguous()

    q, k, v, g, b = (by_chunk(x) for x in (query, key, value, decay, beta))
    q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    g = g.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    fade = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    weighed = k * b.unsqueeze(-1)
    system = (weighed @ k.transpose(-1, -2)) * fade
    right = torch.cat([v * b.unsqueeze(-1), weighed * g.exp().unsqueeze(-1)], dim=-1)
    del v, weighed  # let go of here and below, as these are what a prompt's memory is
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    del system, right
    values, read = (x.contiguous() for x in solved.split([size, key_size], dim=-1))
    del solved
    within = (q @ k.transpose(-1, -2)) * fade
    del fade
    q = q * g.exp().unsqueeze(-1)
    last = g[..., -1:]
    k = k * (last - g).exp().unsqueeze(-1)
    out = torch.empty_like(values)
    batch, heads, chunks = q.shape[:3]
    columns = min(_COLUMNS, size)
    _scan_kernel[(batch * heads, size // columns)](
        q, k, read, values, within, last.exp().contiguous(), state, out, chunks,
        C=CHUNK, K=key_size, V=size, COLUMNS=columns, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)


def forward(own: Any, hidden: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """What a transformers DeltaNet module `own` does with several tokens [B, n, hidden]."""
    if mask is not None:
        hidden = (hidden * mask[:, :, None]).to(hidden.dtype)
    qkvz, ba = own.in_proj_qkvz(hidden), own.in_proj_ba(hidden)
    query, key, value, z, b, a = own.fix_query_key_value_ordering(qkvz, ba)
    mixed = torch.cat([x.flatten(2) for x in (query, key, value)], dim=-1).transpose(1, 2)
    begun = cache is not None and cache.layers[own.layer_idx].has_previous_state[0]
    if cache is not None:
        size = own.conv_kernel_size
        mixed = cache.update_conv_state(mixed, own.layer_idx, conv_kernel_size=size)
    mixed = functional.conv1d(
        mixed, own.conv1d.weight, padding=own.conv_kernel_size - 1, groups=mixed.shape[1]
    )[:, :, : mixed.shape[-1]]
    mixed = functional.silu(mixed[:, :, -hidden.shape[1] :]).transpose(1, 2)
    query, key, value = mixed.split([own.key_dim, own.key_dim, own.value_dim], dim=-1)
    repeats = own.num_v_heads // own.num_k_heads
    query, key = (
        x.unflatten(-1, (-1, own.head_k_dim)).repeat_interleave(repeats, dim=2)
        for x in (query, key)
    )
    value = value.unflatten(-1, (-1, own.head_v_dim))
    decay = -own.A_log.float().exp() * functional.softplus(a.float() + own.dt_bias)
    shape = (len(hidden), own.num_v_heads, own.head_k_dim, own.head_v_dim)
    state = hidden.new_zeros(shape, dtype=torch.float32)
    if begun:
        state.copy_(cache.layers[own.layer_idx].recurrent_states[0])
    core = chunked(query, key, value, decay, b.sigmoid(), state)
    if cache is not None:
        cache.update_recurrent_state(state, own.layer_idx)
    core = own.norm(core.reshape(-1, own.head_v_dim), z.reshape(-1, own.head_v_dim))
    out: Tensor = own.out_proj(core.view(*hidden.shape[:2], -1))
    return out


def install_in(layer: Any) -> None:
    """Make a decoder layer's DeltaNet, if it has one, read many tokens by `forward`."""
    own = getattr(layer, "linear_attn", None)
    if own is not None and "forward" not in vars(own):
        install(own)


def install(own: Any) -> None:
    """Make a transformers DeltaNet module read prompts by `forward`, where its heads allow it;
    single tokens, packed sequences and caches that can go back stay the module's own."""
    sizes = own.head_k_dim, own.head_v_dim
    if any(size < 16 or size & (size - 1) for size in sizes):
        return
    plain: Callable[..., Tensor] = own.forward

    def several(
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        goes_back = cache_params is not None and cache_params.layers[own.layer_idx].record_past
        packed = others.get("cu_seq_lens_q") is not None
        if hidden_states.shape[1] == 1 or goes_back or packed:
            return plain(hidden_states, cache_params, attention_mask, **others)
        return forward(own, hidden_states, cache_params, attention_mask)

    own.forward = several
