"""The triangular factor of a damped Hessian that the column loop walks along."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import NumericalError

DAMPING_STEPS = 6
"""Times the damping of a matrix may grow tenfold before it is given up."""


def sweep_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of each damped Hessian, its columns in reverse order of processing.

    `hessian`: float32 [E, in, in]; `order`: int64 [E, in], the column processed first comes first;
    `damping`: fraction of the mean diagonal that is added to the diagonal.  A matrix that is not
    positive definite at that damping gets ten times as much, up to `DAMPING_STEPS` times.

    Returns the factor float32 [E, in, in] and what was added to each diagonal, float32 [E].  Raises
    NumericalError naming the first matrix that cannot be factorised.

    GPTQ asks for the upper Cholesky factor U of the inverse.  U^-1 is the upper factor V of
    H = V V^T itself, which is the flipped lower factor of the flipped H; the column loop can walk
    along V as well as along U (GPTQ is Babai's nearest plane, arXiv 2507.18553), and so nothing is
    ever inverted.
    """
    ordered = _reordered(hessian, order.flip(-1))
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(-1)
    # A matrix of zeros knows nothing of its inputs: all columns weigh the same.
    added = damping * torch.where(mean == 0, torch.ones_like(mean), mean)
    diagonal += added.unsqueeze(-1)
    factor, info = torch.linalg.cholesky_ex(ordered)
    pending = info.nonzero().flatten()
    for _step in range(DAMPING_STEPS):
        if not len(pending):
            break
        again = ordered[pending]
        again.diagonal(dim1=1, dim2=2).add_(9 * added[pending].unsqueeze(-1))
        added[pending] *= 10
        ordered[pending] = again
        factor[pending], info = torch.linalg.cholesky_ex(again)
        pending = pending[info.nonzero().flatten()]
    if len(pending):
        raise NumericalError(
            f"the Hessian of matrix {int(pending[0])} of the batch has no Cholesky factor even "
            f"with {DAMPING_STEPS} tenfold steps of damping; look for NaN or Inf in its inputs"
        )
    return factor, added


def column_importance(moment: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """What a squared error in each column costs, for the scale search: float32 [E, in].

    `moment`: the damped Hessian's diagonal, [E, in]; `factor`, `order`: as in `sweep_factor`.

    An error that nothing makes up for costs the column's second moment; one that all columns to
    come make up for costs the square of the factor's diagonal.  Columns to come are bound to a grid
    themselves, so the truth lies between; the geometric mean of both measured best.
    """
    pivot = factor.diagonal(dim1=1, dim2=2)
    conditional = torch.empty_like(moment).scatter_(1, order.flip(-1), pivot.square())
    return (moment * conditional).sqrt()


def _reordered(hessian: Tensor, index: Tensor) -> Tensor:
    """A copy with rows and columns taken in the order of `index` [E, in]."""
    experts, columns, _ = hessian.shape
    offset = torch.arange(experts, device=hessian.device).unsqueeze(1) * columns
    rows = hessian.reshape(experts * columns, columns).index_select(0, (index + offset).flatten())
    rows = rows.view(experts, columns, columns)
    # The second gather is along rows as well: a symmetric matrix may be transposed in between.
    flipped = rows.transpose(1, 2).reshape(experts * columns, columns)
    return flipped.index_select(0, (index + offset).flatten()).view(experts, columns, columns)
