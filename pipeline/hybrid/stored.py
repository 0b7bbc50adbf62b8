"""From quantised matrices to back ends that multiply by them."""

from __future__ import annotations

import torch

from pipeline.errors import CheckpointError
from pipeline.hybrid.backends import Matrices, choose
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


def stack_rows(first: QuantizedTensor, second: QuantizedTensor, where: str) -> QuantizedTensor:
    """Rows of `first` above rows of `second`, matrix by matrix; `where` names them in errors."""
    a, b = first.scheme, second.scheme
    if (a.bits, a.group_size) != (b.bits, b.group_size):
        raise CheckpointError(f"{where}: gate and up differ in bits or group size")
    arrays = {k: torch.cat([v, second.arrays[k]], dim=-2) for k, v in first.arrays.items()}
    return QuantizedTensor(AffineScheme(a.bits, a.group_size, a.symmetric and b.symmetric), arrays)


def to_matrices(quantized: QuantizedTensor, dtype: torch.dtype) -> tuple[str, Matrices]:
    """Name of the back end that suits the batch, and the batch in its keeping."""
    rows, columns = quantized.shape[-2:]
    backend = choose(quantized.scheme, rows, columns, quantized.arrays["codes"].device)
    return backend.name, backend.pack(quantized, dtype)
