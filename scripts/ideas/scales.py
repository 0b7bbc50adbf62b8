"""Scales chosen inside the column loop, once the errors of the columns before have arrived.

The pipeline fits all scales to the weights as they are and then walks over the columns.  Here
groups are processed whole, one after the other, and a group's scales are fitted to what its columns
are to be rounded to by then (as GPTQ does without static groups), or, `jointly`, a row takes the
one of all ranges that the search knows, either way round, whose codes leave it least: every
candidate is rounded column by column with the group's own feedback, as the loop would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from ideas.tried import constant
from pipeline.quantize import factor
from pipeline.quantize.backend import solver_backend
from pipeline.quantize.factor import Factored, column_importance
from pipeline.quantize.grid import SEARCH_SHRINKS, Grid, fit_grid, storable
from pipeline.quantize.methods import gptq
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.refine import descend, refit_scales
from pipeline.quantize.sweep import _round_block
from pipeline.quantize.tensor import AffineScheme


@contextmanager
def fitted_in_loop(group: int, *, jointly: bool) -> Iterator[None]:
    """GPTQ solves like this for a while; `group`: input columns that share a scale."""
    with ExitStack() as stack:
        stack.enter_context(constant(gptq, "factorise", partial(_factorise, group)))
        stack.enter_context(constant(gptq, "_solve", partial(_solve, jointly)))
        yield


def _factorise(group: int, hessian: Tensor, order: Tensor, damping: float) -> Factored:
    """The same with every group's columns beside each other, the largest group first."""
    moment = hessian.diagonal(dim1=1, dim2=2)
    level = moment.unflatten(-1, (-1, group)).mean(-1).repeat_interleave(group, -1)
    # Sorted by moment already; a stable sort by the group's level keeps that within groups.
    by_level = level.gather(1, order).argsort(dim=-1, descending=True, stable=True)
    return factor.factorise(hessian, order.gather(1, by_level), damping)


def _solve(
    jointly: bool,
    weight: Tensor,
    hessian: Tensor,
    factored: Factored,
    scheme: AffineScheme,
    options: SolverOptions,
) -> tuple[Tensor, Grid]:
    """In the place of `gptq._solve`."""
    group = scheme.group(weight.shape[-1])
    shape = (*weight.shape[:2], weight.shape[-1] // group)
    scales = torch.empty(shape, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    importance = column_importance(factored)
    whole = AffineScheme(scheme.bits, -1, scheme.symmetric)
    columns = factored.order.flip(-1)  # working position -> stored column
    dense = weight.gather(2, columns.unsqueeze(1).expand_as(weight))
    error = torch.empty_like(dense)
    for stop in range(weight.shape[-1], 0, -group):
        block = slice(stop - group, stop)
        target = dense[..., block] + error[..., stop:] @ factored.triangle[:, stop:, block]
        weights = importance.gather(1, columns[:, block])
        fitted = fit_grid(
            target, whole, search=True, turning=options.negative_scales, importance=weights
        )
        grids = [fitted, *(_candidates(target, fitted, scheme) if jointly else [])]
        best = torch.full(shape[:2], float("inf"), device=weight.device)
        where = columns[:, block]
        for grid in grids:
            found, lost, left = _rounded(dense[..., block], target, factored, block, grid, scheme)
            better = left < best
            best = torch.where(better, left, best)
            error[..., block] = torch.where(better.unsqueeze(-1), lost, error[..., block])
            index = where.unsqueeze(1).expand_as(found)
            kept = torch.where(better.unsqueeze(-1), found, codes.gather(2, index))
            codes.scatter_(2, index, kept)
            number = (where[:, :1] // group).unsqueeze(1).expand(*shape[:2], 1)
            for table, new in ((scales, grid.scales), (zeros, grid.zeros)):
                old = table.gather(2, number)
                table.scatter_(2, number, torch.where(better.unsqueeze(-1), new, old))
    return _refined(weight, codes, hessian, factored, Grid(scales, zeros), scheme, options)


def _refined(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    factored: Factored,
    grid: Grid,
    scheme: AffineScheme,
    options: SolverOptions,
) -> tuple[Tensor, Grid]:
    """As the pipeline goes on from here."""
    backend = solver_backend(weight.device)
    for done in range(options.refinement_passes):
        if done:
            grid = refit_scales(weight, codes, hessian, factored.added, grid)
        codes = descend(weight, codes, factored, grid, bits=scheme.bits, backend=backend)
    return codes, grid


def _candidates(target: Tensor, fitted: Grid, scheme: AffineScheme) -> Iterator[Grid]:
    """Ranges tried, of either sign: of `target` [E, rows, group], symmetric."""
    half = 2 ** (scheme.bits - 1)
    for turn in (1.0, -1.0):
        low, high = (target * turn).aminmax(dim=-1, keepdim=True)
        reach = torch.maximum(-low / half, high / (half - 1))
        for shrink in SEARCH_SHRINKS:
            yield Grid(storable(reach * shrink * turn), fitted.zeros)


def _rounded(
    dense: Tensor,
    target: Tensor,
    factored: Factored,
    block: slice,
    grid: Grid,
    scheme: AffineScheme,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, W - Q, and per row what is left of |D L|^2 over the group's columns."""
    error, left = (x.permute(2, 0, 1).clone() for x in (dense, target))
    count = dense.shape[-1]
    scale, zero = (
        x.float().permute(2, 0, 1).expand(count, -1, -1) for x in (grid.scales, grid.zeros)
    )
    triangle = factored.triangle[:, block, block]
    top = 2**scheme.bits - 1
    codes = _round_block(error, left, triangle, scale=scale, zero=zero, top=top)
    pivot = factored.pivot[:, block].t().unsqueeze(-1)
    return codes.permute(1, 2, 0), error.permute(1, 2, 0), (left * pivot).square().sum(0)
