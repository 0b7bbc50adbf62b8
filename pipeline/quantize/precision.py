"""Full float32 matrix products, whatever the process has switched on.

TF32 (and oneDNN's bfloat16 mode) changes a few per cent of the codes, and whether it is on depends
on what the embedding program did earlier.  Solvers therefore run with both off and put the settings
back, so that their result depends on the numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def float32_products() -> dict[str, str]:
    """How the process computes float32 products outside the solver, by torch's own names.

    "tf32" or "bf16" where they are rounded first, "ieee" where not.
    """
    backends: Any = torch.backends
    set_to = {
        "cuda": str(backends.cuda.matmul.fp32_precision),
        "cpu": str(backends.mkldnn.matmul.fp32_precision),
    }
    # "none" is torch's default and computes the same; it is "ieee" once anybody has put it back.
    return {device: "ieee" if name == "none" else name for device, name in set_to.items()}


@contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 matrix products in IEEE float32 on CUDA and on CPU; restores the settings."""
    # Only the fp32_precision names (torch 2.9 on): after one of them was written, torch refuses to
    # read the older allow_tf32 spelling of the same switch.
    backends: Any = torch.backends
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision = cpu.fp32_precision = "ieee"
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
