"""Rounding to nearest: every weight to the closest point of its group's grid."""

from __future__ import annotations

from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.batch import as_batch
from pipeline.quantize.grid import encode, fit_grid, refuse_unusable
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.precision import full_float32
from pipeline.quantize.rows import RowOrder
from pipeline.quantize.solved import Solved, energy, relative
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


class RoundToNearest:
    """Needs no statistics; a Hessian, if given, only measures the loss."""

    name = "rtn"
    needs_hessian = False
    folds = False
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
        backend = solver_backend(matrices.device)
        grid = fit_grid(
            matrices,
            scheme,
            search=options.scale_search,
            turning=options.negative_scales,
            backend=backend,
        )
        refuse_unusable(grid.scales)
        arrays = {
            "codes": encode(matrices, grid, scheme.bits),
            "scales": grid.scales,
            "zeros": grid.zeros,
        }
        quantized = QuantizedTensor(scheme, arrays)
        with full_float32():
            lost = energy(matrices - quantized.dequantize(), moments)
            loss = relative(lost, energy(matrices, moments))
        if weight.dim() == 2:
            return Solved(quantized[0], loss[0])
        return Solved(quantized, loss)


QUANTIZERS.register(RoundToNearest.name, RoundToNearest())
