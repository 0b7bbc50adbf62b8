"""From quantised matrices to back ends that multiply by them."""

from __future__ import annotations

import torch

from pipeline.hybrid.backends import Matrices, choose
from pipeline.quantize.tensor import QuantizedTensor


def pair_rows(quantized: QuantizedTensor) -> QuantizedTensor:
    """`[2 N, rows, in]`, first and second matrix of each pair in turn, as `[N, 2 rows, in]` with
    the first one's rows above the second's; nothing is copied."""
    arrays = {k: v.unflatten(0, (-1, 2)).flatten(1, 2) for k, v in quantized.arrays.items()}
    return QuantizedTensor(quantized.scheme, arrays)


def to_matrices(quantized: QuantizedTensor, dtype: torch.dtype) -> tuple[str, Matrices]:
    """Name of the back end that suits the batch, and the batch in its keeping."""
    rows, columns = quantized.shape[-2:]
    backend = choose(quantized.scheme, rows, columns, quantized.arrays["codes"].device)
    return backend.name, backend.pack(quantized, dtype)
