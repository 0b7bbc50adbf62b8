"""Row blocks that make up for each other's error, against the conditional minimum in float64."""

from __future__ import annotations

import pytest
import torch
from problems import fresh, problem

from pipeline.quantize.grid import encode, fit_grid
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.rows import DAMPING, ROW_BLOCKS, row_order, solve_rows
from pipeline.quantize.tensor import AffineScheme

pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ = QUANTIZERS["gptq"]
SCHEME = AffineScheme(4, 32, True)


def gram(generator, rows):
    """A sensitivity of a few strong directions over a floor, as later layers' readers have."""
    readers = torch.randn((rows // 3, rows), generator=generator)
    return readers.T @ readers / rows + 0.1 * torch.eye(rows)


def two_sided(weight, solved, hessian, sensitivity):
    """tr(M D H D^T) of every matrix, float64."""
    error = (weight - solved.quantized.dequantize()).double()
    inner = error @ hessian.double() @ error.transpose(1, 2)
    return (sensitivity.double() * inner).sum(dim=(1, 2))


@pytest.mark.parametrize("rows", [40, 96])
def test_targets_are_where_the_rest_of_the_loss_is_least(rows):
    generator = fresh()
    weight, _ = problem(generator, 2, rows, 64)
    sensitivity = gram(generator, rows)
    asked = []

    def rounding(target):
        asked.append(target)
        grid = fit_grid(target, SCHEME, search=False)
        return encode(target, grid, 4), grid

    codes, grid = solve_rows(weight, row_order(sensitivity), rounding)
    split = codes.double().unflatten(-1, (-1, 32)) - grid.zeros.unsqueeze(-1)
    error = weight - (split * grid.scales.double().unsqueeze(-1)).flatten(-2)
    damped = sensitivity.double()
    damped += DAMPING * damped.diagonal().mean() * torch.eye(rows)
    order = sensitivity.diagonal().argsort(stable=True).flip(0)
    width = -(-rows // ROW_BLOCKS)
    # The last block of the reversed order is the first one solved, from the other end.
    done = 0
    for target in asked:
        block = order[done : done + target.shape[1]].flip(0)
        before, free = order[:done], order[done:]
        want = weight[:, block].double()
        if done:
            pull = torch.linalg.solve(damped[free][:, free], damped[free][:, before])
            place = [free.tolist().index(r) for r in block.tolist()]
            want = want + pull[place] @ error[:, before]
        torch.testing.assert_close(target.double(), want, rtol=1e-3, atol=1e-5)
        done += target.shape[1]
    assert done == rows
    assert len(asked[0][0]) == width


def test_outputs_that_count_alike_change_nothing(one_thread):
    """One thread: several cut products of other shapes elsewhere, which shows in last bits."""
    weight, hessian = problem(fresh(), 3, 40, 64)
    plain = GPTQ.quantize(weight, hessian, SCHEME, SolverOptions())
    weighted = GPTQ.quantize(weight, hessian, SCHEME, SolverOptions(), row_order(3 * torch.eye(40)))
    for name, array in plain.quantized.arrays.items():
        assert torch.equal(array, weighted.quantized.arrays[name])
    assert torch.equal(plain.loss, weighted.loss)


@pytest.mark.parametrize("method", list(QUANTIZERS))
def test_quantizers_say_whether_they_weigh_outputs(method):
    generator = fresh()
    weight, hessian = problem(generator, 2, 48, 64)
    quantizer, options = QUANTIZERS[method], SolverOptions()
    plain = quantizer.quantize(weight, hessian, SCHEME, options)
    weighted = quantizer.quantize(weight, hessian, SCHEME, options, row_order(gram(generator, 48)))
    same = torch.equal(plain.quantized.arrays["codes"], weighted.quantized.arrays["codes"])
    assert same is not quantizer.weighs_outputs


@pytest.mark.parametrize(
    "scheme",
    [SCHEME, AffineScheme(4, 64, False), AffineScheme(8, 32, True), AffineScheme(4, -1, True)],
    ids=str,
)
def test_what_reads_the_outputs_loses_less(scheme):
    generator = fresh()
    weight, hessian = problem(generator, 3, 96, 64)
    hessian[2] = 0  # an expert without tokens
    sensitivity = gram(generator, 96)
    plain = GPTQ.quantize(weight, hessian, scheme, SolverOptions())
    weighted = GPTQ.quantize(weight, hessian, scheme, SolverOptions(), row_order(sensitivity))
    hessian[2] = torch.eye(64)  # what its damping stands for
    before = two_sided(weight, plain, hessian, sensitivity)
    after = two_sided(weight, weighted, hessian, sensitivity)
    assert bool((after < 0.85 * before).all())
