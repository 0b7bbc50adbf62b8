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

import torch
from torch import Tensor

from pipeline.quantize.grid import Grid

BLOCK_COLUMNS = 32
"""Columns per block in plain torch."""


def sweep(weight: Tensor, factor: Tensor, order: Tensor, grid: Grid, bits: int) -> Tensor:
    """Codes of `weight` float32 [E, out, in], uint8 of the same shape, in stored order.

    `factor` float32 [E, in, in] and `order` int64 [E, in] as in `factor.sweep_factor` (the factor
    is overwritten); `grid`: scales and zeros, fixed beforehand.
    """
    experts, rows, columns = weight.shape
    groups = grid.scales.shape[-1]
    device = weight.device
    factor /= factor.diagonal(dim1=1, dim2=2).unsqueeze(1).clone()
    reverse = order.flip(-1)  # working position -> stored column, [E, in]
    matrix = torch.arange(experts, device=device).unsqueeze(1)
    stored_row = (reverse + matrix * columns).t().reshape(-1)  # of [E * in, out]
    group_row = (reverse // (columns // groups) + matrix * groups).t().reshape(-1)
    scales = _columns_first(grid.scales.float())
    zeros = _columns_first(grid.zeros.float())
    working = _columns_first(weight).index_select(0, stored_row).view(columns, experts, rows)
    codes = torch.empty((experts * columns, rows), dtype=torch.uint8, device=device)
    for stop in range(columns, 0, -BLOCK_COLUMNS):
        start = max(0, stop - BLOCK_COLUMNS)
        block = slice(start, stop)
        target = working[block].clone()
        if stop < columns:
            torch.baddbmm(
                target.permute(1, 0, 2),
                factor[:, stop:, block].transpose(1, 2),
                working[stop:].permute(1, 0, 2),
                out=target.permute(1, 0, 2),
            )
        pick = slice(start * experts, stop * experts)
        scale = scales.index_select(0, group_row[pick]).view(-1, experts, rows)
        zero = zeros.index_select(0, group_row[pick]).view(-1, experts, rows)
        within = factor[:, block, block].permute(1, 2, 0).unsqueeze(-1).contiguous()
        signed = _round_block(
            working[block], target, within, scale=scale, zero=zero, top=2**bits - 1
        )
        codes.index_copy_(0, stored_row[pick], signed.add_(zero).to(torch.uint8).view(-1, rows))
    return codes.view(experts, columns, rows).transpose(1, 2).contiguous()


def _columns_first(values: Tensor) -> Tensor:
    """[E, out, n] as contiguous [E * n, out]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])


def _round_block(
    weight: Tensor, target: Tensor, within: Tensor, *, scale: Tensor, zero: Tensor, top: int
) -> Tensor:
    """Round one block's columns, last to first; all arguments [columns, E, out] but `within`.

    `within` [columns, columns, E, 1]: the unit lower triangle.  `weight` is overwritten with
    W - Q.  Returns code - zero as float32, in the place of `target`.
    """
    low, high = -zero, top - zero
    for column in range(weight.shape[0] - 1, -1, -1):
        signed = (target[column] / scale[column]).round_()
        signed = torch.clamp(signed, low[column], high[column])
        error = weight[column].addcmul_(signed, scale[column], value=-1)
        if column:
            target[:column].addcmul_(within[column, :column], error)
        target[column] = signed
    return target
