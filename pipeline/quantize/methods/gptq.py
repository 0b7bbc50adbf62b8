"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), all matrices of a batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.batch import as_batch
from pipeline.quantize.factor import Factored, column_importance, factorise
from pipeline.quantize.grid import Grid, fit_grid, refuse_unusable
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.precision import full_float32
from pipeline.quantize.refine import descend, refit_scales
from pipeline.quantize.rows import RowOrder, solve_rows
from pipeline.quantize.solved import Solved, energy, relative
from pipeline.quantize.sweep import sweep
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


class Gptq:
    """Rounds column by column and lets the columns to come make up for the error."""

    name = "gptq"
    needs_hessian = True
    folds = False
    weighs_outputs = True

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        scheme: AffineScheme,
        options: SolverOptions,
        outputs: RowOrder | None = None,
    ) -> Solved:
        """See `pipeline.quantize.solved.Quantizer`.

        A column that no token excited has no say in the others and is rounded to nearest.
        """
        matrices, moments = as_batch(weight, hessian)
        if moments is None:
            raise ValueError("gptq needs a Hessian")
        experts, rows, columns = matrices.shape
        if outputs is not None and len(outputs.order) != rows:
            raise ValueError(f"outputs are of {len(outputs.order)} rows, matrices have {rows}")
        moment = moments.diagonal(dim1=1, dim2=2)
        if options.activation_order:
            order = moment.argsort(dim=-1, descending=True, stable=True)
        else:
            order = torch.arange(columns, device=matrices.device).expand(experts, columns)
        with full_float32():
            factored = factorise(moments, order, options.damping)

            def solve(rows: Tensor) -> tuple[Tensor, Grid]:
                return _solve(rows, moments, factored, scheme, options)

            if outputs is None:
                codes, grid = solve(matrices)
            else:
                codes, grid = solve_rows(matrices, outputs, solve)
            refuse_unusable(grid.scales)
            arrays = {"codes": codes, "scales": grid.scales, "zeros": grid.zeros}
            quantized = QuantizedTensor(scheme, arrays)
            lost = energy(matrices - quantized.dequantize(), moments)
            loss = relative(lost, energy(matrices, moments))
        if weight.dim() == 2:
            return Solved(quantized[0], loss[0], factored.raised)
        return Solved(quantized, loss, factored.raised)


def _solve(
    weight: Tensor,
    hessian: Tensor,
    factored: Factored,
    scheme: AffineScheme,
    options: SolverOptions,
) -> tuple[Tensor, Grid]:
    """Codes and grid of `weight` float32 [E, rows, in]; `hessian`: in stored order, undamped."""
    backend = solver_backend(weight.device)
    importance = column_importance(factored)
    grid = fit_grid(
        weight,
        scheme,
        search=options.scale_search,
        turning=options.negative_scales,
        importance=importance,
        backend=backend,
    )
    codes = sweep(weight, factored, grid, bits=scheme.bits, backend=backend)
    for done in range(options.refinement_passes):
        if done and options.scale_search:
            grid = refit_scales(weight, codes, hessian, factored.added, grid, backend=backend)
        codes = descend(weight, codes, factored, grid, bits=scheme.bits, backend=backend)
    return codes, grid


QUANTIZERS.register(Gptq.name, Gptq())
