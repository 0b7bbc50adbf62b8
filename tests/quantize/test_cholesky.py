"""Factors and solutions by blocks, as a GPU computes them, against float64 and the library."""

import pytest
import torch
from problems import fresh, problem

from pipeline.quantize import cholesky

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 32)


def _damped(experts, columns):
    _, hessian = problem(fresh(), experts, 8, columns)
    level = hessian.diagonal(dim1=1, dim2=2).mean(dim=1) * 0.03
    hessian.diagonal(dim1=1, dim2=2).add_(level.unsqueeze(1))
    return hessian


@pytest.mark.parametrize("columns", [32, 100, 320])
def test_a_factor_by_blocks_is_as_exact_as_the_library_s(columns):
    hessian = _damped(3, columns)
    exact = torch.linalg.cholesky(hessian.double())
    found, info = cholesky._factor_by_blocks(hessian)
    plain = torch.linalg.cholesky(hessian)
    assert not info.any()
    assert torch.equal(found, found.tril())
    lost, usual = (float((f.double() - exact).norm() / exact.norm()) for f in (found, plain))
    assert lost < 2 * usual + 1e-7


@pytest.mark.parametrize("columns", [32, 100, 320])
def test_solving_by_blocks_is_as_exact_as_the_library(columns):
    hessian = _damped(3, columns)
    factor = torch.linalg.cholesky(hessian)
    values = torch.randn(3, 17, columns, generator=fresh())
    exact = torch.cholesky_solve(values.double().mT, factor.double()).mT
    found = cholesky._solve_by_blocks(factor, values)
    plain = cholesky.solve_from_the_right(factor, values)
    lost, usual = (float((f.double() - exact).norm() / exact.norm()) for f in (found, plain))
    assert lost < 2 * usual + 1e-7


def test_a_block_without_a_factor_is_told_of():
    hessian = _damped(3, 100)
    hessian[1, 70, 70] = -1.0
    found, info = cholesky._factor_by_blocks(hessian)
    assert (info != 0).tolist() == [False, True, False]
    assert torch.isfinite(found[[0, 2]]).all()
