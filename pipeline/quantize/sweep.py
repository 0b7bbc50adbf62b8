"""GPTQ's column loop over a whole batch of matrices at once.

Layout: weights are held as [in, E, out] in reverse order of processing, so that one column of all
matrices is one contiguous slab, and the loop runs from the last slab to the first.  With L the
lower factor of `factor.sweep_factor` and D = W - Q, the loss is |D L|^2 and the value that column
a should be rounded to, given the columns already done (b > a), is

    W_a + sum_b D_b L[b, a] / L[a, a]

which is GPTQ's update (arXiv 2210.17323) written with the factor of H in place of that of H^-1.
Across blocks the sum is one batched product, within a block it is built up column by column.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pipeline.quantize.backend import Backend
from pipeline.quantize.grid import Grid

BLOCK_COLUMNS: dict[Backend, int] = {"torch": 32, "triton": 128}
"""Columns per block; plain torch updates a block's remainder by one rank at a time."""


def sweep(
    weight: Tensor, factor: Tensor, order: Tensor, grid: Grid, *, bits: int, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Codes of `weight` float32 [E, out, in] in stored order, and what they cost.

    `factor` float32 [E, in, in] and `order` int64 [E, in] as in `factor.sweep_factor` (the factor
    is overwritten); `grid`: scales and zeros, fixed beforehand; `bits`: of a code.

    Returns uint8 [E, out, in] and float32 [E]: |(W - Q) L|^2, the error under the damped Hessian.
    """
    experts, rows, columns = weight.shape
    groups = grid.scales.shape[-1]
    device = weight.device
    pivot = factor.diagonal(dim1=1, dim2=2).clone()
    factor /= pivot.unsqueeze(1)
    reverse = order.flip(-1)  # working position -> stored column, [E, in]
    matrix = torch.arange(experts, device=device).unsqueeze(1)
    stored_row = (reverse + matrix * columns).t().reshape(-1)  # of [E * in, out]
    group_row = (reverse // (columns // groups) + matrix * groups).t().reshape(-1)
    scales = _columns_first(grid.scales.float())
    zeros = _columns_first(grid.zeros.float())
    working = _columns_first(weight).index_select(0, stored_row).view(columns, experts, rows)
    codes = torch.empty((experts * columns, rows), dtype=torch.uint8, device=device)
    energy = torch.zeros(experts, device=device)
    round_block = _round_block
    if backend == "triton":
        round_block = importlib.import_module("pipeline.quantize.triton_kernels").round_block
    for stop in range(columns, 0, -BLOCK_COLUMNS[backend]):
        start = max(0, stop - BLOCK_COLUMNS[backend])
        block = slice(start, stop)
        target = working[block].clone()
        if stop < columns:
            pull = factor[:, stop:, block].transpose(1, 2)
            target.permute(1, 0, 2).baddbmm_(pull, working[stop:].permute(1, 0, 2))
        pick = slice(start * experts, stop * experts)
        scale = scales.index_select(0, group_row[pick]).view(-1, experts, rows)
        zero = zeros.index_select(0, group_row[pick]).view(-1, experts, rows)
        done = round_block(
            working[block],
            target,
            factor[:, block, block],
            scale=scale,
            zero=zero,
            top=2**bits - 1,
        )
        codes.index_copy_(0, stored_row[pick], done.view(-1, rows))
        energy += target.mul_(pivot[:, block].t().unsqueeze(-1)).square_().sum(dim=(0, 2))
    return codes.view(experts, columns, rows).transpose(1, 2).contiguous(), energy


def _columns_first(values: Tensor) -> Tensor:
    """[E, out, n] as contiguous [E * n, out]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])


def _round_block(
    weight: Tensor,
    target: Tensor,
    triangle: Tensor,
    *,
    scale: Tensor,
    zero: Tensor,
    top: int,
) -> Tensor:
    """Round the columns of one block, last to first; returns codes uint8 [columns, E, out].

    `weight`, `target`, `scale` and `zero` are float32 [columns, E, out]; `triangle`, float32
    [E, columns, columns], is lower and has a diagonal of 1.  In place, `weight` becomes W - Q and
    `target` becomes what was left of each target after rounding.
    """
    within = triangle.permute(1, 2, 0).unsqueeze(-1).contiguous()
    signed = torch.empty_like(target)
    low, high = -zero, top - zero
    for column in range(weight.shape[0] - 1, -1, -1):
        goal, code = target[column], signed[column]
        torch.div(goal, scale[column], out=code)
        torch.clamp(code.round_(), low[column], high[column], out=code)
        error = weight[column].addcmul_(code, scale[column], value=-1)
        goal.addcmul_(code, scale[column], value=-1)
        if column:
            target[:column].addcmul_(within[column, :column], error)
    return signed.add_(zero).to(torch.uint8)
