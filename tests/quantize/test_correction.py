"""The target shift that lets a layer make up for what earlier layers lost."""

from __future__ import annotations

import torch

from pipeline.quantize.correction import DAMPING, corrected, routed_drift
from pipeline.quantize.hessian import routed_hessians
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme


def _problem(experts: int = 3, columns: int = 64, tokens: int = 900):
    """Inputs of the quantised model, and what the source had: a linear map of them, and noise."""
    offsets = [0, tokens // 2, tokens // 2, tokens][: experts + 1]
    actual = torch.randn(tokens, columns)
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns) / columns**0.5
    target = actual @ mix.T + 0.05 * torch.randn(tokens, columns)
    weight = torch.randn(experts, 48, columns)
    return weight, target, actual, offsets


def _means(target, actual, offsets):
    counts = torch.tensor(offsets).diff().clamp(min=1).view(-1, 1, 1)
    hessian = routed_hessians(actual, torch.tensor(offsets)) / counts
    return hessian, routed_drift(target, actual, offsets) / counts


def test_drift_is_the_cross_moment():
    _, target, actual, offsets = _problem()
    drift = routed_drift(target, actual, offsets)
    for expert in range(3):
        rows = slice(offsets[expert], offsets[expert + 1])
        want = (target[rows] - actual[rows]).double().T @ actual[rows].double()
        torch.testing.assert_close(drift[expert].double(), want, rtol=1e-4, atol=1e-3)


def test_corrected_is_the_damped_least_squares_solution():
    weight, target, actual, offsets = _problem()
    hessian, drift = _means(target, actual, offsets)
    found = corrected(weight, hessian, drift)
    for expert in (0, 2):
        h = hessian[expert].double()
        h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
        want = weight[expert].double() @ (torch.eye(len(h)) + drift[expert].double() @ h.inverse())
        torch.testing.assert_close(found[expert].double(), want, rtol=1e-4, atol=1e-4)
    # The middle expert saw nothing, so there is nothing to make up for.
    torch.testing.assert_close(found[1], weight[1], rtol=0, atol=0)


def test_no_drift_no_change():
    weight, _, actual, offsets = _problem()
    hessian, drift = _means(actual, actual, offsets)
    torch.testing.assert_close(corrected(weight, hessian, drift), weight, rtol=0, atol=0)


def test_quantised_output_comes_closer_to_the_source():
    weight, target, actual, offsets = _problem()
    hessian, drift = _means(target, actual, offsets)
    hessian[1] = torch.eye(64)
    scheme = AffineScheme(4, 32, True)
    gptq = QUANTIZERS["gptq"]

    def error(w):
        q = gptq.quantize(w, hessian, scheme, SolverOptions()).quantized.dequantize()
        rows = slice(offsets[2], offsets[3])
        return float(((target[rows] @ weight[2].T - actual[rows] @ q[2].T) ** 2).mean())

    assert error(corrected(weight, hessian, drift)) < 0.75 * error(weight)


def test_drift_weighs_tokens():
    _, target, actual, offsets = _problem()
    weights = torch.rand(len(actual)) + 0.1
    drift = routed_drift(target, actual, offsets, weights)
    for expert in range(3):
        rows = slice(offsets[expert], offsets[expert + 1])
        moved = (target[rows] - actual[rows]).double() * weights[rows, None].double()
        want = moved.T @ actual[rows].double()
        torch.testing.assert_close(drift[expert].double(), want, rtol=1e-3, atol=1e-3)
