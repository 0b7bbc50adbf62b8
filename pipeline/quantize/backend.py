"""Which code does the solver's inner loops on a device: Triton kernels, or plain torch."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Literal

import torch

Backend = Literal["torch", "triton"]

KERNELS = (
    "triton_kernels",
    "triton_columns",
    "triton_products",
    "triton_refine",
    "triton_routed",
)
"""Modules of Triton kernels, used together or not at all."""


@cache
def solver_backend(device: torch.device) -> Backend:
    """The backend for tensors on `device`; part of what decides a result's bytes.

    Triton needs a C compiler at run time and a GPU generation it knows, so it counts as present
    only after its kernels gave the right answer once on this device.
    """
    if device.type != "cuda":
        return "torch"
    try:
        for kernels in KERNELS:
            importlib.import_module(f"pipeline.quantize.{kernels}").self_test(device)
    except Exception as error:  # whatever is wrong with it, plain torch does the same work
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton cannot be used, plain torch is slower: {reason}", stacklevel=2)
        return "torch"
    return "triton"
