"""Triton kernels that add up what experts give to their tokens.

Each sum has the order of the pairs and rounds where plain torch does, so the bytes are the same.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _add_pairs_kernel(total, values, weights, pairs, starts, first, columns, BLOCK: tl.constexpr):
    """One token's pairs, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row).to(tl.int32)
    end = tl.load(starts + row + 1).to(tl.int32)
    if begin >= end:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = total + row * columns + column
    found = tl.load(place, mask=inside, other=0.0)
    for at in range(begin, end):
        pair = tl.load(pairs + at) - first
        value = tl.load(values + pair * columns + column, mask=inside, other=0.0).to(tl.float32)
        found += value * tl.load(weights + pair)
    tl.store(place, found, mask=inside)


@triton.jit
def _add_rows_kernel(total, rows, values, columns, BLOCK: tl.constexpr):
    """One row of `values`."""
    number = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = total + tl.load(rows + number) * columns + column
    found = tl.load(place, mask=inside, other=0.0)
    found += tl.load(values + number * columns + column, mask=inside, other=0.0)
    tl.store(place, found, mask=inside)


def add_pairs(
    total: Tensor, values: Tensor, weights: Tensor, pairs: Tensor, starts: Tensor, first: int
) -> None:
    """total[u] += sum of values[p - first] * weights[p - first] over a row's pairs p.

    `total` float32 [U, n]; `values` [S, n]; `weights` float32 [S]; `pairs` int64: row u has those
    from starts[u] to starts[u + 1], int64 [U + 1] at least.
    """
    columns = total.shape[1]
    block = min(_BLOCK, triton.next_power_of_2(columns))
    _add_pairs_kernel[(len(total), triton.cdiv(columns, block))](
        total, values.contiguous(), weights.contiguous(), pairs, starts, first, columns,
        BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows[i]] += values[i], float32 [., n]; no row may occur twice."""
    columns = total.shape[1]
    block = min(_BLOCK, triton.next_power_of_2(columns))
    if len(rows):
        _add_rows_kernel[(len(rows), triton.cdiv(columns, block))](
            total, rows, values.contiguous(), columns, BLOCK=block
        )


def self_test(device: torch.device) -> None:
    """Run every kernel on a few numbers; ValueError on a wrong result."""
    values = torch.arange(6.0, device=device).view(3, 2)
    total, weights = torch.ones((2, 2), device=device), torch.tensor([1.0, 2.0, 3.0], device=device)
    pairs, starts = torch.tensor([1, 0, 2], device=device), torch.tensor([0, 2, 3], device=device)
    add_pairs(total, values, weights, pairs, starts, 0)
    add_rows(total, torch.tensor([1], device=device), values[:1])
    if total.tolist() != [[5.0, 8.0], [13.0, 17.0]]:
        raise ValueError("a kernel that adds experts' outputs returned wrong numbers")
