"""Every back end against the dense product of what it was given, for every kind of scheme."""

import pytest
import torch

from pipeline.hybrid.backends import BACKENDS, choose
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def random_quantized(count, rows, columns, *, bits, group, symmetric, bf16_scales=True):
    scheme = AffineScheme(bits, group, symmetric)
    groups = columns // scheme.group(columns)
    scales = torch.rand(count, rows, groups) * 0.02 + 0.001
    if symmetric:  # such a group may be turned around
        scales = torch.where(torch.rand_like(scales) < 0.5, -scales, scales)
    scales = scales.bfloat16().half() if bf16_scales else scales.half()
    zeros = torch.randint(1, 2**bits, (count, rows, groups), dtype=torch.uint8)
    arrays = {
        "codes": torch.randint(0, 2**bits, (count, rows, columns), dtype=torch.uint8),
        "scales": scales,
        "zeros": torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
    }
    return QuantizedTensor(scheme, arrays)


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


# bits, group, rows, columns, the back end that must take it on a CPU
KINDS = [
    (4, 128, 64, 256, "int4pack"),
    (4, 32, 48, 96, "int4pack"),
    (4, 64, 80, 192, "int4pack"),
    (4, -1, 32, 384, "int4pack"),
    (4, 512, 16, 1024, "int4pack"),
    (3, 128, 64, 256, "int4pack"),
    (2, 64, 64, 128, "int4pack"),
    (8, 128, 64, 256, "int4halves"),
    (8, 32, 48, 96, "int4halves"),
    (8, -1, 32, 384, "int4halves"),
    (4, 16, 64, 128, "dequantize"),
    (4, 128, 40, 256, "dequantize"),
    (4, -1, 64, 48, "dequantize"),
    (8, 16, 64, 128, "dequantize"),
    (8, -1, 24, 81, "dequantize"),
    (4, -1, 24, 81, "dequantize"),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group", "rows", "columns", "name"), KINDS)
def test_product(*, bits, group, rows, columns, name, symmetric):
    quantized = random_quantized(3, rows, columns, bits=bits, group=group, symmetric=symmetric)
    backend = choose(quantized.scheme, rows, columns, CPU)
    assert backend.name == name
    weight = quantized.dequantize().double()
    exact = backend.pack(quantized, torch.float32)
    fast = backend.pack(quantized, torch.bfloat16)
    assert not exact.rounded_scales and not fast.rounded_scales
    for tokens in (1, 2, 7, 33):
        # inputs with a mean: an offset that is a little off for a whole group would show
        x = (torch.randn(tokens, columns) + 1).bfloat16()
        for index in (2, 0):
            want = x.double() @ weight[index].T
            got = exact.multiply(index, x.float())
            assert got.dtype == torch.float32 and error(got, want) < 2e-6
            got = fast.multiply(index, x)
            assert got.dtype == torch.bfloat16
            # one rounding of bfloat16 is at most 0.0039 of a number, and two meet in int4halves
            assert error(got, want) < 0.006


@pytest.mark.parametrize(("bits", "name"), [(4, "int4pack"), (8, "int4halves")])
def test_foreign_scales_are_rounded_and_reported(bits, name):
    quantized = random_quantized(1, 32, 128, bits=bits, group=64, symmetric=True, bf16_scales=False)
    backend = BACKENDS[name]
    assert not backend.pack(quantized, torch.float32).rounded_scales
    packed = backend.pack(quantized, torch.bfloat16)
    assert packed.rounded_scales
    x = torch.randn(5, 128).bfloat16()
    want = x.double() @ quantized.dequantize()[0].double().T
    assert error(packed.multiply(0, x), want) < 0.006


@pytest.mark.parametrize(("bits", "group", "rows", "columns", "name"), KINDS)
def test_experts_are_held_in_their_bits(bits, group, rows, columns, name):
    quantized = random_quantized(4, rows, columns, bits=bits, group=group, symmetric=True)
    packed = choose(quantized.scheme, rows, columns, CPU).pack(quantized, torch.bfloat16)
    codes = 4 * rows * columns * (1 if bits > 4 or columns % 2 else 0.5)
    groups = columns // quantized.scheme.group(columns)
    grouped = 4 * rows * max(groups, -(-columns // 32)) * 4 * (2 if bits == 8 else 1)
    assert codes < packed.nbytes <= codes + grouped


def test_large_scales_do_not_overflow():
    """16 times a float16 scale leaves the range of float16, not that of bfloat16."""
    quantized = random_quantized(1, 16, 32, bits=8, group=32, symmetric=True)
    quantized.arrays["scales"].fill_(32768.0)
    x = torch.ones(1, 32).bfloat16()
    y = BACKENDS["int4halves"].pack(quantized, torch.bfloat16).multiply(0, x)
    assert torch.isfinite(y).all()


def test_kernel_back_ends_stay_on_the_cpu():
    assert choose(AffineScheme(4, 128, True), 64, 256, torch.device("cuda")).name == "dequantize"
