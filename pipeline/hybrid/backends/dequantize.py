"""Any affine matrix on any device: made dense for each product, then an ordinary matmul.

Slow on a CPU, where it serves the shapes and groups that torch's int4 kernel refuses; on a GPU it
serves the quantised linear layers.  Codes of up to 4 bits are kept two in a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.hybrid.backends import BACKENDS
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor, Scheme


class DenseOnUse:
    """A stack of codes; see `Matrices`.  Weights are rounded once, to the compute dtype."""

    rounded_scales = False

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        codes = quantized.arrays["codes"]
        self.device = codes.device
        self._scheme = quantized.scheme
        self._dtype = dtype
        self._paired = quantized.scheme.bits <= 4 and codes.shape[-1] % 2 == 0
        arrays = dict(quantized.arrays)
        if self._paired:
            arrays["codes"] = codes[..., 0::2] | codes[..., 1::2] << 4
        self._arrays = {name: array.contiguous() for name, array in arrays.items()}
        self.nbytes = sum(array.nbytes for array in self._arrays.values())

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """See `Matrices.multiply`."""
        arrays = {name: array[index] for name, array in self._arrays.items()}
        if self._paired:
            pairs = arrays["codes"]
            arrays["codes"] = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
        weight = QuantizedTensor(self._scheme, arrays).dequantize(self._dtype)
        return torch.nn.functional.linear(x, weight)


class Dequantize:
    """See the module's description."""

    name = "dequantize"
    rank = 90

    def accepts(self, scheme: Scheme, rows: int, columns: int, device: torch.device) -> bool:
        """See `Backend.accepts`."""
        return isinstance(scheme, AffineScheme)

    def pack(self, quantized: QuantizedTensor, dtype: torch.dtype) -> DenseOnUse:
        """See `Backend.pack`."""
        return DenseOnUse(quantized, dtype)


BACKENDS.register(Dequantize.name, Dequantize())
