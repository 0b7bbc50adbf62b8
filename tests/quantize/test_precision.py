"""The process's precision of float32 products, and the solver's own."""

import torch

from pipeline.quantize.precision import float32_products, full_float32


def test_what_is_told_is_the_processs_while_a_solver_is_at_work():
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        with full_float32(), full_float32():
            assert (cuda.fp32_precision, cpu.fp32_precision) == ("ieee", "ieee")
            assert float32_products() == {"cuda": "tf32", "cpu": "bf16"}
        assert float32_products() == {"cuda": "tf32", "cpu": "bf16"}
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
