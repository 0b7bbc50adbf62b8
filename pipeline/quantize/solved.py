"""What a quantiser is, what it returns, and how good the result is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


@dataclass(frozen=True)
class Solved:
    """A quantised matrix, or batch of matrices, and how much of its output was lost."""

    quantized: QuantizedTensor
    """Arrays on the weight's device, with the weight's batch dimensions."""
    loss: Tensor
    """float32, the batch dimensions: tr((W-Q) H (W-Q)^T) / tr(W H W^T); H = identity where there
    is no Hessian, 0 where W H W^T is zero."""


class Quantizer(Protocol):
    """One way to turn dense weights into codes; each lives in a file of `methods/`."""

    name: str
    needs_hessian: bool

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        scheme: AffineScheme,
        options: SolverOptions,
    ) -> Solved:
        """Quantise `weight` [E, out, in] or [out, in] (float32 or bfloat16) on its device.

        `hessian`: float32 [E, in, in] or [in, in], the mean over tokens of x x^T.
        Raises NumericalError naming the matrix's index where the numbers are not usable, and
        ValueError where shapes do not fit.
        """
        ...


_LOSS_EXPERTS = 32  # matrices per step: bounds the float32 temporaries, changes no value


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> Tensor:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T) per matrix.

    `weight`, `quantized`: float32 [E, out, in]; `hessian`: float32 [E, in, in] or None for the
    identity.  Returns float32 [E].
    """
    losses = []
    for start in range(0, weight.shape[0], _LOSS_EXPERTS):
        part = slice(start, start + _LOSS_EXPERTS)
        dense = weight[part]
        error = dense - quantized[part]
        moment = None if hessian is None else hessian[part]
        lost, whole = _energy(error, moment), _energy(dense, moment)
        losses.append(torch.where(whole > 0, lost / whole, torch.zeros_like(lost)))
    return torch.cat(losses)


def _energy(rows: Tensor, moment: Tensor | None) -> Tensor:
    """tr(R H R^T) per matrix of [E, out, in]."""
    products = rows if moment is None else torch.bmm(rows, moment)
    return (products * rows).sum(dim=(1, 2))
