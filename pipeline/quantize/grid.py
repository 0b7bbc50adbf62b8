"""Scales and zero points of affine groups: the grid that codes are rounded to.

The search tries shrunk ranges (GPTQ's `find_params`, arXiv 2210.17323) and, for each, the scale
that fits the codes it gives best in the least-squares sense.

A symmetric grid reaches one step further below zero than above it (-8 to 7 steps at 4 bits), so a
group whose longer side is the positive one gets a negative scale, which turns the grid around.

Scales are rounded to bfloat16 and kept in float16's normal range *before* any code is computed:
readers hold them as float16 (GPTQ files) or bfloat16 (torch's int4 CPU kernel), and both see the
same number.  Zero points are at least 1, since GPTQ v1 files store zero - 1 in an unsigned field.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import NumericalError
from pipeline.quantize.backend import Backend
from pipeline.quantize.tensor import AffineScheme

SMALLEST_SCALE = 2.0**-14
"""float16's smallest normal number; smaller groups are rounded on this grid."""
LARGEST_SCALE = 65280.0
"""The largest number that both float16 and bfloat16 hold."""
SEARCH_SHRINKS = tuple(1.2 - 0.04 * step for step in range(18))
"""Ranges tried, as fractions of the group's own range (above 1: small groups of few levels gain by
a coarser grid that meets them)."""

_SLAB_ELEMENTS = 1 << 17
"""Weights per step on a CPU: the step's temporaries stay in the cache."""
_SLAB_ELEMENTS_DEVICE = 1 << 26
"""Weights per step elsewhere: 256 MiB a temporary."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every row and group, of [..., out, in] weights."""

    scales: Tensor
    """float16 [..., out, in / group]; each value is representable in bfloat16 too, none is 0, and
    below 0 are symmetric ones only."""
    zeros: Tensor
    """uint8 [..., out, in / group], 1 <= zero < 2**bits."""


