"""Making up for what earlier layers lost: asymmetric calibration, GPTAQ (arXiv 2504.02692).

GPTQ keeps Q x close to W x, where x is the input that the quantised model really has.  What the
layer ought to give is W t, where t is the source's input at the same token.  Minimising
|W t - Q x|^2 over Q is the same problem for another weight, as the best linear guess of t is known:

    W' = W + W C (H + d I)^-1,    C = mean of (t - x) x^T,    H = mean of x x^T

so any quantiser solves it when it is given W' in the place of W.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.errors import NumericalError
from pipeline.quantize.backend import solver_backend
from pipeline.quantize.cholesky import solve_from_the_right
from pipeline.quantize.factor import damped_factor
from pipeline.quantize.precision import full_float32
from pipeline.quantize.products import product

DAMPING = 0.03
"""Fraction of the Hessian's mean diagonal added to it: directions that hold little of the input are
left alone, since what was seen there is noise."""


def routed_drift(
    target: Tensor, actual: Tensor, offsets: Sequence[int], weights: Tensor | None = None
) -> Tensor:
    """Sum over each expert's tokens of (target - actual) actual^T: float32 [E, in, in].

    `target`, `actual`: [S, in], the source's and the quantised model's inputs of the same tokens,
    ordered by expert; expert e has the rows offsets[e] to offsets[e + 1].  `weights`: float32
    [S], a weight for each row's product.
    """
    if solver_backend(actual.device) == "triton":
        kernels = importlib.import_module("pipeline.quantize.triton_kernels")
        found: Tensor = kernels.drift(target, actual, offsets, weights)
        return found
    columns = actual.shape[1]
    total = torch.zeros(len(offsets) - 1, columns, columns, device=actual.device)
    with full_float32():
        for expert, (start, stop) in enumerate(pairwise(offsets)):
            x = actual[start:stop].float()
            drift = target[start:stop].float() - x
            if weights is not None:
                drift *= weights[start:stop, None]
            torch.mm(drift.T, x, out=total[expert])
    return total


def corrected(weight: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """W' of the module's text, float32 [E, out, in].

    `weight` [E, out, in]; `hessian`, `drift`: float32 [E, in, in], means over equally many tokens.
    An expert without tokens has no drift and keeps its weight.  Raises NumericalError naming the
    first matrix whose Hessian cannot be factorised at any damping, or whose W' is not finite.
    """
    level = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
    # A Hessian of zeros goes with a drift of zeros; any positive level serves.
    level = torch.where(level > 0, level * DAMPING, 1.0)
    damped = hessian.clone()
    damped.diagonal(dim1=1, dim2=2).add_(level.unsqueeze(1))
    with full_float32():
        factor, _ = damped_factor(damped, level, "the Hessian")
        moved = product(weight.float(), drift)
        found = weight.float() + solve_from_the_right(factor, moved)
    fine = torch.isfinite(found).flatten(1).all(dim=1)
    if not bool(fine.all()):
        raise NumericalError(
            f"what matrix {int((~fine).nonzero()[0, 0])} of the batch should make up for is NaN or"
            " Inf; look for huge weights or activations, or set requantize.error_correction=false"
        )
    return found
