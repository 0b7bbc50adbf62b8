"""Coordinate descent and refitted scales, against one row at a time in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from problems import fresh, problem

from pipeline.quantize.factor import factorise
from pipeline.quantize.grid import Grid, encode, fit_grid, storable
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.refine import descend, refit_scales
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ = QUANTIZERS["gptq"]
SCHEMES = [
    AffineScheme(bits, group, symmetric)
    for bits, group, symmetric in ((4, 32, True), (4, 32, False), (4, -1, True), (8, 64, False))
]


def rounded(scheme, experts=3, out=24, columns=96):
    """A problem, its rounded codes, and what the refinement is told."""
    weight, hessian = problem(fresh(), experts, out, columns)
    if scheme.group_size == 64:
        weight, hessian = problem(fresh(), experts, out, 128)
    grid = fit_grid(weight, scheme, search=True)
    codes = encode(weight, grid, scheme.bits)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
    return weight, hessian, grid, codes, factorise(hessian, order, 0.05)


def row_losses(weight, codes, grid, hessian, added, scheme):
    """Error of every row under the damped Hessian, float64 [E, out]."""
    arrays = {"codes": codes, "scales": grid.scales, "zeros": grid.zeros}
    error = weight.double() - QuantizedTensor(scheme, arrays).dequantize().double()
    damped = hessian.double() + added.double().view(-1, 1, 1) * torch.eye(hessian.shape[-1])
    return torch.einsum("eoi,eij,eoj->eo", error, damped, error)


def descend_plainly(weight, codes, damped, order, scales, zeros, bits):
    """One row, one column after the other: codes int64 [in]."""
    codes = codes.long().clone()
    for a in order.tolist():
        error = weight - scales * (codes - zeros)
        others = error @ damped[:, a] - error[a] * damped[a, a]
        goal = (weight[a] + others / damped[a, a]) / scales[a]
        codes[a] = (torch.round(goal) + zeros[a]).clamp(0, 2**bits - 1).long()
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_pass_is_plain_coordinate_descent(scheme):
    weight, hessian, grid, codes, factored = rounded(scheme)
    found = descend(weight, codes, factored, grid, bits=scheme.bits, backend="torch")
    width = scheme.group(weight.shape[-1])
    same, total = 0, 0
    for e in range(len(weight)):
        damped = hessian[e].double() + factored.added[e].double() * torch.eye(len(hessian[e]))
        for row in range(0, weight.shape[1], 4):
            scales, zeros = (
                t[e, row].double().repeat_interleave(width) for t in (grid.scales, grid.zeros)
            )
            arguments = (codes[e, row], damped, factored.order[e], scales, zeros, scheme.bits)
            want = descend_plainly(weight[e, row].double(), *arguments)
            same += int((want == found[e, row]).sum())
            total += len(want)
    # A tie that float32 breaks differently changes what the rest of its row sees.
    assert same / total > 0.99


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_neither_step_makes_a_row_worse(scheme):
    weight, hessian, grid, codes, factored = rounded(scheme)
    before = row_losses(weight, codes, grid, hessian, factored.added, scheme)
    for _ in range(2):
        codes = descend(weight, codes, factored, grid, bits=scheme.bits, backend="torch")
        after = row_losses(weight, codes, grid, hessian, factored.added, scheme)
        assert bool((after <= before * (1 + 1e-4)).all())
        grid = refit_scales(weight, codes, hessian, factored.added, grid)
        refitted = row_losses(weight, codes, grid, hessian, factored.added, scheme)
        assert bool((refitted <= after * (1 + 1e-4)).all())
        before = refitted


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_the_least_squares_solution(scheme):
    weight, hessian, grid, codes, factored = rounded(scheme)
    # Grids that fit badly, so that there is something to find for every row.
    off = Grid(storable(grid.scales.float() * 1.3), grid.zeros)
    found = refit_scales(weight, codes, hessian, factored.added, off)
    width = scheme.group(weight.shape[-1])
    for e in range(len(weight)):
        damped = hessian[e].double() + factored.added[e].double() * torch.eye(len(hessian[e]))
        root = torch.linalg.cholesky(damped)
        for row in range(weight.shape[1]):
            zeros = grid.zeros[e, row].double().repeat_interleave(width)
            centred = (codes[e, row].double() - zeros).unflatten(0, (-1, width))
            columns = torch.block_diag(*centred) @ root
            goal = (weight[e, row].double() @ root).unsqueeze(1)
            want = torch.linalg.lstsq(columns.T, goal).solution.squeeze(1)
            # What is stored is rounded to bfloat16, 8 bits of it.
            torch.testing.assert_close(found.scales[e, row].double(), want, rtol=2**-7, atol=0)


def test_scales_can_be_stored_and_stay_in_range():
    scheme = AffineScheme(4, 32, True)
    weight, hessian, grid, codes, factored = rounded(scheme)
    codes[0, 0, :32] = 8  # a group that is all zeros has no scale of its own
    found = refit_scales(weight, codes, hessian, factored.added, grid).scales
    assert found[0, 0, 0] == grid.scales[0, 0, 0]
    assert torch.equal(found.float(), found.float().bfloat16().float())
    ratio = found.float() / grid.scales.float()
    assert bool(((ratio >= 0.49) & (ratio <= 2.02)).all())
    assert torch.equal(storable(found.float()), found)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refined_gptq_loses_less(scheme):
    weight, hessian = problem(fresh(), 3, 64, 128)
    losses = [
        GPTQ.quantize(weight, hessian, scheme, SolverOptions(refinement_passes=n)).loss
        for n in (0, 1, 2)
    ]
    # Scales are stored with 8 bits, so that where little is left to gain a matrix may lose some.
    for before, after in pairwise(losses):
        assert bool((after < 1.02 * before).all())
    assert losses[2].sum() < losses[0].sum()


def test_a_matrix_without_tokens_keeps_a_usable_grid():
    weight, hessian = problem(fresh(), 2, 32, 128)
    hessian[1] = 0
    scheme = AffineScheme(4, 32, True)
    solved = GPTQ.quantize(weight, hessian, scheme, SolverOptions())
    error = (weight - solved.quantized.dequantize())[1].square().mean()
    nearest = QUANTIZERS["rtn"].quantize(weight, None, scheme, SolverOptions()).quantized
    assert float(error) <= float((weight - nearest.dequantize())[1].square().mean()) * 1.0001


def test_passes_must_not_be_negative():
    with pytest.raises(ValueError, match="refinement_passes"):
        SolverOptions(refinement_passes=-1)
