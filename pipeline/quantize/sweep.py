"""GPTQ's column loop over a whole batch of matrices at once.

Layout: weights are held as [in, E, out] in reverse order of processing, so that one column of all
matrices is one contiguous slab, and the loop runs from the last slab to the first.  With L the
lower factor of `factor.factorise` and D = W - Q, the loss is |D L|^2 and the value that column
a should be rounded to, given the columns already done (b > a), is

    W_a + sum_b D_b L[b, a] / L[a, a]

which is GPTQ's update (arXiv 2210.17323) written with the factor of H in place of that of H^-1.
Across blocks the sum is one batched product, within a block it is built up column by column.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.quantize.backend import Backend
from pipeline.quantize.factor import Factored, column_blocks
from pipeline.quantize.grid import Grid

BLOCK_COLUMNS: dict[Backend, int] = {"torch": 32, "triton": 128}
"""Columns per block; plain torch updates a block's remainder by one rank at a time."""


class Slabs:
    """Matrices [E, out, in] in the working layout of the column loops, and their blocks."""

    def __init__(self, order: Tensor, grid: Grid, backend: Backend) -> None:
        """`order`: int64 [E, in], the stored column that is processed first comes first."""
        self.experts, self.columns = order.shape
        self.rows, groups = grid.scales.shape[-2:]
        reverse = order.flip(-1)  # working position -> stored column, [E, in]
        self._reverse = reverse
        matrix = torch.arange(self.experts, device=order.device).unsqueeze(1)
        self._group = (reverse // (self.columns // groups) + matrix * groups).t().reshape(-1)
        self._scales = _columns_first(grid.scales.float())
        self._zeros = _columns_first(grid.zeros.float())
        self.width = BLOCK_COLUMNS[backend]
        self._kernels: Any = None
        if backend == "triton":
            self._kernels = importlib.import_module("pipeline.quantize.triton_columns")

    @cached_property
    def _stored(self) -> Tensor:
        """Where each slab's columns are among the stored ones: int64 [in * E] of [E * in, out]."""
        matrix = torch.arange(self.experts, device=self._reverse.device).unsqueeze(1)
        return (self._reverse + matrix * self.columns).t().reshape(-1)

    @cached_property
    def _place(self) -> Tensor:
        """The working position of each stored column, int64 [E, in]."""
        positions = torch.arange(self.columns, device=self._reverse.device)
        return torch.empty_like(self._reverse).scatter_(
            1, self._reverse, positions.expand_as(self._reverse)
        )

    def take(self, stored: Tensor) -> Tensor:
        """[E, out, in] in stored order as [in, E, out] in working order, a copy."""
        if self._kernels is not None:
            taken: Tensor = self._kernels.take(stored, self._place)
            return taken
        slabs = _columns_first(stored).index_select(0, self._stored)
        return slabs.view(self.columns, self.experts, self.rows)

    def put(self, slabs: Tensor) -> Tensor:
        """The way back."""
        if self._kernels is not None:
            put: Tensor = self._kernels.put(slabs, self._place)
            return put
        stored = torch.empty_like(slabs).view(-1, self.rows)
        stored.index_copy_(0, self._stored, slabs.view(-1, self.rows))
        stored = stored.view(self.experts, self.columns, self.rows)
        return stored.transpose(1, 2).contiguous()

    def blocks(self) -> list[slice]:
        """Working positions of each block, in order of processing."""
        return column_blocks(self.columns, self.width)

    def residual(self, dense: Tensor, codes: Tensor) -> Tensor:
        """W - Q of slabs, `dense` being W and `codes` uint8."""
        if self._kernels is not None:
            found: Tensor = self._kernels.residual(
                dense, codes, self._scales, self._zeros, self._group
            )
            return found
        error = dense.clone()
        for block in self.blocks():
            scale, zero = self._grid(block)
            error[block] -= (codes[block] - zero) * scale
        return error

    def round_block(
        self,
        block: slice,
        weight: Tensor,
        error: Tensor,
        target: Tensor,
        triangle: Tensor,
        codes: Tensor,
        *,
        top: int,
    ) -> None:
        """Round the columns of one block, last to first.

        `weight`, `target` float32 and `codes` uint8 are the block's slabs [columns, E, out];
        `triangle`, float32 [E, columns, columns], is lower and has a diagonal of 1.  `error`, which
        may be `weight`, becomes W - Q and `codes` the codes; `target` is used up.
        """
        if self._kernels is not None:
            pick = self._group[block.start * self.experts : block.stop * self.experts]
            self._kernels.round_block(
                weight,
                error,
                target,
                triangle,
                codes,
                scales=self._scales,
                zeros=self._zeros,
                pick=pick,
                top=top,
            )
            return
        if error is not weight:
            error.copy_(weight)
        scale, zero = self._grid(block)
        codes.copy_(_round_block(error, target, triangle, scale=scale, zero=zero, top=top))

    def _grid(self, block: slice) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight of a block, both float32 [width, E, out]."""
        pick = self._group[block.start * self.experts : block.stop * self.experts]
        shape = (-1, self.experts, self.rows)
        return (
            self._scales.index_select(0, pick).view(shape),
            self._zeros.index_select(0, pick).view(shape),
        )


def sweep(weight: Tensor, factored: Factored, grid: Grid, *, bits: int, backend: Backend) -> Tensor:
    """Codes of `weight` float32 [E, out, in] in stored order: uint8 of the same shape.

    `grid`: scales and zeros, fixed beforehand; `bits`: of a code.
    """
    slabs = Slabs(factored.order, grid, backend)
    working = slabs.take(weight)
    codes = torch.empty(working.shape, dtype=torch.uint8, device=weight.device)
    for block in slabs.blocks():
        own = working[block]
        target = own.clone()
        if block.stop < slabs.columns:
            pull = factored.triangle[:, block.stop :, block].transpose(1, 2)
            target.permute(1, 0, 2).baddbmm_(pull, working[block.stop :].permute(1, 0, 2))
        triangle = factored.triangle[:, block, block]
        slabs.round_block(block, own, own, target, triangle, codes[block], top=2**bits - 1)
    return slabs.put(codes)


def _columns_first(values: Tensor) -> Tensor:
    """[E, out, n] as contiguous [E * n, out]; one matrix alone would reshape without a copy."""
    return values.transpose(1, 2).reshape(-1, values.shape[1]).contiguous()


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
