"""Triton kernel of `refine.refit_scales`: the normal equations of a row's scales."""

# Kernels are another language in Python's clothes: their parameters are pointers and scalars that
# Triton types itself, and they are passed by position.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (16, 32, 64, 128)
"""Columns of a group that the kernel can do."""

_ROWS = 128
_WARPS = 8
_STAGES = 1


@triton.jit
def _normal_kernel(
    codes,
    zeros,
    weight,
    hessian,
    added,
    normal,
    wanted,
    rows,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One group of ROWS rows of one matrix against all groups.

    Codes are small integers, which bfloat16 holds; a float32 of the Hessian is the sum of three
    bfloat16 numbers.  So products of bfloat16, summed in float32, are those of float32.
    """
    expert = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    lane = tl.arange(0, WIDTH)
    columns = groups * WIDTH
    line = expert * rows + row
    of_codes = codes + line[:, None] * columns + lane[None, :]
    of_weight = weight + line[:, None] * columns + lane[None, :]
    moments = hessian + (expert * columns + group * WIDTH + lane)[:, None] * columns + lane[None, :]
    zero = tl.load(zeros + line * groups + group, mask=row < rows, other=0).to(tl.float32)
    left = tl.load(of_codes + group * WIDTH, mask=inside, other=0).to(tl.float32) - zero[:, None]
    left = left.to(tl.bfloat16)
    damping = tl.load(added + expert)
    along_weight = tl.zeros((ROWS,), tl.float32)
    for other in range(groups):
        moment = tl.load(moments + other * WIDTH)
        coarse = moment.to(tl.bfloat16)
        rest = moment - coarse.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        fine = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        along = tl.dot(left, fine)
        along = tl.dot(left, middle, along)
        along = tl.dot(left, coarse, along)
        along += left.to(tl.float32) * tl.where(other == group, damping, 0.0)
        zero = tl.load(zeros + line * groups + other, mask=row < rows, other=0).to(tl.float32)
        right = tl.load(of_codes + other * WIDTH, mask=inside, other=0).to(tl.float32)
        product = tl.sum(along * (right - zero[:, None]), 1)
        tl.store(normal + (line * groups + group) * groups + other, product, mask=row < rows)
        dense = tl.load(of_weight + other * WIDTH, mask=inside, other=0.0)
        along_weight += tl.sum(along * dense, 1)
    tl.store(wanted + line * groups + group, along_weight, mask=row < rows)


def normal_equations(
    weight: Tensor, codes: Tensor, hessian: Tensor, added: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """A float32 [E, out, groups, groups] and b float32 [E, out, groups] of `refit_scales`.

    `weight` float32 and `codes` uint8 [E, out, in]; `hessian` float32 [E, in, in], `added` float32
    [E]; `zeros` uint8 [E, out, groups].  A group has as many columns as one of WIDTHS.
    """
    experts, rows, columns = weight.shape
    groups = zeros.shape[-1]
    normal = torch.empty((experts, rows, groups, groups), device=weight.device)
    wanted = torch.empty((experts, rows, groups), device=weight.device)
    _normal_kernel[(triton.cdiv(rows, _ROWS), groups, experts)](
        codes.contiguous(),
        zeros.contiguous(),
        weight.contiguous(),
        hessian.contiguous(),
        added,
        normal,
        wanted,
        rows,
        groups,
        WIDTH=columns // groups,
        ROWS=_ROWS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return normal, wanted


def self_test(device: torch.device) -> None:
    """ValueError where the kernel gives a wrong result for a few numbers."""
    columns, width = 256, 128
    place = torch.arange(columns, device=device)
    moment = 1 / (1 + (place.unsqueeze(0) - place.unsqueeze(1)).abs()).float().unsqueeze(0)
    codes = (torch.arange(2 * columns, device=device).view(1, 2, columns) % 13).to(torch.uint8)
    zeros = torch.full((1, 2, columns // width), 8, dtype=torch.uint8, device=device)
    weight = codes.float() / 3 - 1
    normal, wanted = normal_equations(weight, codes, moment, moment[0, 0, 1:2], zeros)
    split = codes.double().unsqueeze(2) - 8
    split = split * (place // width == torch.arange(2, device=device).unsqueeze(1))
    along = split @ (moment.double() + moment[0, 0, 1] * torch.eye(columns, device=device))
    right = torch.allclose(normal.double(), along @ split.mT, rtol=1e-4, atol=1e-2)
    right &= torch.allclose(
        wanted.double(),
        (along @ weight.double().unsqueeze(-1)).squeeze(-1),
        rtol=1e-4,
        atol=1e-2,
    )
    if not right:
        raise ValueError("the kernel of refitted scales returned wrong numbers")
