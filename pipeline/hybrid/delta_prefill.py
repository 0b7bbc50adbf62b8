"""Gated DeltaNet over a whole prompt (arXiv 2412.06464), by a few kernels (`delta_kernels.py`).

transformers launches ten kernels for each chunk of 64 tokens, 640 in a layer of 4,096, which takes
the CPU longer than a layer's experts take over PCIe, and its arrays of all that lies within chunks
are moved through a GPU's memory some forty times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.hybrid.delta_kernels import chunked, convolve, convolve_on, gated_norm
from pipeline.hybrid.fused_delta import Heads


def forward(own: Any, hidden: Tensor, cache: Any, mask: Tensor | None) -> Tensor:  # noqa: ANN401
    """What a transformers DeltaNet module `own` does with several tokens [B, n, hidden]."""
    if mask is not None:
        hidden = (hidden * mask[:, :, None]).to(hidden.dtype)
    sizes = Heads(own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim)
    projected, gates = own.in_proj_qkvz(hidden), own.in_proj_ba(hidden)
    weight = own.conv1d.weight
    begun = cache is not None and cache.layers[own.layer_idx].has_previous_state[0]
    if cache is None:
        mixed = convolve(projected, weight, sizes)
    else:
        by_head = projected.unflatten(-1, (sizes.key_heads, -1))
        parts = sizes.key_size, sizes.key_size, *2 * (sizes.ratio * sizes.value_size,)
        together = torch.cat([x.flatten(2) for x in by_head.split(parts, dim=-1)[:3]], dim=-1)
        together = cache.update_conv_state(
            together.transpose(1, 2), own.layer_idx, conv_kernel_size=own.conv_kernel_size
        )
        mixed = convolve_on(together, weight, hidden.shape[1], sizes)
        del together
    b, a = (x.flatten(2) for x in gates.unflatten(-1, (sizes.key_heads, 2, -1)).unbind(-2))
    decay = -own.A_log.float().exp() * functional.softplus(a.float() + own.dt_bias)
    shape = (len(hidden), sizes.value_heads, sizes.key_size, sizes.value_size)
    state = hidden.new_zeros(shape, dtype=torch.float32)
    if begun:
        state.copy_(cache.layers[own.layer_idx].recurrent_states[0])
    core = chunked(mixed, decay, b.sigmoid(), state, sizes)
    if cache is not None:
        cache.update_recurrent_state(state, own.layer_idx)
    out: Tensor = own.out_proj(
        gated_norm(core, projected, own.norm.weight, own.norm.variance_epsilon, sizes)
    )
    return out


def install_in(layer: Any) -> None:  # noqa: ANN401
    """Make a decoder layer's DeltaNet, if it has one, read many tokens by `forward`."""
    own = getattr(layer, "linear_attn", None)
    if own is not None and "forward" not in vars(own):
        install(own)


def install(own: Any) -> None:  # noqa: ANN401
    """Make a transformers DeltaNet module read prompts by `forward`, where its heads allow it;
    single tokens, packed sequences and caches that can go back stay the module's own."""
    sizes = own.head_k_dim, own.head_v_dim
    if any(size < 16 or size & (size - 1) for size in sizes):
        return
    plain: Callable[..., Tensor] = own.forward

    def several(
        hidden_states: Tensor,
        cache_params: Any = None,  # noqa: ANN401
        attention_mask: Tensor | None = None,
        **others: Any,  # noqa: ANN401
    ) -> Tensor:
        goes_back = cache_params is not None and cache_params.layers[own.layer_idx].record_past
        packed = others.get("cu_seq_lens_q") is not None
        if hidden_states.shape[1] == 1 or goes_back or packed:
            return plain(hidden_states, cache_params, attention_mask, **others)
        return forward(own, hidden_states, cache_params, attention_mask)

    own.forward = several
