"""Second moments of the inputs of routed experts.

A matrix's Hessian (of the squared output error) is the mean over its tokens of x x^T, up to a
constant that no quantiser depends on.  Sums are kept in float32; the mean is formed once, by
`shrink`, when an expert's token count is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize.precision import full_float32

SLAB_TOKENS = 128
"""Tokens of one expert in one product; the last of an expert is filled up with zeros."""
SLABS = 16
"""Products formed at once.  Part of what fixes the result's bytes; no memory limit changes it."""


def routed_hessians(
    x_sorted: Tensor, offsets: Tensor, *, weights: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Sum over each expert's tokens of x x^T: float32 [E, in, in].

    `x_sorted`: float [S, in], the inputs ordered by expert; `offsets`: integer [E + 1], expert e
    has the rows offsets[e] to offsets[e + 1]; `weights`: float [S], a weight for each row's
    product; `out`: float32 [E, in, in] to add to (and return), so that token batches add up.
    """
    experts, columns = len(offsets) - 1, x_sorted.shape[1]
    if out is None:
        out = torch.zeros((experts, columns, columns), device=x_sorted.device)
    if weights is not None:
        x_sorted = x_sorted * weights.sqrt().unsqueeze(-1).to(x_sorted.dtype)
    first, count, owner = _slabs(offsets.to(x_sorted.device))
    within = torch.arange(SLAB_TOKENS, device=x_sorted.device)
    with full_float32():
        for start in range(0, len(owner), SLABS):
            part = slice(start, start + SLABS)
            used = within < count[part].unsqueeze(1)
            rows = torch.where(used, first[part].unsqueeze(1) + within, 0)
            tokens = x_sorted[rows].float() * used.unsqueeze(-1)
            products = torch.bmm(tokens.transpose(1, 2), tokens)
            _add_by_owner(out, owner[part], products)
    return out


def _slabs(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First row, rows used and expert of each slab; slabs that fill up the last step are empty."""
    sizes = offsets.diff()
    slabs = (sizes + SLAB_TOKENS - 1) // SLAB_TOKENS
    owner = torch.repeat_interleave(slabs)
    place = torch.arange(len(owner), device=owner.device) - (slabs.cumsum(0) - slabs)[owner]
    first = offsets[owner] + place * SLAB_TOKENS
    count = (offsets[owner + 1] - first).clamp(max=SLAB_TOKENS)
    fill = (0, -len(owner) % SLABS)
    pad = torch.nn.functional.pad
    return pad(first, fill), pad(count, fill), pad(owner, fill)


def _add_by_owner(out: Tensor, owner: Tensor, products: Tensor) -> None:
    """out[owner[i]] += products[i], always in the order of i."""
    if out.device.type == "cpu":
        out.index_add_(0, owner, products)  # in order; index_put_ on a CPU adds atomically
    else:
        out.index_put_((owner,), products, accumulate=True)  # sorted; index_add_ there is atomic


def shrink(hessian_sum: Tensor, counts: Tensor, all_token_mean: Tensor, strength: float) -> Tensor:
    """Mean Hessians, those of experts that saw few tokens drawn towards a common one.

    (sum_e + m * mean) / (n_e + m), with m = `strength` in tokens: an expert of m tokens is half
    its own.  `hessian_sum`: float32 [E, in, in]; `counts`: [E], tokens (or the sum of their
    weights); `all_token_mean`: float32 [in, in], or [E, in, in] where experts have inputs of
    their own (down projections).  Returns float32 [E, in, in].

    An expert whose tokens are fewer than its inputs has a Hessian of less than full rank; the mean
    over all tokens of the layer restores it, and costs one matrix a layer.
    """
    seen = counts.to(hessian_sum).view(-1, 1, 1)
    if strength <= 0 and bool((seen == 0).any()):
        raise ValueError("an expert without tokens needs a strength above 0")
    mean = all_token_mean if all_token_mean.dim() == 3 else all_token_mean.unsqueeze(0)
    return (hessian_sum + strength * mean) / (seen + strength)
