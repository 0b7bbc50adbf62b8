"""Cholesky factors of batches, and solving with them.

On a GPU the library's batched routines reach a sixth of what its products do, so large matrices are
done there by blocks: a block's own factor and that factor's inverse by the library, all else by
products.  Whether that is as exact is tested against float64 (`tests/quantize/test_cholesky.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize.products import product, subtract_product

BLOCK = 256
"""Columns of a block.  Fixed: other blocks give other bytes."""


def lower_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L of `matrix` = L L^T, both float32 [E, n, n], and int32 [E]: not 0 where it has none.

    Only the lower triangle of `matrix` is read.  Products are to be in full float32.
    """
    if not matrix.is_cuda or matrix.shape[-1] <= 2 * BLOCK:
        found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(matrix)
        return found
    return _factor_by_blocks(matrix)


def solve_from_the_right(factor: Tensor, values: Tensor) -> Tensor:
    """`values` (L L^T)^-1: float32 [E, m, n] for the lower `factor` float32 [E, n, n]."""
    if not factor.is_cuda or factor.shape[-1] <= 2 * BLOCK:
        # Two batched triangular solves: on a GPU cholesky_solve takes five times as long.
        half = torch.linalg.solve_triangular(factor, values.transpose(1, 2), upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).transpose(1, 2)
    return _solve_by_blocks(factor, values)


def _factor_by_blocks(matrix: Tensor) -> tuple[Tensor, Tensor]:
    factor = matrix.clone()
    failed = torch.zeros(len(matrix), dtype=torch.int32, device=matrix.device)
    for block in _blocks(matrix):
        panel = factor[:, block.start :, block]
        if block.start:
            done = factor[:, block.start :, : block.start]
            subtract_product(panel, done, factor[:, block, : block.start].mT)
        own, info = torch.linalg.cholesky_ex(factor[:, block, block])
        failed = torch.where(failed == 0, info, failed)
        factor[:, block, block] = own
        below = factor[:, block.stop :, block]
        below.copy_(product(below, _inverse(own).mT))
    return factor.tril_(), failed


def _solve_by_blocks(factor: Tensor, values: Tensor) -> Tensor:
    found = values.clone(memory_format=torch.contiguous_format)
    blocks = _blocks(factor)
    whole = [factor[:, block, block] for block in blocks if block.stop - block.start == BLOCK]
    inverses = list(_inverse(torch.cat(whole)).chunk(len(whole)))
    inverses += [_inverse(factor[:, block, block]) for block in blocks[len(whole) :]]
    for block, inverse in zip(blocks, inverses, strict=True):  # Y L^T = B
        own = found[..., block]
        if block.start:
            subtract_product(own, found[..., : block.start], factor[:, block, : block.start].mT)
        own.copy_(product(own, inverse.mT))
    for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):  # X L = Y
        own = found[..., block]
        if block.stop < found.shape[-1]:
            subtract_product(own, found[..., block.stop :], factor[:, block.stop :, block])
        own.copy_(product(own, inverse))
    return found


def _blocks(matrix: Tensor) -> list[slice]:
    columns = matrix.shape[-1]
    return [slice(s, min(s + BLOCK, columns)) for s in range(0, columns, BLOCK)]


def _inverse(triangle: Tensor) -> Tensor:
    """Of lower triangles [E, n, n]."""
    identity = torch.eye(triangle.shape[-1], device=triangle.device).expand_as(triangle)
    return torch.linalg.solve_triangular(triangle, identity, upper=False)
