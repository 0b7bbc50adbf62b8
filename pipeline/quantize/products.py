"""Batched float32 products of the solver: by the library, or on a GPU's tensor cores."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pipeline.quantize.backend import solver_backend


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of float32 [E, m, k] and [E, k, n]; to be called inside `full_float32`."""
    if solver_backend(a.device) == "triton":
        found: Tensor = importlib.import_module("pipeline.quantize.triton_products").product(a, b)
        return found
    return torch.bmm(a, b)


def subtract_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total -= a b in place, float32 [E, m, n], [E, m, k] and [E, k, n]."""
    if solver_backend(a.device) == "triton":
        kernels = importlib.import_module("pipeline.quantize.triton_products")
        kernels.product(a, b, base=total, alpha=-1.0, out=total)
    else:
        total.baddbmm_(a, b, alpha=-1)
