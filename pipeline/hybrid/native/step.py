"""The compiled kernels of one decode step between its linear layers.

They do what the Triton kernels of the same names do on a GPU (`pipeline/hybrid/fused_*.py`), and
round to bfloat16 where the transformers model does.  `T` is tokens, one of each sequence; all
tensors are contiguous bfloat16 on the CPU where nothing else is said.  No result depends on the
number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.hybrid.native.library import Library, threads

SIZES, GROUPS, VALUES, EXPERTS, CHOSEN = 512, 16, 4096, 4096, 64
"""At most: channels of a head, queries of one key head (attend.c), channels of the values of one
key head (delta.c), experts, and those chosen for a token (route.c)."""


def norm(x: Tensor, weight: Tensor, eps: float, library: Library) -> Tensor:
    """x [..., n] by the "1 + w" norm of weight [n], n a multiple of 16."""
    out = torch.empty_like(x)
    columns = weight.shape[0]
    library.norm(
        *(x.data_ptr(), weight.data_ptr(), x.numel() // columns, columns, eps, out.data_ptr()),
        library.kind,
    )
    return out


def delta(
    mixed: Tensor,
    gates: Tensor,
    window: Tensor,
    weight: Tensor,
    memory: Tensor,
    decay: tuple[Tensor, Tensor],
    scale: tuple[Tensor, float],
    library: Library,
) -> Tensor:
    """One step of gated DeltaNet: convolution, delta rule and gated norm; [T, values].

    mixed [T, q, k, v, z by key head] and gates [T, beta and time by key head]: the projections,
    rows of which may be longer; window [T, channels, taps] and memory float32 [T, value heads, key
    size, value size]: changed; weight [channels, 1, taps]; decay: A_log and dt_bias; scale: weight
    and epsilon of the norm.  Sizes are multiples of 16.
    """
    tokens, heads, keys, values = memory.shape
    channels, taps = window.shape[1:]
    key_heads = (channels - heads * values) // (2 * keys)
    out = mixed.new_empty((tokens, heads * values))
    library.delta(
        *(mixed.data_ptr(), mixed.stride(0), gates.data_ptr(), gates.stride(0)),
        *(weight.data_ptr(), decay[0].data_ptr(), decay[1].data_ptr(), scale[0].data_ptr()),
        *(scale[1], window.data_ptr(), memory.data_ptr(), out.data_ptr()),
        *(tokens, key_heads, heads // key_heads, keys, values, taps),
        *(library.kind, threads(), library.parallel),
    )
    return out


def route(
    logits: Tensor, experts: int, chosen: int, library: Library, *, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of the router's softmax, and the shared expert up to its down projection.

    logits [T, experts + 2 * shared + 1]: router, shared gate and up, the shared expert's own gate;
    or [T, experts], without a shared one.  Returns index int64 and weights [T, chosen], of equal
    logits those of lower numbers, and silu(gate) * up [T, shared].
    """
    tokens = len(logits)
    shared = max(0, (logits.shape[1] - experts - 1) // 2)
    index = logits.new_empty((tokens, chosen), dtype=torch.int64)
    weights, inner = logits.new_empty((tokens, chosen)), logits.new_empty((tokens, shared))
    library.route(
        *(logits.data_ptr(), tokens, experts, shared, chosen, normalise),
        *(index.data_ptr(), weights.data_ptr(), inner.data_ptr(), library.kind),
    )
    return index, weights, inner


def finish(routed: Tensor, shared: Tensor, gate: Tensor, library: Library) -> Tensor:
    """routed [T, H] + sigmoid(gate) * shared [T, H]; gate [T, 1], rows of which may be longer."""
    out = torch.empty_like(routed)
    library.finish(
        *(routed.data_ptr(), shared.data_ptr(), gate.data_ptr(), gate.stride(0)),
        *(*routed.shape, out.data_ptr(), library.kind),
    )
    return out


def rotate(
    mixed: Tensor,
    heads: tuple[int, int],
    norms: tuple[Tensor, Tensor, float],
    rotary: tuple[Tensor, Tensor],
    library: Library,
) -> tuple[Tensor, Tensor]:
    """Norms and rotary embedding: query [T, heads, size] and keys [T, key heads, size].

    mixed [T, q and gate by head, k, v]; heads: of queries, and of keys; norms: of queries and keys,
    and epsilon; rotary: cos and sin [T or 1, 1, turned].  Sizes are multiples of 16.
    """
    size, (cos, sin) = norms[0].shape[0], rotary
    query = mixed.new_empty((len(mixed), heads[0], size))
    keys = mixed.new_empty((len(mixed), heads[1], size))
    library.rotate(
        *(mixed.data_ptr(), mixed.stride(0), norms[0].data_ptr(), norms[1].data_ptr(), norms[2]),
        *(cos.data_ptr(), sin.data_ptr(), cos.shape[-1] if len(cos) > 1 else 0, cos.shape[-1]),
        *(len(mixed), *heads, size, query.data_ptr(), keys.data_ptr(), library.kind),
    )
    return query, keys


def attend(
    mixed: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    library: Library,
) -> Tensor:
    """Gated attention: [T, heads, size].

    mixed: see `rotate`; query [T, heads, size]; keys and values [T, key heads, n, size], of the
    same strides, that of the last 1; mask: bool [T, n], which keys are seen.  MemoryError where
    there is no room for parts of the sums.
    """
    out = torch.empty_like(query)
    tokens, heads, size = query.shape
    if library.attend(
        *(mixed.data_ptr(), mixed.stride(0), query.data_ptr(), keys.data_ptr()),
        *(values.data_ptr(), *keys.stride()[:3], None if mask is None else mask.data_ptr()),
        *(scaling, tokens, heads, keys.shape[1], keys.shape[2], size, out.data_ptr()),
        *(library.kind, threads(), library.parallel),
    ):
        raise MemoryError("no memory for attention's sums")
    return out
