"""Products of float32 numbers on a GPU's tensor cores, held against float64 and the library's."""

import pytest
import torch
from problems import fresh, problem

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.precision import full_float32
from pipeline.quantize.products import product, subtract_product
from pipeline.quantize.solved import energy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _lost(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def test_products_are_as_exact_as_the_library_s():
    device = torch.device("cuda")
    assert solver_backend(device) == "triton"
    weight, hessian = (t.to(device) for t in problem(fresh(), 3, 150, 300))
    exact = weight.double() @ hessian.double()
    with full_float32():
        usual = _lost(torch.bmm(weight, hessian), exact)
        assert _lost(product(weight, hessian), exact) < 2 * usual + 1e-7
        assert (
            _lost(
                product(hessian.mT[:, 7:], hessian), hessian.double().mT[:, 7:] @ hessian.double()
            )
            < 2 * usual + 1e-7
        )
        total = weight.clone()
        subtract_product(total[..., :100], weight[..., 100:], hessian[:, 100:, :100])
        want = (
            weight.double()[..., :100]
            - weight.double()[..., 100:] @ hessian.double()[:, 100:, :100]
        )
        assert _lost(total[..., :100], want) < 2 * usual + 1e-7
        assert torch.equal(total[..., 100:], weight[..., 100:])
        found = energy(weight, hessian).double()
    assert float((found / (exact * weight).sum((1, 2)) - 1).abs().max()) < 1e-5


def test_products_have_the_same_bytes_every_time():
    weight, hessian = (t.cuda() for t in problem(fresh(), 3, 150, 300))
    with full_float32():
        assert torch.equal(product(weight, hessian), product(weight, hessian))
        assert torch.equal(product(weight, hessian)[1:], product(weight[1:], hessian[1:]))
        assert torch.equal(energy(weight, hessian), energy(weight, hessian))
