"""From weights as they are stored to back ends that multiply by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.checkpoint import Checkpoint, StoredWeight
from pipeline.checkpoint.finite import require_finite
from pipeline.checkpoint.formats.gptq import Packing, unpack
from pipeline.errors import CheckpointError
from pipeline.hybrid.backends import Matrices, choose
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


def is_quantized(weight: StoredWeight) -> bool:
    """Whether a back end can multiply by this weight in its quantised form."""
    state = weight.state
    return state is not None and isinstance(state.details, Packing)


def read_quantized(
    checkpoint: Checkpoint, names: Sequence[str], device: torch.device
) -> QuantizedTensor:
    """Equally shaped quantised matrices as one batch `[N, out, in]`, codes unpacked.

    Raises CheckpointError, naming a tensor, for one that is missing, stored otherwise than the
    first or with columns out of order, NumericalError for scales that are not finite.
    """
    parts = checkpoint.load_parts(names, device)
    require_finite(parts["scales"], list(names), "scales")
    weight = checkpoint.weights[names[0]]
    assert weight.state is not None, "load_parts gives nothing without a state"
    packing: Packing = weight.state.details
    columns = weight.state.shape[1]
    if columns % packing.groups:
        raise CheckpointError(f"{names[0]}: {packing.groups} groups do not divide {columns} inputs")
    group = -1 if packing.groups == 1 else columns // packing.groups
    try:
        quantized = unpack(parts, AffineScheme(packing.bits, group, False), packing.version)
    except CheckpointError as error:
        raise CheckpointError(f"{names[0]}: {error}") from error
    symmetric = bool((quantized.arrays["zeros"] == 1 << (packing.bits - 1)).all())
    scheme = AffineScheme(packing.bits, group, symmetric)
    return QuantizedTensor(scheme, quantized.arrays)


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
