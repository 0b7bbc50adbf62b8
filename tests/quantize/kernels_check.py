"""The solver's Triton kernels beside the torch code they stand for; run under the interpreter.

TRITON_INTERPRET=1 python tests/quantize/kernels_check.py
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from problems import fresh, problem
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

from pipeline.quantize import triton_products
from pipeline.quantize.backend import KERNELS
from pipeline.quantize.factor import factorise
from pipeline.quantize.grid import encode, fit_grid
from pipeline.quantize.refine import _normal_equations, descend, refit_scales
from pipeline.quantize.routed import Runs, Turns
from pipeline.quantize.sweep import Slabs, sweep
from pipeline.quantize.tensor import AffineScheme


def _dot(_self, a, b, total, _precision, _imprecise):
    """The interpreter multiplies the bits of bfloat16 as integers."""

    def number(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    product = np.matmul(number(a), number(b), dtype=total.data.dtype)
    return TensorHandle(product + total.data, total.dtype.scalar)


def tests_of_their_own():
    for name in KERNELS:
        importlib.import_module(f"pipeline.quantize.{name}").self_test(torch.device("cpu"))
        print(name)


def columns():
    for experts, out, width, group, symmetric in (
        (2, 35, 24, 8, True),
        (1, 9, 140, -1, False),
        (1, 20, 24, 8, True),  # one matrix of several groups: its grid is a transposed view
    ):
        weight, hessian = problem(fresh(), experts, out, width)
        grid = fit_grid(weight, AffineScheme(4, group, symmetric), search=True)
        codes = encode(weight, grid, 4)
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
        factored = factorise(hessian, order, 0.1)
        plain, kernels = (Slabs(order, grid, backend) for backend in ("torch", "triton"))
        for stored in (weight, codes):
            assert torch.equal(plain.take(stored), kernels.take(stored))
            assert torch.equal(kernels.put(kernels.take(stored)), stored)
        dense, taken = plain.take(weight), plain.take(codes)
        assert torch.equal(plain.residual(dense, taken), kernels.residual(dense, taken))
        swept, found = (
            sweep(weight, factored, grid, bits=4, backend=backend)
            for backend in ("torch", "triton")
        )
        # Sums differ in the last bit, hence rarely a code and what follows from it.
        assert float((swept == found).float().mean()) > 0.95
        lowered, found = (
            descend(weight, swept, factored, grid, bits=4, backend=backend)
            for backend in ("torch", "triton")
        )
        assert float((lowered == found).float().mean()) > 0.95
        print(experts, out, width)


def products():
    weight, hessian = problem(fresh(), 2, 35, 140)
    exact = weight.double() @ hessian.double()
    found = triton_products.product(weight, hessian)
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    total = weight.clone()
    triton_products.product(
        weight[..., 40:], hessian[:, 40:, :40], base=total[..., :40], alpha=-1, out=total[..., :40]
    )
    exact_part = weight.double()[..., 40:] @ hessian.double()[:, 40:, :40]
    torch.testing.assert_close(
        total[..., :40].double(), weight[..., :40] - exact_part, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(total[..., 40:], weight[..., 40:])
    whole = (exact * weight).sum((1, 2))
    torch.testing.assert_close(
        triton_products.energy(weight, hessian).double(), whole, rtol=1e-5, atol=0
    )
    print("products")


def scales():
    for group, bits, symmetric in ((32, 4, True), (64, 8, False)):
        weight, hessian = problem(fresh(), 2, 70, 128)
        grid = fit_grid(weight, AffineScheme(bits, group, symmetric), search=True)
        codes, added = encode(weight, grid, bits), torch.rand(2)
        args = weight, codes, hessian, added, grid.zeros
        exact = _float64(*args)
        for backend in ("torch", "triton"):
            for part, right in zip(_normal_equations(*args, backend), exact, strict=True):
                assert float((part - right).norm() / right.norm()) < 1e-6
        plain, found = (
            refit_scales(weight, codes, hessian, added, grid, backend=backend)
            for backend in ("torch", "triton")
        )
        assert float((plain.scales == found.scales).float().mean()) > 0.98
        print(group, bits)


def _float64(weight, codes, hessian, added, zeros):
    groups = zeros.shape[-1]
    centred = codes.double() - zeros.double().repeat_interleave(codes.shape[-1] // groups, -1)
    split = torch.zeros(*zeros.shape, *centred.shape[-1:], dtype=torch.float64)
    for group, part in enumerate(centred.chunk(groups, -1)):
        width = part.shape[-1]
        split[:, :, group, group * width : (group + 1) * width] = part
    damped = hessian.double() + torch.diag_embed(added.double().unsqueeze(1).expand(-1, 128))
    along = split @ damped.unsqueeze(1)
    return along @ split.mT, (along @ weight.double().unsqueeze(-1)).squeeze(-1)


def sums():
    for chunk in (7, 64, 1000):
        tokens = torch.randint(0, 20, (150,))
        values, weights = torch.randn(150, 33).bfloat16(), torch.rand(150)
        found = []
        for sums in (Turns.of(tokens, chunk), Runs.of(tokens, chunk)):
            total = torch.zeros(len(sums.rows), 33)
            for number, start in enumerate(range(0, 150, chunk)):
                part = slice(start, start + chunk)
                sums.add(total, number, start, values[part], weights[part])
            found.append((sums.rows, total))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    assert len(Runs.of(torch.zeros(0, dtype=torch.int64), 8).rows) == 0
    print("sums")


if __name__ == "__main__":
    torch.set_num_threads(1)
    InterpreterBuilder.create_dot = _dot
    options = interpreter_builder.options  # which know only what it can do exactly
    known = (*options.allowed_dot_input_precisions, "bf16x6")
    interpreter_builder.options = replace(options, allowed_dot_input_precisions=known)
    tests_of_their_own()
    columns()
    products()
    scales()
    sums()
