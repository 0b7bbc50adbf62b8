"""AWQ (Lin et al. 2023, arXiv 2306.00978): weights scaled per input channel, clipped and rounded.

The scales are found and folded into what comes before a matrix (`pipeline.quantize.scaling`); what
is left to do here is the clipping search and the rounding, or GPTQ on the scaled weights.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quantize.batch import as_batch
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.methods.gptq import Gptq
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.precision import full_float32
from pipeline.quantize.rows import RowOrder
from pipeline.quantize.scaling import round_clipped
from pipeline.quantize.solved import Solved, energy, relative
from pipeline.quantize.tensor import AffineScheme


class Awq:
    """Rounds to nearest, on grids clipped for the least output error."""

    name = "awq"
    needs_hessian = True
    folds = True
    weighs_outputs = False

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        scheme: AffineScheme,
        options: SolverOptions,
        outputs: RowOrder | None = None,
    ) -> Solved:
        """See `pipeline.quantize.solved.Quantizer`; of the options, only those of scales."""
        matrices, moments = as_batch(weight, hessian)
        if moments is None:
            raise ValueError("awq needs a Hessian")
        moment = moments.diagonal(dim1=1, dim2=2)
        quantized = round_clipped(matrices, moment, scheme, options)
        with full_float32():
            lost = energy(matrices - quantized.dequantize(), moments)
            loss = relative(lost, energy(matrices, moments))
        if weight.dim() == 2:
            return Solved(quantized[0], loss[0])
        return Solved(quantized, loss)


class AwqGptq(Gptq):
    """GPTQ on scaled weights."""

    name = "awq+gptq"
    folds = True


QUANTIZERS.register(Awq.name, Awq())
QUANTIZERS.register(AwqGptq.name, AwqGptq())