def fit_grid(
    weight: Tensor,
    scheme: AffineScheme,
    *,
    search: bool,
    turning: bool = True,
    importance: Tensor | None = None,
    backend: Backend = "torch",
) -> Grid:
    """Choose scales and zeros for `weight` float [E, out, in].

    `search`: least squared error over shrunk ranges, else plain minimum and maximum.
    `turning`: symmetric groups may have a scale below 0.
    `importance`: float32 [E, in], a weight for each column's squared error in the search.
    Where a weight is not finite or too large for a float16 scale, scales are Inf
    (`refuse_unusable`).
    """
    experts, rows, columns = weight.shape
    group = scheme.group(columns)
    shape = (experts, rows, columns // group)
    if search and backend == "triton":
        scale, zero = importlib.import_module("pipeline.quantize.triton_kernels").fit_groups(
            weight,
            importance,
            group=group,
            top=2**scheme.bits - 1,
            symmetric_zero=2 ** (scheme.bits - 1) if scheme.symmetric else 0,
            turning=turning,
            shrinks=SEARCH_SHRINKS,
            smallest=SMALLEST_SCALE,
        )
        scales, zeros = storable(scale), zero
    else:
        scales, zeros = _fit_slabs(
            weight.view(*shape, group), scheme, search, turning and scheme.symmetric, importance
        )
    return Grid(scales, zeros)


def _fit_slabs(
    weight: Tensor, scheme: AffineScheme, search: bool, turning: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [E, out, groups] of [E, out, groups, group], a slab of rows at a time."""
    experts, rows, groups, group = weight.shape
    flat = weight.flatten(0, 1)
    scales = torch.empty(flat.shape[:2], dtype=torch.float16, device=weight.device)
    zeros = torch.empty(flat.shape[:2], dtype=torch.uint8, device=weight.device)
    elements = _SLAB_ELEMENTS if weight.device.type == "cpu" else _SLAB_ELEMENTS_DEVICE
    step = max(1, elements // (groups * group))
    expert_of_row = torch.arange(experts, device=weight.device).repeat_interleave(rows)
    for start in range(0, experts * rows, step):
        part = slice(start, start + step)
        values = flat[part].float()
        weights = None
        if importance is not None:
            weights = importance[expert_of_row[part]].view(-1, groups, group)
        turn = _turn(values) if turning else torch.ones_like(values[..., 0])
        values = values * turn.unsqueeze(-1)
        scale, zero = _search(values, weights, scheme) if search else _range(values, scheme, 1.0)
        scales[part] = storable(scale * turn)
        zeros[part] = zero.to(torch.uint8)
    return scales.view(experts, rows, groups), zeros.view(experts, rows, groups)


def encode(values: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round `values` float [E, out, in] to the grid; uint8 codes of the same shape."""
    groups = grid.scales.shape[-1]
    split = values.float().unflatten(-1, (groups, -1))
    zeros = grid.zeros.unsqueeze(-1).float()
    codes = (split / grid.scales.unsqueeze(-1).float()).round_().add_(zeros)
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)


def _turn(values: Tensor) -> Tensor:
    """-1 for groups whose largest weight lies above zero, else 1: float32 [n, groups]."""
    longer = values.amax(-1) > -values.amin(-1)
    return 1.0 - 2.0 * longer.float()


def _range(values: Tensor, scheme: AffineScheme, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero (both float32 [n, groups]) that cover `shrink` of each group's range."""
    top = 2**scheme.bits - 1
    low = values.amin(-1).clamp(max=0) * shrink
    high = values.amax(-1).clamp(min=0) * shrink
    if scheme.symmetric:
        zero = torch.full_like(low, float(2 ** (scheme.bits - 1)))
        return torch.maximum(low.abs() / zero, high / (top - zero)), zero
    scale = (high - low) / top
    zero = (-low / scale.clamp(min=SMALLEST_SCALE)).round_().clamp_(1, top)
    return scale, zero


def _search(values: Tensor, weights: Tensor | None, scheme: AffineScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero (both float32 [n, groups]) of the least weighted squared error."""
    top = 2**scheme.bits - 1
    weighted = values if weights is None else values * weights
    best = torch.full(values.shape[:2], -float("inf"), device=values.device)
    best_scale, best_zero = _range(values, scheme, 1.0)
    for shrink in SEARCH_SHRINKS:
        scale, zero = _range(values, scheme, shrink)
        scale = scale.clamp(min=SMALLEST_SCALE)
        codes = (values / scale.unsqueeze(-1)).round_()
        codes = torch.clamp(codes, -zero.unsqueeze(-1), (top - zero).unsqueeze(-1))
        along = (weighted * codes).sum(-1)
        energy = (codes.square() if weights is None else codes.square() * weights).sum(-1)
        # With codes c fixed, |w - s c|^2 is least at s = <w, c> / <c, c>, and is then
        # |w|^2 - <w, c>^2 / <c, c>: the ratio below is what the group gains over all zeros.
        gain = torch.where(energy > 0, along.square() / energy, torch.zeros_like(energy))
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better & (energy > 0), along / energy, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def storable(scale: Tensor) -> Tensor:
    """float16 scales that bfloat16 holds too; NaN and what is too large become Inf.

    The sign stays; what is 0 or nearly so becomes the smallest scale.
    """
    rounded = scale.abs().clamp(min=SMALLEST_SCALE).to(torch.bfloat16)
    too_large = ~(rounded.float() <= LARGEST_SCALE)
    sized = rounded.to(torch.float16).masked_fill_(too_large, float("inf"))
    return torch.where(scale < 0, -sized, sized)


def refuse_unusable(scales: Tensor) -> None:
    """Raise NumericalError for the first matrix of float16 [E, out, groups] that has an Inf scale.

    Apart from `fit_grid`, since a GPU has to be waited for.
    """
    usable = torch.isfinite(scales).flatten(1).all(dim=1)
    if not bool(usable.all()):
        index = int((~usable).nonzero()[0, 0])
        raise NumericalError(
            f"matrix {index} of the batch holds NaN, Inf or a weight too large for a float16 "
            f"scale; check the source tensor"
        )
