"""What a quantiser is, what it returns, and how good the result is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.grid import SMALLEST_SCALE
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.rows import RowOrder
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


@dataclass(frozen=True)
class Solved:
    """A quantised matrix, or batch of matrices, and how much of its output was lost."""

    quantized: QuantizedTensor
    """Arrays on the weight's device, with the weight's batch dimensions."""
    loss: Tensor
    """float32, the batch dimensions: tr((W-Q) H (W-Q)^T) / tr(W H W^T); H = identity where there
    is no Hessian, 0 where W H W^T is zero."""
    damped_more: Tensor | None = None
    """bool [E]: matrices whose Hessian had a factor only with more damping than was asked for;
    None: none of them.  A tensor, so that a GPU need not be waited for."""

    @property
    def raised(self) -> int:
        """How many matrices needed more damping."""
        return 0 if self.damped_more is None else int(self.damped_more.sum())

    @property
    def smallest_scales(self) -> int:
        """Groups on the smallest scale there is: all zeros, or too small for a finer grid."""
        return int((self.quantized.arrays["scales"].abs() <= SMALLEST_SCALE).sum())


class Quantizer(Protocol):
    """One way to turn dense weights into codes; each lives in a file of `methods/`."""

    name: str
    needs_hessian: bool
    folds: bool
    """Whether input channels are to be scaled for it first (`pipeline.quantize.scaling`)."""
    weighs_outputs: bool
    """Whether it makes use of `outputs`."""

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        scheme: AffineScheme,
        options: SolverOptions,
        outputs: RowOrder | None = None,
    ) -> Solved:
        """Quantise `weight` [E, out, in] or [out, in] (float32 or bfloat16) on its device.

        `hessian`: float32 [E, in, in] or [in, in], the mean over tokens of x x^T.
        `outputs`: made from the Gram matrix M of what reads the outputs, the same for all
        matrices: the loss to be made small is tr(M D H D^T); None: all outputs count alike.
        Raises NumericalError naming the matrix's index where the numbers are not usable, and
        ValueError where shapes do not fit.
        """
        ...


_ENERGY_EXPERTS = 32  # matrices per step: bounds the float32 temporary, changes no value
_ENERGY_COLUMNS = 256


def energy(rows: Tensor, hessian: Tensor | None) -> Tensor:
    """tr(R H R^T), float32 [E], of float32 [E, out, in] and symmetric [E, in, in]; None: the
    identity."""
    parts = []
    for start in range(0, rows.shape[0], _ENERGY_EXPERTS):
        part = rows[start : start + _ENERGY_EXPERTS]
        if hessian is None:
            parts.append((part * part).sum(dim=(1, 2)))
        else:
            parts.append(_symmetric_energy(part, hessian[start : start + _ENERGY_EXPERTS]))
    return torch.cat(parts)


def _symmetric_energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """Of H only the blocks on and above the diagonal, those above it twice: half the product."""
    if solver_backend(rows.device) == "triton":
        kernels = importlib.import_module("pipeline.quantize.triton_products")
        found: Tensor = kernels.energy(rows, hessian)
        return found
    total = torch.zeros(len(rows), device=rows.device)
    for start in range(0, rows.shape[-1], _ENERGY_COLUMNS):
        block = slice(start, start + _ENERGY_COLUMNS)
        own = rows[..., block]
        product = torch.bmm(own, hessian[:, block, block])
        if start:
            product.baddbmm_(rows[..., :start], hessian[:, :start, block], alpha=2)
        total += product.mul_(own).sum(dim=(1, 2))
    return total


def relative(lost: Tensor, whole: Tensor) -> Tensor:
    """lost / whole; 0 where there was nothing to lose."""
    return torch.where(whole > 0, lost / whole, torch.zeros_like(lost))
