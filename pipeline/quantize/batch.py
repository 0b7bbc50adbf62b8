"""One matrix or a batch of them: solvers work on batches only."""

from __future__ import annotations

import torch
from torch import Tensor


def as_batch(weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`weight` as float32 [E, out, in] and `hessian` as float32 [E, in, in].

    A single matrix [out, in] (with [in, in]) becomes a batch of one.  Raises ValueError where the
    shapes do not belong together.
    """
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise ValueError(f"weights must be float [E, out, in] or [out, in], not {weight.shape}")
    columns = weight.shape[-1]
    if hessian is not None:
        expected = (*weight.shape[:-2], columns, columns)
        if tuple(hessian.shape) != expected:
            raise ValueError(f"Hessian of shape {tuple(hessian.shape)}, expected {expected}")
    batch = weight if weight.dim() == 3 else weight.unsqueeze(0)
    moments = hessian if hessian is None or hessian.dim() == 3 else hessian.unsqueeze(0)
    return batch.to(torch.float32), None if moments is None else moments.to(torch.float32)
