"""Output rows solved one block after the other, so that later rows make up for earlier ones' error.

GPTQ weighs all errors of an output alike, and so its rows are solved independently.  Where what
reads the output is known, with its Gram matrix M (`sensitivity`), the loss is tr(M D H D^T): the
column loop's argument holds for rows as well as for columns.  With M = A A^T, A lower, and rows
processed from the last to the first, what is left of block R's loss, given the error D_S of the
rows already done, is that of rounding

    W_R + A_RR^-T A_SR^T D_S

in place of W_R.  So a block of rows is an ordinary problem with a shifted target.  Couplings inside
a block are left out.  Two-sided losses of this form are YAQA's (arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.quantize.factor import damped_factor
from pipeline.quantize.grid import Grid
from pipeline.quantize.precision import full_float32

ROW_BLOCKS = 6
"""Blocks of rows per matrix.  Fixed: other blocks give other bytes.  Each costs a pass through the
solver, whose time on a GPU hardly depends on the number of rows.  The weighted loss on the shipped
model's layers, beside that without weighting: 0.69 to 0.77 with 16, 0.71 to 0.78 with 8, 0.73 to
0.81 with 4, 0.80 to 0.87 with 2."""
DAMPING = 0.1
"""Added to the sensitivity's diagonal, as a fraction of its mean."""

Solve = Callable[[Tensor], tuple[Tensor, Grid]]
"""float32 [E, rows, in] -> codes uint8 of the same shape, and the grid they are on."""


@dataclass(frozen=True)
class RowOrder:
    """In which order rows are solved, and what those to come make up for; of a sensitivity."""

    order: Tensor
    """int64 [out]: the last is processed first."""
    pulls: tuple[Tensor | None, ...]
    """A_RR^-T A_SR^T of each block of rows, in the order of processing, float32 [width, done]."""

    def to(self, device: torch.device) -> RowOrder:
        """The same on another device."""
        pulls = tuple(None if pull is None else pull.to(device) for pull in self.pulls)
        return RowOrder(self.order.to(device), pulls)

    def blocks(self) -> list[slice]:
        """Places in `order` of each block, in the order of processing."""
        rows = len(self.order)
        width = -(-rows // ROW_BLOCKS)
        return [slice(max(0, stop - width), stop) for stop in range(rows, 0, -width)]


def row_order(sensitivity: Tensor) -> RowOrder:
    """For float32 [out, out], M up to a factor.  Raises NumericalError if it cannot be factorised
    at any damping."""
    damped = sensitivity.float().clone()
    added = DAMPING * damped.diagonal().mean()
    # Nobody reads these outputs: all count alike.
    added = torch.where(added > 0, added, torch.ones_like(added))
    damped.diagonal().add_(added)
    order = damped.diagonal().argsort(stable=True)
    ordered = damped[order][:, order].unsqueeze(0)
    pulls: list[Tensor | None] = [None]
    with full_float32():
        factor = damped_factor(ordered, added.view(1), "the sensitivity")[0][0]
        for block in RowOrder(order, ()).blocks()[1:]:
            own, behind = factor[block, block].T, factor[block.stop :, block].T
            pulls.append(torch.linalg.solve_triangular(own, behind, upper=True))
    return RowOrder(order, tuple(pulls))


def solve_rows(weight: Tensor, outputs: RowOrder, solve: Solve) -> tuple[Tensor, Grid]:
    """Codes and grid of `weight` float32 [E, out, in] for the loss tr(M D H D^T).

    `outputs`: of M, the same for all matrices of the batch; `solve`: quantises some rows of all
    matrices for a loss tr(D H D^T).
    """
    order = outputs.order
    error = torch.empty_like(weight)  # rows in this order
    solved: list[tuple[Tensor, Grid]] = []
    for block, pull in zip(outputs.blocks(), outputs.pulls, strict=True):
        dense = weight[:, order[block]]
        target = dense
        if pull is not None:
            target = dense + torch.matmul(pull, error[:, block.stop :])
        codes, grid = solve(target)
        error[:, block] = dense - dequantized(codes, grid)
        solved.insert(0, (codes, grid))
    back = order.argsort()
    codes = torch.cat([c for c, _ in solved], dim=1)[:, back]
    scales = torch.cat([g.scales for _, g in solved], dim=1)[:, back]
    zeros = torch.cat([g.zeros for _, g in solved], dim=1)[:, back]
    return codes, Grid(scales, zeros)


def dequantized(codes: Tensor, grid: Grid) -> Tensor:
    """What codes [E, out, in] on a grid stand for, float32."""
    split = codes.float().unflatten(-1, (grid.scales.shape[-1], -1))
    return ((split - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1).float()).flatten(-2)
