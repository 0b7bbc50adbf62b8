"""Triton kernels of batched float32 products, on tensor cores.

A float32 number is the sum of three bfloat16 numbers, but for its last bits; the six largest
products of these parts, summed in float32, are as exact as a float32 product
(`tests/quantize/test_products.py` holds them against float64), and faster.
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

_LINES = 128
_COLUMNS = 64
_STEP = 32
_WARPS = 4
_STAGES = 3


@triton.jit
def _sum(
    total, a, b, i, j, begin, end, lines, columns, a_line, a_column, b_line, b_column,
    STEP: tl.constexpr,
):  # fmt: skip
    """`total` plus rows i of a times columns j of b, over the terms from `begin` to `end`."""
    for at in range(begin, end, STEP):
        k = at + tl.arange(0, STEP)
        some = k < end
        left = a + i.to(tl.int64)[:, None] * a_line + k[None, :] * a_column
        left = tl.load(left, mask=(i < lines)[:, None] & some[None, :], other=0.0)
        right = b + k.to(tl.int64)[:, None] * b_line + j[None, :] * b_column
        right = tl.load(right, mask=some[:, None] & (j < columns)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="bf16x6")
    return total


@triton.jit
def _product_kernel(
    out, base, a, b, lines, columns, terms, alpha, out_expert, out_line, out_column, base_expert,
    base_line, base_column, a_expert, a_line, a_column, b_expert, b_line, b_column,
    BASED: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of out = base + alpha * a b."""
    expert = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = _sum(
        tl.zeros((LINES, COLUMNS), tl.float32), a + expert * a_expert, b + expert * b_expert, i, j,
        0, terms, lines, columns, a_line, a_column, b_line, b_column, STEP,
    )  # fmt: skip
    total = total * alpha
    inside = (i < lines)[:, None] & (j < columns)[None, :]
    wide = i.to(tl.int64)[:, None]
    if BASED:
        place = base + expert * base_expert + wide * base_line + j[None, :] * base_column
        total += tl.load(place, mask=inside, other=0.0)
    place = out + expert * out_expert + wide * out_line + j[None, :] * out_column
    tl.store(place, total, mask=inside)


@triton.jit
def _energy_kernel(
    rows, hessian, out, lines, columns, of_expert, of_line, LINES: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile's part of tr(R H R^T): of H only what is on and above its diagonal's blocks, those
    above twice."""
    expert = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    first = tl.program_id(0) * COLUMNS
    j = first + tl.arange(0, COLUMNS)
    own = rows + expert * of_expert
    square = hessian + expert * columns * columns
    total = _sum(
        tl.zeros((LINES, COLUMNS), tl.float32), own, square, i, j, 0, first, lines, columns,
        of_line, 1, columns, 1, STEP,
    )  # fmt: skip
    total = _sum(
        total * 2, own, square, i, j, first, tl.minimum(first + COLUMNS, columns), lines, columns,
        of_line, 1, columns, 1, STEP,
    )  # fmt: skip
    inside = (i < lines)[:, None] & (j < columns)[None, :]
    place = own + i.to(tl.int64)[:, None] * of_line + j[None, :]
    total *= tl.load(place, mask=inside, other=0.0)
    found = tl.sum(tl.sum(total, 1), 0)
    number = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    tl.store(out + number + tl.program_id(0), found)


def product(
    a: Tensor, b: Tensor, *, base: Tensor | None = None, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    """base + alpha * a b, to `out` (which may be `base`) or anew: see `products.product`."""
    experts, lines, terms = a.shape
    columns = b.shape[2]
    if out is None:
        out = torch.empty((experts, lines, columns), device=a.device)
    start = out if base is None else base
    grid = triton.cdiv(columns, _COLUMNS), triton.cdiv(lines, _LINES), experts
    _product_kernel[grid](
        out, start, a, b, lines, columns, terms, alpha, *out.stride(), *start.stride(),
        *a.stride(), *b.stride(), BASED=base is not None, LINES=_LINES, COLUMNS=_COLUMNS,
        STEP=_STEP, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out


def energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """tr(R H R^T), float32 [E], of float32 [E, out, in] and symmetric [E, in, in]."""
    experts, lines, columns = rows.shape
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    grid = triton.cdiv(columns, _COLUMNS), triton.cdiv(lines, _LINES), experts
    parts = torch.empty((experts, grid[0] * grid[1]), device=rows.device)
    _energy_kernel[grid](
        rows, hessian.contiguous(), parts, lines, columns, rows.stride(0), rows.stride(1),
        LINES=_LINES, COLUMNS=_COLUMNS, STEP=_STEP, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return parts.sum(1)


def self_test(device: torch.device) -> None:
    """ValueError where a kernel gives a wrong result for a few numbers."""
    a = torch.arange(2 * 3 * 40, device=device).view(2, 3, 40).float().sin()
    b = a.transpose(1, 2) @ a
    exact = a.double() @ b.double()
    found = product(a, b, base=a, alpha=2).double()
    right = torch.allclose(found, a + 2 * exact, rtol=1e-5, atol=1e-4)
    right &= torch.allclose(energy(a, b).double(), (exact * a).sum((1, 2)), rtol=1e-5)
    if not right:
        raise ValueError("a kernel of float32 products returned wrong numbers")
