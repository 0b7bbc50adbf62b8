"""The triangular factor of a damped Hessian that the column loop walks along."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.errors import NumericalError
from pipeline.quantize.cholesky import lower_factor

DAMPING_STEPS = 6
"""Times the damping of a matrix may grow tenfold before it is given up."""


@dataclass(frozen=True)
class Pulls:
    """What a pass of coordinate descent needs of damped Hessians, for blocks of columns."""

    blocks: list[slice]
    """Working positions of each block, in order of processing: the last comes first."""
    others: Tensor
    """float32 [E, in, in]: what one unit of each column's error (row) asks of each column.  Inside
    a block only what is asked by positions before its own: those behind it follow as they are
    visited."""
    within: list[Tensor]
    """That inside each block, float32 [E, width, width], with a diagonal of 1: lower triangles."""

    @classmethod
    def of(cls, damped: Tensor, width: int) -> Pulls:
        """H[b, a] / H[a, a] of float32 [E, in, in]."""
        blocks = column_blocks(damped.shape[-1], width)
        others = damped / damped.diagonal(dim1=1, dim2=2).unsqueeze(1)
        within = []
        for block in blocks:
            own = others[:, block, block]
            within.append(own.tril())
            own.triu_(1)
        return cls(blocks, others, within)


def column_blocks(columns: int, width: int) -> list[slice]:
    """Working positions of blocks of columns, in order of processing: the last comes first."""
    return [slice(max(0, stop - width), stop) for stop in range(columns, 0, -width)]


@dataclass(frozen=True)
class Factored:
    """Damped Hessians H = L L^T, rows and columns in reverse order of processing."""

    order: Tensor
    """int64 [E, in]: the stored column that is processed first comes first."""
    damped: Tensor
    """H, float32 [E, in, in]."""
    triangle: Tensor
    """L with each column divided by its pivot, so that the diagonal is 1; float32 [E, in, in]."""
    pivot: Tensor
    """L's diagonal, float32 [E, in]."""
    added: Tensor
    """What was added to each diagonal, float32 [E]."""
    raised: Tensor
    """bool [E]: whether that had to be more than was asked for."""
    _pulls: dict[int, Pulls] = field(default_factory=dict)

    def pulls(self, width: int) -> Pulls:
        """For blocks of `width` columns; made once."""
        if width not in self._pulls:
            self._pulls[width] = Pulls.of(self.damped, width)
        return self._pulls[width]


def factorise(hessian: Tensor, order: Tensor, damping: float) -> Factored:
    """Damp each Hessian and factorise it.

    `hessian`: float32 [E, in, in]; `order`: int64 [E, in], the column processed first comes first;
    `damping`: fraction of the mean diagonal that is added to the diagonal.  A matrix that is not
    positive definite at that damping gets ten times as much, up to `DAMPING_STEPS` times.

    Raises NumericalError naming the first matrix that cannot be factorised.

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
    factor, raised = damped_factor(ordered, added, "the Hessian")
    pivot = factor.diagonal(dim1=1, dim2=2).clone()
    factor /= pivot.unsqueeze(1)
    return Factored(order, ordered, factor, pivot, added, raised)


def damped_factor(damped: Tensor, added: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of `damped`, float32 [E, n, n], and bool [E]: whose damping grew.

    `added`: float32 [E], what is on each diagonal already.  A matrix that is not positive definite
    gets ten times as much, up to `DAMPING_STEPS` times; `damped` and `added` are changed with it.
    Raises NumericalError naming the first matrix that has no factor even so; `what`: it is.
    """
    factor, info = lower_factor(damped)
    # NaN passes some libraries' checks of the pivots.
    failed = (info != 0) | ~torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(dim=1)
    raised = failed.clone()
    pending = failed.nonzero().flatten()
    for _step in range(DAMPING_STEPS):
        if not len(pending):
            break
        again = damped[pending]
        again.diagonal(dim1=1, dim2=2).add_(9 * added[pending].unsqueeze(-1))
        added[pending] *= 10
        damped[pending] = again
        found, info = lower_factor(again)
        factor[pending] = found
        failed = (info != 0) | ~torch.isfinite(found.diagonal(dim1=1, dim2=2)).all(dim=1)
        pending = pending[failed.nonzero().flatten()]
    if len(pending):
        raise NumericalError(
            f"{what} of matrix {int(pending[0])} of the batch has no Cholesky factor even "
            f"with {DAMPING_STEPS} tenfold steps of damping; look for NaN or Inf in its inputs"
        )
    return factor, raised


def column_importance(factored: Factored) -> Tensor:
    """What a squared error in each column costs, for the scale search: float32 [E, in].

    An error that nothing makes up for costs the column's second moment; one that all columns to
    come make up for costs the square of the factor's diagonal.  Columns to come are bound to a grid
    themselves, so the truth lies between; the geometric mean of both measured best.
    """
    moment = factored.damped.diagonal(dim1=1, dim2=2)
    cost = moment.sqrt() * factored.pivot
    return torch.empty_like(cost).scatter_(1, factored.order.flip(-1), cost)


def _reordered(hessian: Tensor, index: Tensor) -> Tensor:
    """A copy with rows and columns taken in the order of `index` [E, in]."""
    experts, columns, _ = hessian.shape
    offset = torch.arange(experts, device=hessian.device).unsqueeze(1) * columns
    rows = hessian.reshape(experts * columns, columns).index_select(0, (index + offset).flatten())
    rows = rows.view(experts, columns, columns)
    # The second gather is along rows as well: a symmetric matrix may be transposed in between.
    flipped = rows.transpose(1, 2).reshape(experts * columns, columns)
    return flipped.index_select(0, (index + offset).flatten()).view(experts, columns, columns)
