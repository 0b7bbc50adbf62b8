"""GPTQ as the paper tells it: one matrix, one column at a time, an explicit inverse, float64.

Deliberately slow and plain; shares no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    damping: float,
    activation_order: bool,
) -> Tensor:
    """Codes uint8 [out, in] for `weight` [out, in], given the grid of each row and group."""
    columns = weight.shape[1]
    group = columns // scales.shape[1]
    w, h = weight.double().clone(), hessian.double()
    order = torch.arange(columns)
    if activation_order:
        order = torch.argsort(torch.diag(hessian), descending=True, stable=True)
    damped = h + damping * torch.diag(h).mean() * torch.eye(columns, dtype=torch.float64)
    damped = damped[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    w = w[:, order]
    for j in range(columns):
        column = int(order[j])
        scale = scales[:, column // group].double()
        zero = zeros[:, column // group].double()
        code = (torch.round(w[:, j] / scale) + zero).clamp(0, 2**bits - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (w[:, j] - scale * (code - zero)) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None, :]
    return codes


def reference_loss(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T) in float64."""
    w, d, h = weight.double(), (weight.double() - dense.double()), hessian.double()
    return float(torch.trace(d @ h @ d.T) / torch.trace(w @ h @ w.T))
