"""Activation-aware scales (AWQ, Lin et al. 2023, arXiv 2306.00978), searched on second moments.

A linear map keeps its output when its input channels are divided by s and its columns multiplied
by s, but it is rounded differently: columns that meet large inputs are to be large themselves, so
that the grid of their group suits them.  With D the rounding error of W diag(s), the loss is

    mean over tokens of |D diag(1/s) x|^2 = tr(D K D^T),    K_ij = H_ij / (s_i s_j)

so the second moment H of the inputs says all that the inputs themselves would.  Scales that several
matrices share (all that read one norm) are chosen by the sum of their losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.grid import encode, fit_grid, refuse_unusable
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.precision import full_float32
from pipeline.quantize.solved import energy
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

EXPONENTS = tuple(step / 10 for step in range(11))
"""Powers of the channels' root mean square that are tried; 0, no scaling, comes first."""
SEARCH_ROWS = 256
"""Rows of a matrix that a search looks at: its losses are sums over rows, and many are alike."""
QUIETEST = 1e-2
"""Channels below this part of the mean root mean square count as this loud."""
TOLERANCE = 1.25
"""A stored norm that divides by more than this times less or more than asked is left as it was."""


def candidate_scales(moment: Tensor) -> Tensor:
    """Scales to be tried, float32 [candidates, ..., in], each of geometric mean 1.

    `moment`: float32 [..., in], the mean square of each input channel (any common factor will do).
    """
    rms = moment.float().clamp(min=0).sqrt()
    mean = rms.mean(-1, keepdim=True)
    # Channels that nothing is known of, all of them or one, are as loud as the others.
    level = torch.where(mean > 0, rms / mean, torch.ones_like(rms)).clamp(min=QUIETEST).log()
    level -= level.mean(-1, keepdim=True)
    return torch.stack([(level * exponent).exp() for exponent in EXPONENTS])


def scale_losses(
    weight: Tensor,
    hessian: Tensor,
    candidates: Tensor,
    scheme: AffineScheme,
    options: SolverOptions,
) -> Tensor:
    """What rounding costs under each candidate: float32 [candidates, E].

    `weight`: float [E, out, in]; `hessian`: float32 [E, in, in], sums or means of x x^T;
    `candidates`: float32 [candidates, in], or [candidates, E, in] where each matrix has its own.

    Rounds as `methods.awq` will, clipping search included: measured on the shipped model, scales
    that were chosen for plain ranges lost more than they won.
    """
    matrices = weight[:, _sampled(weight.shape[1], weight.device)].float()
    moment = hessian.diagonal(dim1=1, dim2=2)
    losses = []
    for candidate in candidates:
        scale = candidate.view(-1, 1, candidate.shape[-1])
        scaled = matrices * scale
        quantized = round_clipped(scaled, moment / scale.squeeze(1).square(), scheme, options)
        error = scaled.sub_(quantized.dequantize()).div_(scale)
        with full_float32():
            losses.append(energy(error, hessian))
    return torch.stack(losses)


def round_clipped(
    weight: Tensor, moment: Tensor, scheme: AffineScheme, options: SolverOptions
) -> QuantizedTensor:
    """Round float32 [E, out, in] to grids clipped for the least output error.

    `moment`: float32 [E, in], the mean square of each input, by which the clipping search weights
    each column's squared error: the output error if errors of different columns do not add up.
    """
    grid = fit_grid(
        weight,
        scheme,
        search=options.scale_search,
        turning=options.negative_scales,
        importance=moment.contiguous(),
        backend=solver_backend(weight.device),
    )
    refuse_unusable(grid.scales)
    codes = encode(weight, grid, scheme.bits)
    return QuantizedTensor(scheme, {"codes": codes, "scales": grid.scales, "zeros": grid.zeros})


def _sampled(rows: int, device: torch.device) -> Tensor:
    """Evenly spaced rows, at most SEARCH_ROWS of them."""
    step = -(-rows // SEARCH_ROWS)
    return torch.arange(0, rows, step, device=device)


def best_scales(candidates: Tensor, losses: Tensor) -> Tensor:
    """The candidate of least loss: float32 [in] of losses [candidates], or [E, in] of [.., E].

    Of equal losses the first counts, so that matrices without inputs keep the neutral scale.
    """
    best = losses.argmin(0)
    if losses.dim() == 1:
        return candidates[best]
    return candidates[best, torch.arange(losses.shape[1], device=best.device)]


def fold_norm(
    weight: Tensor, scale: Tensor, *, plus_one: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Divide what a norm multiplies by; returns its new weight and what it was really divided by.

    `weight` [in], any float dtype, kept; `scale` float32 [in]; `plus_one`: the norm multiplies by
    1 + weight; `dtype`: what readers hold the weight in, so the new one is rounded to it.

    The second result, float32 [in], belongs on the consumers' columns: rounding 1 + w near zero to
    a bfloat16 w changes it by a good part of itself.  A channel that cannot be divided by about
    its scale that way keeps its weight, and has 1 there.
    """
    offset = 1.0 if plus_one else 0.0
    factor = weight.float() + offset
    divided = (factor / scale - offset).to(dtype).float()
    effective = factor / (divided + offset)
    miss = effective / scale
    usable = torch.isfinite(effective) & (miss < TOLERANCE) & (miss > 1 / TOLERANCE)
    effective = torch.where(usable, effective, torch.ones_like(effective))
    return torch.where(usable, divided, weight.float()).to(weight.dtype), effective
