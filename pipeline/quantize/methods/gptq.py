"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), all matrices of a batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.batch import as_batch
from pipeline.quantize.factor import column_importance, factorise
from pipeline.quantize.grid import fit_grid
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.precision import full_float32
from pipeline.quantize.refine import descend, refit_scales
from pipeline.quantize.solved import Solved, energy, relative
from pipeline.quantize.sweep import sweep
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


class Gptq:
    """Rounds column by column and lets the columns to come make up for the error."""

    name = "gptq"
    needs_hessian = True
    folds = False

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        scheme: AffineScheme,
        options: SolverOptions,
    ) -> Solved:
        """See `pipeline.quantize.solved.Quantizer`.

        A column that no token excited has no say in the others and is rounded to nearest.
        """
        matrices, moments = as_batch(weight, hessian)
        if moments is None:
            raise ValueError("gptq needs a Hessian")
        experts, _, columns = matrices.shape
        backend = solver_backend(matrices.device)
        moment = moments.diagonal(dim1=1, dim2=2)
        if options.activation_order:
            order = moment.argsort(dim=-1, descending=True, stable=True)
        else:
            order = torch.arange(columns, device=matrices.device).expand(experts, columns)
        with full_float32():
            factored = factorise(moments, order, options.damping)
            grid = fit_grid(
                matrices,
                scheme,
                search=options.scale_search,
                importance=column_importance(factored),
                backend=backend,
            )
            codes = sweep(matrices, factored, grid, bits=scheme.bits, backend=backend)
            for done in range(options.refinement_passes):
                if done and options.scale_search:
                    grid = refit_scales(matrices, codes, moments, factored.added, grid)
                codes = descend(matrices, codes, factored, grid, bits=scheme.bits, backend=backend)
            del factored
            arrays = {"codes": codes, "scales": grid.scales, "zeros": grid.zeros}
            quantized = QuantizedTensor(scheme, arrays)
            lost = energy(matrices - quantized.dequantize(), moments)
            loss = relative(lost, energy(matrices, moments))
        if weight.dim() == 2:
            return Solved(quantized[0], loss[0])
        return Solved(quantized, loss)


QUANTIZERS.register(Gptq.name, Gptq())
