"""Triton kernels of the column loops (`sweep`, `refine`): columns in working order, and rounding.

Each does what the plain torch code beside its caller does, bit for bit where nothing is summed; a
sum has one fixed order.  Slabs are [in, E, out], contiguous; E matrices of `rows` rows each.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202, RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.quantize.triton_kernels import round_half_even

_AT_ONCE = 8
_TILE = 64


@triton.jit
def _take_kernel(
    stored, place, slabs, rows, columns, experts, of_expert, of_row, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix from stored order to its slabs, or back."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    position = tl.load(place + expert * columns + column, mask=column < columns, other=0)
    there = stored + expert * of_expert + row[:, None].to(tl.int64) * of_row + column[None, :]
    slab = slabs + (position[None, :] * experts + expert) * rows + row[:, None]
    if BACK:
        tl.store(there, tl.load(slab, mask=inside), mask=inside)
    else:
        tl.store(slab, tl.load(there, mask=inside), mask=inside)


@triton.jit
def _residual_kernel(
    dense, codes, scales, zeros, pick, error, rows, ROWS: tl.constexpr
):  # fmt: skip
    """dense - (code - zero) * scale for ROWS rows of one column of one matrix."""
    slab = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    group = tl.load(pick + slab) * rows + row
    s = tl.load(scales + group, mask=inside, other=1.0)
    z = tl.load(zeros + group, mask=inside, other=0.0)
    place = slab * rows + row
    code = tl.load(codes + place, mask=inside, other=0).to(tl.float32)
    # Codes and scales have few bits: the product is exact, fused or not.
    found = tl.load(dense + place, mask=inside, other=0.0) - (code - z) * s
    tl.store(error + place, found, mask=inside)


@triton.jit
def _round_kernel(
    weight, error, target, triangle, scales, zeros, pick, codes, size, rows, experts, stride,
    of_expert, of_line, of_column, TOP: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """`sweep._round_block` for ROWS rows of one matrix, AT_ONCE columns at a time.

    What the columns done before ask of these is added in the order in which they were done, then
    they are rounded one after the other, each thread rows of its own: all that they pass on to each
    other stays in registers, and all loads can begin before the first is rounded.
    """
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    slab = expert * rows + row
    triangle += expert * of_expert
    end = size + 0 * tl.program_id(0)  # not a Python number, which the interpreter's masks refuse
    for number in range(tl.cdiv(size, AT_ONCE)):
        top = end - number * AT_ONCE - 1
        goals = ()
        scale = ()
        zero = ()
        dense = ()
        for back in tl.static_range(AT_ONCE):
            column = top - back
            real = column >= 0
            used = row < tl.where(real, rows, 0)
            place = column.to(tl.int64) * stride + slab
            group = tl.load(pick + column * experts + expert, mask=real, other=0) * rows + row
            goals = goals + (tl.load(target + place, mask=used, other=0.0),)
            scale = scale + (tl.load(scales + group, mask=used, other=1.0),)
            zero = zero + (tl.load(zeros + group, mask=used, other=0.0),)
            dense = dense + (tl.load(weight + place, mask=used, other=0.0),)
        for before in range(number):
            for back in tl.static_range(AT_ONCE):
                above = end - 1 - before * AT_ONCE - back
                lost = tl.load(error + above.to(tl.int64) * stride + slab, mask=inside, other=0.0)
                moved = ()
                for to in tl.static_range(AT_ONCE):
                    column = top - to
                    pull = triangle + above * of_line + column * of_column
                    pull = tl.load(pull, mask=column >= 0, other=0.0)
                    moved = moved + (goals[to] + pull * lost,)
                goals = moved
        errors = ()
        rounded = ()
        for back in tl.static_range(AT_ONCE):
            column = top - back
            goal = goals[back]
            for before in tl.static_range(back):
                # A column done before lies above this one: it is real if this one is.
                pull = triangle + (top - before) * of_line + column * of_column
                goal += tl.load(pull, mask=column >= 0, other=0.0) * errors[before]
            signed = tl.minimum(
                tl.maximum(tl.div_rn(goal, scale[back]), -zero[back]), TOP - zero[back]
            )
            signed = round_half_even(signed)
            errors = errors + (dense[back] - signed * scale[back],)
            rounded = rounded + (signed + zero[back],)
        for back in tl.static_range(AT_ONCE):
            column = top - back
            used = row < tl.where(column >= 0, rows, 0)
            place = column.to(tl.int64) * stride + slab
            tl.store(error + place, errors[back], mask=used)
            tl.store(codes + place, rounded[back].to(tl.uint8), mask=used)
        # Those to come read these errors; a thread's own rows only, but not always its own lanes.
        tl.debug_barrier()


def take(stored: Tensor, place: Tensor) -> Tensor:
    """[E, out, in], columns of stride 1, as slabs; `place` int64 [E, in]: each column's slab."""
    experts, rows, columns = stored.shape
    if stored.stride(2) != 1:
        stored = stored.contiguous()
    slabs = torch.empty((columns, experts, rows), dtype=stored.dtype, device=stored.device)
    _move(stored, place, slabs, back=False)
    return slabs


