"""Activation-aware scales: their loss against real activations, norms as stored, neutral cases."""

import pytest
import torch

from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.scaling import (
    SEARCH_ROWS,
    TOLERANCE,
    best_scales,
    candidate_scales,
    fold_norm,
    round_clipped,
    scale_losses,
)
from pipeline.quantize.tensor import AffineScheme

OPTIONS = SolverOptions()


def problem(experts=3, rows=24, columns=64, tokens=300):
    """Weights and inputs of which some channels are loud; [E, out, in] and [E, tokens, in]."""
    loud = torch.exp(torch.randn(experts, 1, columns))
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns)
    return torch.randn(experts, rows, columns) * 0.1, (
        torch.randn(experts, tokens, columns) @ mix
    ) * loud


@pytest.mark.parametrize("own", [True, False], ids=["own scales", "shared scales"])
@pytest.mark.parametrize("search", [True, False])
def test_loss_is_that_of_real_activations(own, search):
    weight, x = problem()
    hessian = x.transpose(1, 2) @ x
    options = SolverOptions(scale_search=search)
    moment = hessian.diagonal(dim1=1, dim2=2)
    candidates = candidate_scales(moment if own else moment.mean(0))
    for scheme in (AffineScheme(4, 32, False), AffineScheme(4, -1, True)):
        losses = scale_losses(weight, hessian, candidates, scheme, options)
        for candidate, loss in zip(candidates, losses, strict=True):
            scale = candidate.expand(3, -1)
            scaled = weight * scale.unsqueeze(1)
            quantized = round_clipped(scaled, moment / scale.square(), scheme, options)
            lost = weight @ x.transpose(1, 2)
            lost -= quantized.dequantize() @ (x / scale.unsqueeze(1)).transpose(1, 2)
            assert torch.allclose(loss, lost.square().sum((1, 2)), rtol=2e-3)


def test_the_search_wins_where_channels_are_loud():
    weight, x = problem(experts=16, columns=128)
    hessian = x.transpose(1, 2) @ x
    candidates = candidate_scales(hessian.diagonal(dim1=1, dim2=2))
    scheme = AffineScheme(4, 128, False)
    losses = scale_losses(weight, hessian, candidates, scheme, OPTIONS)
    chosen = best_scales(candidates, losses)
    won = scale_losses(weight, hessian, chosen[None], scheme, OPTIONS)[0]
    assert torch.equal(won, losses.min(0).values)
    # 0.81 on average and 0.87 at most in 200 draws; a single expert may win nothing
    assert won.sum() < 0.9 * losses[0].sum(), won / losses[0]
    solved = QUANTIZERS["awq"].quantize(
        weight * chosen.unsqueeze(1),
        hessian / (chosen.unsqueeze(1) * chosen.unsqueeze(2)),
        scheme,
        OPTIONS,
    )
    whole = (weight @ x.transpose(1, 2)).square().sum((1, 2))
    assert torch.allclose(solved.loss, won / whole, rtol=1e-3)


def test_candidates_are_neutral_first_and_of_mean_one():
    moment = torch.rand(2, 5, 64) ** 4
    moment[0, 0, :60] = 0.0  # all but a few channels are dead
    moment[1, 4] = 0.0  # nothing known at all
    candidates = candidate_scales(moment)
    assert bool(torch.isfinite(candidates).all()) and bool((candidates > 0).all())
    assert torch.equal(candidates[0], torch.ones_like(moment))
    assert torch.equal(candidates[:, 1, 4], torch.ones_like(candidates[:, 1, 4]))
    assert torch.allclose(candidates.log().mean(-1), torch.zeros(()), atol=1e-5)


def test_a_matrix_without_inputs_keeps_the_neutral_scale():
    weight, x = problem()
    x[1] = 0
    hessian = x.transpose(1, 2) @ x
    candidates = candidate_scales(hessian.diagonal(dim1=1, dim2=2).mean(0))
    own = candidates.unsqueeze(1).expand(-1, 3, -1)
    losses = scale_losses(weight, hessian, own, AffineScheme(4, 32, False), OPTIONS)
    chosen = best_scales(own, losses)
    assert torch.equal(chosen[1], torch.ones(64))
    assert not torch.equal(chosen[0], torch.ones(64))


def test_a_search_over_many_rows_looks_at_some():
    weight, x = problem(experts=1, rows=4 * SEARCH_ROWS + 3)
    hessian = x.transpose(1, 2) @ x
    candidates = candidate_scales(hessian.diagonal(dim1=1, dim2=2))
    scheme = AffineScheme(4, 32, False)
    all_rows = scale_losses(weight[:, ::5], hessian, candidates, scheme, OPTIONS)
    assert torch.equal(scale_losses(weight, hessian, candidates, scheme, OPTIONS), all_rows)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_norm_divides_by_what_is_said(plus_one, stored):
    offset = 1 if plus_one else 0
    weight = (torch.randn(4000) * 0.5).to(stored)
    weight[:40] = torch.linspace(-0.03, 0.03, 40).to(stored) - offset
    weight[40] = -offset
    scale = torch.exp(torch.randn(4000))
    new, effective = fold_norm(weight, scale, plus_one=plus_one, dtype=torch.bfloat16)
    assert new.dtype == stored
    was, now = weight.double() + offset, new.double() + offset
    assert torch.allclose(now * effective, was, rtol=1e-6, atol=0)
    kept = effective == 1
    assert torch.equal(new[kept], weight[kept]) and bool(kept[40])
    assert torch.equal(new[~kept].bfloat16().to(stored), new[~kept])
    off = (effective / scale)[~kept]
    assert float(off.max()) < TOLERANCE and float(off.min()) > 1 / TOLERANCE
    assert float(kept.float().mean()) < 0.05
