"""Triton kernels for the search of scales and for routed Hessians.

Each does what the plain torch code beside its caller does (`grid`, `hessian`), in one
launch instead of hundreds.  Results may differ from torch's in the last bit of a sum, hence rarely
in a code; every sum has one fixed order, so that the same input gives the same bytes.
"""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.quantize.sent import sent

_GRID_ELEMENTS = 2048
_GRAM_COLUMNS = 128
_GRAM_TOKENS = 64
_DRIFT_EXPERTS = 8


@triton.jit
def round_half_even(x):
    """Rounds as torch does; for other kernels too."""
    # Adding 1.5 * 2^23 leaves no fraction bits; exact for |x| < 2^22, and codes are below 256.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _fit_kernel(
    values,
    importance,
    shrinks,
    scales,
    zeros,
    rows,
    columns,
    group,
    shrink_steps,
    SYMMETRIC_ZERO: tl.constexpr,
    TURNING: tl.constexpr,
    TOP: tl.constexpr,
    SMALLEST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`grid._search` for ROWS rows of one group of one matrix."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group_index = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, GROUP)
    inside = (row < rows)[:, None] & (lane < group)[None, :]
    place = (expert * rows + row)[:, None] * columns + (group_index * group + lane)[None, :]
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    # As in `grid._turn`; lanes beyond the group hold zeros, which turn nothing.
    turn = tl.where(TURNING & (tl.max(value, 1) > -tl.min(value, 1)), -1.0, 1.0)
    value *= turn[:, None]
    weighted = value
    if WEIGHTED:
        weight = tl.load(
            importance + expert * columns + group_index * group + lane, mask=lane < group, other=0.0
        )[None, :]
        weighted = value * weight
    low_full = tl.minimum(tl.min(value, 1), 0.0)
    high_full = tl.maximum(tl.max(value, 1), 0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    best_scale = tl.zeros((ROWS,), tl.float32)
    best_zero = tl.zeros((ROWS,), tl.float32)
    # Step -1 is the full range: what remains when no step gains anything.
    for step in range(-1, shrink_steps):
        shrink = tl.load(shrinks + tl.maximum(step, 0))
        shrink = tl.where(step < 0, 1.0, shrink)
        low = low_full * shrink
        high = high_full * shrink
        if SYMMETRIC_ZERO > 0:
            zero = tl.full((ROWS,), SYMMETRIC_ZERO, tl.float32)
            scale = tl.maximum(tl.div_rn(tl.abs(low), zero), tl.div_rn(high, TOP - zero))
        else:
            scale = tl.div_rn(high - low, tl.full((ROWS,), TOP, tl.float32))
            zero = round_half_even(tl.div_rn(-low, tl.maximum(scale, SMALLEST)))
            zero = tl.minimum(tl.maximum(zero, 1.0), TOP)
        if step < 0:
            best_scale = scale
            best_zero = zero
        else:
            scale = tl.maximum(scale, SMALLEST)
            code = tl.div_rn(value, tl.broadcast_to(scale[:, None], (ROWS, GROUP)))
            low_code, high_code = -zero[:, None], TOP - zero[:, None]
            code = round_half_even(tl.minimum(tl.maximum(code, low_code), high_code))
            along = tl.sum(weighted * code, 1)
            energy = tl.sum(code * code * weight, 1) if WEIGHTED else tl.sum(code * code, 1)
            some = energy > 0
            divisor = tl.where(some, energy, 1.0)
            gain = tl.where(some, tl.div_rn(along * along, divisor), 0.0)
            better = gain > best
            best = tl.where(better, gain, best)
            best_scale = tl.where(better & some, tl.div_rn(along, divisor), best_scale)
            best_zero = tl.where(better, zero, best_zero)
    target = (expert * rows + row) * (columns // group) + group_index
    tl.store(scales + target, best_scale * turn, mask=row < rows)
    tl.store(zeros + target, best_zero.to(tl.uint8), mask=row < rows)


@triton.jit
def _moment_kernel(
    left,
    right,
    offsets,
    out,
    columns,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of one expert's sum of y x^T over its rows y of `left` and x of `right`.

    SYMMETRIC: both are the same; the tile and its mirror image are added to `out`.
    """
    upper, lower = tl.program_id(0), tl.program_id(1)
    expert = tl.program_id(2)
    begin = tl.load(offsets + expert).to(tl.int32)
    end = tl.load(offsets + expert + 1).to(tl.int32)
    if SYMMETRIC:
        if upper > lower:
            return
        if begin >= end:
            return
    lane = tl.arange(0, COLUMNS)
    i, j = upper * COLUMNS + lane, lower * COLUMNS + lane
    within = tl.arange(0, TOKENS)
    total = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + within
        base = token.to(tl.int64)[:, None] * columns
        used = (token < end)[:, None]
        y = tl.load(left + base + i[None, :], mask=used & (i < columns)[None, :], other=0.0)
        x = tl.load(right + base + j[None, :], mask=used & (j < columns)[None, :], other=0.0)
        total = tl.dot(tl.trans(y), x, total, input_precision=PRECISION)
    square = out + expert.to(tl.int64) * columns * columns
    inside = (i < columns)[:, None] & (j < columns)[None, :]
    place = square + i[:, None] * columns + j[None, :]
    if SYMMETRIC:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)
    if SYMMETRIC:
        if upper != lower:
            mirror = square + j[None, :] * columns + i[:, None]
            tl.store(mirror, total, mask=inside)


def fit_groups(
    values: Tensor,
    importance: Tensor | None,
    *,
    group: int,
    top: int,
    symmetric_zero: int,
    turning: bool,
    shrinks: tuple[float, ...],
    smallest: float,
) -> tuple[Tensor, Tensor]:
    """Scales float32 and zeros uint8, both [E, out, in / group], of `values` float [E, out, in].

    `importance`: float32 [E, in] or None; `symmetric_zero`: the fixed zero, or 0 for a free one;
    `turning`: with a fixed zero, scales may be below 0; `shrinks`: ranges to try as fractions of
    the whole; `smallest`: least scale used in the search.
    """
    experts, rows, columns = values.shape
    groups = columns // group
    lanes = triton.next_power_of_2(group)
    tile = max(1, _GRID_ELEMENTS // lanes)
    shape = (experts, rows, groups)
    scales = torch.empty(shape, dtype=torch.float32, device=values.device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=values.device)
    tried = sent(torch.tensor(shrinks, dtype=torch.float32), values.device)
    _fit_kernel[(triton.cdiv(rows, tile), groups, experts)](
        values.contiguous(),
        values if importance is None else importance.contiguous(),
        tried,
        scales,
        zeros,
        rows,
        columns,
        group,
        len(shrinks),
        SYMMETRIC_ZERO=symmetric_zero,
        TURNING=turning and symmetric_zero > 0,
        TOP=top,
        SMALLEST=smallest,
        WEIGHTED=importance is not None,
        ROWS=tile,
        GROUP=lanes,
    )
    return scales, zeros


def add_gram(x_sorted: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[e] += sum over the expert's rows of x x^T; shapes as in `hessian.routed_hessians`.

    bfloat16 and float16 inputs are multiplied exactly and summed in float32.
    """
    x_sorted = x_sorted.contiguous()
    _moments(x_sorted, x_sorted, offsets, out, symmetric=True)


def drift(
    target: Tensor, x_sorted: Tensor, offsets: Sequence[int], weights: Tensor | None = None
) -> Tensor:
    """See `correction.routed_drift`: same arguments.

    Of bfloat16 inputs the difference is rounded to bfloat16, and once more when it is weighted.
    That of two numbers within a factor of two of each other is one; each rounding is off by at most
    2^-9 of the number, each on its own, which thousands of tokens average.
    """
    if x_sorted.dtype != torch.bfloat16:
        target, x_sorted = target.float(), x_sorted.float()
    experts, columns = len(offsets) - 1, x_sorted.shape[1]
    shape = (experts, columns, columns)
    out = torch.empty(shape, dtype=torch.float32, device=x_sorted.device)
    for first in range(0, experts, _DRIFT_EXPERTS):  # so that the differences take little memory
        some = offsets[first : first + _DRIFT_EXPERTS + 1]
        rows = slice(some[0], some[-1])
        difference = (target[rows] - x_sorted[rows]).to(x_sorted.dtype).contiguous()
        if weights is not None:
            difference *= weights[rows].unsqueeze(1)
        ends = sent(torch.tensor([o - some[0] for o in some]), out.device)
        part = out[first : first + _DRIFT_EXPERTS]
        _moments(difference, x_sorted[rows].contiguous(), ends, part, symmetric=False)
    return out


def _moments(left: Tensor, right: Tensor, offsets: Tensor, out: Tensor, *, symmetric: bool) -> None:
    columns = right.shape[1]
    full = right.dtype == torch.float32
    width = 64 if full else _GRAM_COLUMNS
    tiles = triton.cdiv(columns, width)
    _moment_kernel[(tiles, tiles, len(offsets) - 1)](
        left,
        right,
        offsets,
        out,
        columns,
        SYMMETRIC=symmetric,
        PRECISION="ieee" if full else "tf32",
        COLUMNS=width,
        TOKENS=32 if full else _GRAM_TOKENS,
        num_warps=4,
        num_stages=2 if full else 3,
    )


def self_test(device: torch.device) -> None:
    """Run every kernel on a few numbers; ValueError on a wrong result."""
    x = torch.arange(8.0, device=device).view(2, 4) - 3
    out = torch.zeros((1, 4, 4), device=device)
    add_gram(x.bfloat16(), torch.tensor([0, 2], device=device), out)
    moved = drift((x + 1).bfloat16(), x.bfloat16(), [0, 2])
    scales, _ = fit_groups(
        x.unsqueeze(0),
        None,
        group=4,
        top=15,
        symmetric_zero=8,
        turning=True,
        shrinks=(1.0,),
        smallest=1e-6,
    )
    right = torch.equal(out[0], x.t() @ x)
    right &= torch.equal(moved[0], torch.ones_like(x).t() @ x)
    # The second row lies above zero, so its grid is turned around.
    right &= torch.equal(scales.flatten().sign().cpu(), torch.tensor([1.0, -1.0]))
    if not right:
        raise ValueError("a kernel returned wrong numbers")
