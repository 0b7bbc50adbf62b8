"""Second moments of the inputs of routed experts.

A matrix's Hessian (of the squared output error) is the mean over its tokens of x x^T, up to a
constant that no quantiser depends on.  Sums are kept in float32; the mean is formed once, by
`shrink`, when an expert's token count is known.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.precision import full_float32
from pipeline.quantize.sent import sent

HESSIAN_TOKENS = 256
"""Tokens of one expert in one product; the last of an expert is filled up with zeros."""
HESSIAN_EXPERTS = 8
"""Experts summed at once, always this many.  Both are part of what fixes the result's bytes, and no
memory limit changes them."""

PRIOR = 10.0
"""Weight of no knowledge, in tokens per input column, where substitute statistics are formed.
Measured (docs/quality.md): without it a text of 32 to 1,024 tokens in all gave 1.1 to 1.6 times
rounding's error; plenty of tokens lose nothing by it."""


def routed_hessians(
    x_sorted: Tensor, offsets: Tensor, *, weights: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Sum over each expert's tokens of x x^T: float32 [E, in, in].

    `x_sorted`: float [S, in], the inputs ordered by expert; `offsets`: integer [E + 1], expert e
    has the rows offsets[e] to offsets[e + 1]; `weights`: float [S], a weight for each row's
    product; `out`: float32 [E, in, in] to add to (and return), so that token batches add up.

    An expert's sum depends on its own rows only, not on the experts it is called with.
    """
    experts, columns = len(offsets) - 1, x_sorted.shape[1]
    if out is None:
        out = torch.zeros((experts, columns, columns), device=x_sorted.device)
    if weights is not None:
        x_sorted = x_sorted * weights.sqrt().unsqueeze(-1).to(x_sorted.dtype)
    offsets = sent(offsets, x_sorted.device)
    if solver_backend(x_sorted.device) == "triton":
        kernels = importlib.import_module("pipeline.quantize.triton_kernels")
        kernels.add_gram(x_sorted, offsets, out)
        return out
    with full_float32():
        _add_tiles(x_sorted, offsets, out)
    return out


def _add_tiles(x_sorted: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Add the sums of all experts to `out`, a tile of experts of about equal size at a time."""
    sizes = offsets.diff()
    # Experts of one tile walk in step, so the tile lasts as long as its largest one.
    by_size = sizes.argsort(stable=True)
    padding = -len(by_size) % HESSIAN_EXPERTS
    first = F.pad(offsets[by_size], (0, padding))
    count = F.pad(sizes[by_size], (0, padding))
    longest = count.view(-1, HESSIAN_EXPERTS).amax(1).tolist()
    within = torch.arange(HESSIAN_TOKENS, device=out.device)
    for tile, tokens in enumerate(longest):
        part = slice(tile * HESSIAN_EXPERTS, (tile + 1) * HESSIAN_EXPERTS)
        total = torch.zeros((HESSIAN_EXPERTS, *out.shape[1:]), device=out.device)
        for start in range(0, tokens, HESSIAN_TOKENS):
            place = within + start
            used = place < count[part].unsqueeze(1)
            rows = torch.where(used, first[part].unsqueeze(1) + place, 0)
            slab = x_sorted[rows].float().masked_fill_(~used.unsqueeze(-1), 0)
            total.baddbmm_(slab.transpose(1, 2), slab)
        members = by_size[part]
        out[members] += total[: len(members)]


def add_moment(total: Tensor | None, inputs: Tensor) -> Tensor:
    """`total` float32 [in, in] plus the sum of x x^T over `inputs` [..., in], in place.

    None: the sum alone.  In full float32, whatever the process has switched on.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    with full_float32():
        return x.T @ x if total is None else total.addmm_(x.T, x)


def effective_rank(hessians: Tensor) -> Tensor:
    """In how many directions each expert's inputs spread: float32 [E], 0 for one without tokens.

    (tr H)^2 / tr(H^2), the participation ratio of the eigenvalues: n for n equal ones, 1 where one
    outweighs the rest; no scale of H changes it.  It needs no eigenvalues, which at full size
    would cost more than solving, and is at most exp of their entropy, another such measure.
    `hessians`: float32 [E, in, in].
    """
    trace = hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
    squares = torch.linalg.vector_norm(hessians, dim=(1, 2)).square()
    return torch.where(squares > 0, trace.square() / squares.clamp_min(1e-30), 0.0)


def router_emphasis(weights: Tensor, offsets: Tensor) -> Tensor:
    """Weights of an expert's tokens by what the router gives them: float32 [S], mean 1 an expert.

    The layer adds g * W x, so a token's squared error counts g^2.  `weights`: float [S], ordered
    by expert, whose rows are offsets[e] to offsets[e + 1].
    """
    squares = weights.float().square()
    counts = sent(offsets, weights.device).diff()
    owner = torch.repeat_interleave(torch.arange(len(counts), device=weights.device), counts)
    total = torch.zeros(len(counts), device=weights.device).index_add_(0, owner, squares)
    return squares * (counts / total.clamp_min(1e-30))[owner]


def rounded_out(mean: Tensor, tokens: int) -> Tensor:
    """A second moment of few tokens drawn towards equal ones in all directions.

    (n * mean + m * level * I) / (n + m), level being the diagonal's mean, m = `PRIOR` tokens per
    input column.  What few tokens never reached is not free to be traded away: with none left of
    them a quantiser has nothing to make up and rounds.  `mean`: float32 [..., in, in], of `tokens`.
    """
    columns = mean.shape[-1]
    prior = PRIOR * columns
    level = mean.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    identity = torch.eye(columns, device=mean.device)
    return (tokens * mean + prior * level * identity) / (tokens + prior)


def shrink(hessian_sum: Tensor, counts: Tensor, all_token_mean: Tensor, strength: float) -> Tensor:
    """Mean Hessians, those of experts that saw few tokens drawn towards a common one.

    (sum_e + m * mean) / (n_e + m), with m = `strength` in tokens: an expert of m tokens is half
    its own.  `hessian_sum`: float32 [E, in, in]; `counts`: [E], tokens (or the sum of their
    weights); `all_token_mean`: float32 [in, in], or [E, in, in] where experts have inputs of
    their own (down projections).  Returns float32 [E, in, in].

    An expert whose tokens are fewer than its inputs has a Hessian of less than full rank; the mean
    over all tokens of the layer restores it, and costs one matrix a layer.
    """
    seen = sent(counts, hessian_sum.device).to(hessian_sum.dtype).view(-1, 1, 1)
    if strength <= 0 and bool((seen == 0).any()):
        raise ValueError("an expert without tokens needs a strength above 0")
    mean = all_token_mean if all_token_mean.dim() == 3 else all_token_mean.unsqueeze(0)
    return (hessian_sum + strength * mean) / (seen + strength)
