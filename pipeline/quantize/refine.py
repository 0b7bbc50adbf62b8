"""What is still to be gained once the column loop is through: better codes, better scales.

`sweep` decides each column once, before it knows what the columns after it will lose.  A pass of
coordinate descent visits them again, every code being set to the best one given all others; scales
are set to the least-squares solution given the codes, for all groups of a row together.  Neither
can make a row's error under the damped Hessian larger.  Both are done in turn by QuantEase (arXiv
2309.01885) and CDQuant (arXiv 2406.17542), among others.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pipeline.quantize.backend import Backend
from pipeline.quantize.factor import Factored
from pipeline.quantize.grid import Grid, storable
from pipeline.quantize.sweep import Slabs

SCALE_RANGE = (0.5, 2.0)
"""How far a refitted scale may lie from the one before; the codes were chosen for that one."""


def descend(
    weight: Tensor,
    codes: Tensor,
    factored: Factored,
    grid: Grid,
    *,
    bits: int,
    backend: Backend,
) -> Tensor:
    """One pass over all columns, in the order of the sweep; uint8 codes [E, out, in].

    `weight`: float32 [E, out, in]; `codes`: uint8, of the same shape, as they are now.

    With D = W - Q the best value of column a, all others fixed, is

        W_a + sum_b D_b H[b, a] / H[a, a],    b other than a

    which is the sweep's rule with H in the place of its factor and with the columns not yet visited
    counting as they are; the block's inner loop is the same code.
    """
    slabs = Slabs(factored.order, grid, backend)
    dense, result = slabs.take(weight), slabs.take(codes)
    error = slabs.residual(dense, result)
    pulls = factored.pulls(slabs.width)
    across = error.permute(1, 0, 2)
    for block, triangle in zip(pulls.blocks, pulls.within, strict=True):
        target = dense[block].clone()
        target.permute(1, 0, 2).baddbmm_(pulls.others[:, :, block].transpose(1, 2), across)
        slabs.round_block(
            block, dense[block], error[block], target, triangle, result[block], top=2**bits - 1
        )
    return slabs.put(result)


def refit_scales(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    added: Tensor,
    grid: Grid,
    *,
    backend: Backend = "torch",
) -> Grid:
    """The grid with the scales that fit the codes best under the damped Hessian.

    `weight`: float32 [E, out, in]; `codes`: uint8, of the same shape; `hessian`: float32
    [E, in, in], in stored order; `added`: float32 [E], the damping of its diagonal.

    A row keeps its scales where rounding the better ones to storable numbers would lose the gain.
    """
    normal, wanted = _normal_equations(weight, codes, hessian, added, grid.zeros, backend)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.amax(-1, keepdim=True)
    # Groups whose codes are all zero have no say; a trace of the diagonal keeps the rest solvable.
    solvable = normal + torch.diag_embed(1e-6 * scale + (diagonal == 0).float())
    old = grid.scales.float()
    found = torch.linalg.solve_ex(solvable, wanted)[0]
    low, high = SCALE_RANGE
    kept = found / old  # no scale is 0, and none may change its sign
    usable = (kept > low) & (kept < high)
    new = storable(torch.where(usable, found, old))
    better = _cost(normal, wanted, new.float()) < _cost(normal, wanted, old)
    return Grid(torch.where(better.unsqueeze(-1), new, grid.scales), grid.zeros)


def _normal_equations(
    weight: Tensor, codes: Tensor, hessian: Tensor, added: Tensor, zeros: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """A float32 [E, out, groups, groups] and b float32 [E, out, groups] of each row's scales.

    With Q = sum_g s_g C_g, C_g being the codes of group g and 0 elsewhere, a row's error is
    s^T A s - 2 s^T b + constant, A[g, h] = C_g H C_h^T and b[g] = C_g H w^T.
    """
    experts, rows, columns = weight.shape
    groups = zeros.shape[-1]
    width = columns // groups
    if backend == "triton":
        kernels = importlib.import_module("pipeline.quantize.triton_refine")
        if width in kernels.WIDTHS:
            found: tuple[Tensor, Tensor] = kernels.normal_equations(
                weight, codes, hessian, added, zeros
            )
            return found
    spread = zeros.float().repeat_interleave(width, -1)
    centred = codes.float().sub_(spread)
    normal = torch.empty((experts, rows, groups, groups), device=weight.device)
    wanted = torch.empty((experts, rows, groups), device=weight.device)
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        along = torch.bmm(centred[..., part], hessian[:, part])
        along[..., part].addcmul_(centred[..., part], added.view(-1, 1, 1))
        normal[:, :, group] = (along * centred).unflatten(-1, (groups, width)).sum(-1)
        wanted[:, :, group] = along.mul_(weight).sum(-1)
    return normal, wanted


def _cost(normal: Tensor, wanted: Tensor, scales: Tensor) -> Tensor:
    """s^T A s - 2 s^T b of each row, float32 [E, out]."""
    along = torch.matmul(normal, scales.unsqueeze(-1)).squeeze(-1)
    return ((along - 2 * wanted) * scales).sum(-1)