def put(slabs: Tensor, place: Tensor) -> Tensor:
    """The way back: contiguous [E, out, in]."""
    columns, experts, rows = slabs.shape
    stored = torch.empty((experts, rows, columns), dtype=slabs.dtype, device=slabs.device)
    _move(stored, place, slabs, back=True)
    return stored


def _move(stored: Tensor, place: Tensor, slabs: Tensor, *, back: bool) -> None:
    experts, rows, columns = stored.shape
    _take_kernel[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE), experts)](
        stored, place, slabs, rows, columns, experts, stored.stride(0), stored.stride(1),
        ROWS=_TILE, COLUMNS=_TILE, BACK=back,
    )  # fmt: skip


def residual(dense: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, pick: Tensor) -> Tensor:
    """What rounding left of slabs `dense` float32 [in, E, out] with `codes` uint8.

    `scales`, `zeros`: float32 [E * groups, out]; `pick`: int64 [in * E], which of their lines a
    slab's column of a matrix has.
    """
    columns, experts, rows = dense.shape
    error = torch.empty_like(dense)
    block = min(1024, triton.next_power_of_2(rows))
    _residual_kernel[(columns * experts, triton.cdiv(rows, block))](
        dense, codes, scales, zeros, pick, error, rows, ROWS=block
    )
    return error


def round_block(
    weight: Tensor,
    error: Tensor,
    target: Tensor,
    triangle: Tensor,
    codes: Tensor,
    *,
    scales: Tensor,
    zeros: Tensor,
    pick: Tensor,
    top: int,
) -> None:
    """`sweep._round_block` on some contiguous slabs, its grid picked as `residual` does.

    `triangle` [E, columns, columns]; `error` (may be `weight`) and `codes` uint8: slabs to write.
    """
    size, experts, rows = weight.shape
    warp = 64 if rows >= 1024 else 32  # few rows are shared among more warps
    _round_kernel[(triton.cdiv(rows, warp), experts)](
        weight, error, target, triangle, scales, zeros, pick, codes, size, rows, experts,
        experts * rows, *triangle.stride(), TOP=top, ROWS=warp, AT_ONCE=_AT_ONCE, num_warps=1,
    )  # fmt: skip


def self_test(device: torch.device) -> None:
    """Run every kernel on a few numbers; ValueError on a wrong result."""
    stored = (torch.arange(40.0, device=device).view(2, 2, 10) % 16) - 8
    place = torch.arange(9, -1, -1, device=device).expand(2, 10).contiguous()
    weight = take(stored, place)
    right = torch.equal(weight, stored.flip(-1).permute(2, 0, 1)) and torch.equal(
        put(weight, place), stored
    )
    scales, zeros = torch.ones((2, 2), device=device), torch.full((2, 2), 8.0, device=device)
    pick = torch.tensor([0, 1], device=device).repeat(10)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
    triangle = torch.eye(10, device=device).repeat(2, 1, 1)
    triangle[:, 9, 0] = 1.0
    weight[9] += 0.25  # the error of the last column goes to the first one
    expected = weight.round() + 8
    error = weight - weight.round()
    target = weight.clone()
    round_block(
        weight, weight, target, triangle, codes, scales=scales, zeros=zeros, pick=pick, top=15
    )
    right &= torch.equal(codes.float(), expected) and torch.equal(weight, error)
    back = residual(expected - 8 + error, codes, scales, zeros, pick)
    if not (right and torch.equal(back, error)):
        raise ValueError("a kernel of the column loops returned wrong numbers")
