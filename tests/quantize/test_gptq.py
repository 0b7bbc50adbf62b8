import pytest
import torch
from problems import fresh, problem
from reference_gptq import reference_gptq, reference_loss

from pipeline.errors import NumericalError
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ, RTN = QUANTIZERS["gptq"], QUANTIZERS["rtn"]
G64 = AffineScheme(4, 64, symmetric=True)


def against_reference(weight, hessian, scheme, options, rows=None):
    """Fraction of other codes, and relative difference of the loss, over the batch.

    `rows`: how many rows the reference solves (each is solved for itself); all by default.
    """
    solved = GPTQ.quantize(weight, hessian, scheme, options)
    other, ours, theirs = 0.0, 0.0, 0.0
    for e in range(len(weight)):
        dense, solution = weight[e, :rows], solved.quantized[e].rows(0, rows or weight.shape[1])
        scales, zeros = solution.arrays["scales"], solution.arrays["zeros"]
        codes = reference_gptq(
            dense,
            hessian[e],
            scales=scales,
            zeros=zeros,
            bits=scheme.bits,
            damping=options.damping,
            activation_order=options.activation_order,
        )
        reference = QuantizedTensor(scheme, {"codes": codes, "scales": scales, "zeros": zeros})
        other += float((codes != solution.arrays["codes"]).float().mean()) / len(weight)
        ours += reference_loss(dense, solution.dequantize(), hessian[e])
        theirs += reference_loss(dense, reference.dequantize(), hessian[e])
    return other, abs(ours / theirs - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_order", [True, False])
def test_equals_the_textbook(bits, group, symmetric, activation_order):
    weight, hessian = problem(fresh(), 8, 96, 128)
    options = SolverOptions(activation_order=activation_order, refinement_passes=0)
    scheme = AffineScheme(bits, group, symmetric)
    other, loss = against_reference(weight, hessian, scheme, options)
    # A tie that float32 breaks differently changes the rest of its row, so a code here and there
    # differs while the loss stays.
    assert other < 0.01
    assert loss < 1e-3


@pytest.mark.parametrize(("out", "columns"), [(512, 2048), (2048, 512)])
def test_equals_the_textbook_at_full_size(out, columns):
    weight, hessian = problem(fresh(), 1, out, columns, tokens=1024)
    scheme = AffineScheme(4, 128, symmetric=True)
    options = SolverOptions(refinement_passes=0)
    other, loss = against_reference(weight, hessian, scheme, options, rows=96)
    assert other < 0.01
    assert loss < 1e-3


@pytest.mark.parametrize("scheme", [G64, AffineScheme(4, 32, symmetric=False)], ids=str)
def test_loses_less_than_rounding_and_says_how_much(scheme):
    weight, hessian = problem(fresh(), 3, 64, 128)
    solved = GPTQ.quantize(weight, hessian, scheme, SolverOptions())
    rounded = RTN.quantize(weight, hessian, scheme, SolverOptions())
    assert solved.loss.shape == (3,)
    assert solved.loss.dtype == torch.float32
    assert bool((solved.loss < 0.8 * rounded.loss).all())
    for result in (solved, rounded):
        dense = result.quantized.dequantize()
        expected = [reference_loss(weight[e], dense[e], hessian[e]) for e in range(3)]
        assert torch.allclose(result.loss, torch.tensor(expected), rtol=1e-3)


def test_a_matrix_does_not_depend_on_its_batch():
    weight, hessian = problem(fresh(), 7, 48, 256)
    whole = GPTQ.quantize(weight, hessian, G64, SolverOptions()).quantized
    for part in (slice(0, 1), slice(2, 5), slice(6, 7)):
        alone = GPTQ.quantize(weight[part], hessian[part], G64, SolverOptions()).quantized
        for name, array in alone.arrays.items():
            assert torch.equal(array, whole.arrays[name][part])


def test_one_matrix_without_a_batch_dimension():
    weight, hessian = problem(fresh(), 1, 32, 128)
    for quantizer in (GPTQ, RTN):
        batch = quantizer.quantize(weight, hessian, G64, SolverOptions())
        single = quantizer.quantize(weight[0], hessian[0], G64, SolverOptions())
        assert single.quantized.shape == (32, 128)
        assert single.loss.shape == ()
        assert torch.equal(single.quantized.arrays["codes"], batch.quantized.arrays["codes"][0])


def test_bfloat16_weights_and_arguments_left_alone():
    weight, hessian = problem(fresh(), 2, 32, 128)
    weight = weight.bfloat16()
    kept = weight.clone(), hessian.clone()
    low = GPTQ.quantize(weight, hessian, G64, SolverOptions()).quantized
    full = GPTQ.quantize(weight.float(), hessian, G64, SolverOptions()).quantized
    assert torch.equal(low.arrays["codes"], full.arrays["codes"])
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_columns_never_excited_are_rounded_to_nearest():
    weight, hessian = problem(fresh(), 2, 32, 128)
    dead = torch.tensor([3, 64, 127])
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    solved = GPTQ.quantize(weight, hessian, G64, SolverOptions()).quantized
    step = solved.arrays["scales"].float().repeat_interleave(64, -1)[..., dead]
    error = (weight - solved.dequantize())[..., dead].abs() / step
    codes = solved.arrays["codes"][..., dead]
    inside = codes.gt(0) & codes.lt(15)
    assert bool(inside.any())
    assert float(error[inside].max()) <= 0.5001


def test_no_statistics_at_all_is_rounding():
    weight, hessian = problem(fresh(), 2, 32, 128)
    hessian[1] = 0
    solved = GPTQ.quantize(weight, hessian, G64, SolverOptions(refinement_passes=0))
    rounded = RTN.quantize(weight, None, G64, SolverOptions())
    assert torch.equal(solved.quantized.arrays["codes"][1], rounded.quantized.arrays["codes"][1])
    assert float(solved.loss[0]) > 0
    assert float(solved.loss[1]) == 0


def test_fewer_tokens_than_columns():
    weight, hessian = problem(fresh(), 2, 32, 256, tokens=40)
    solved = GPTQ.quantize(weight, hessian, G64, SolverOptions())
    rounded = RTN.quantize(weight, hessian, G64, SolverOptions())
    assert bool((solved.loss < 0.5 * rounded.loss).all())


def test_scale_of_the_hessian_does_not_matter():
    weight, hessian = problem(fresh(), 2, 32, 128)
    one = GPTQ.quantize(weight, hessian, G64, SolverOptions())
    other = GPTQ.quantize(weight, hessian * 1024, G64, SolverOptions())
    assert torch.equal(one.quantized.arrays["codes"], other.quantized.arrays["codes"])


def test_damping_grows_only_where_it_must():
    generator = fresh()
    weight, hessian = problem(generator, 3, 32, 128)
    # Not a second moment at all: a negative eigenvalue that small damping does not lift.
    direction = torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0)
    hessian[1] -= 8 * hessian[1].diagonal().mean() * torch.outer(direction, direction)
    solved = GPTQ.quantize(weight, hessian, G64, SolverOptions()).quantized
    others = GPTQ.quantize(weight[::2], hessian[::2], G64, SolverOptions()).quantized
    assert torch.equal(solved.arrays["codes"][::2], others.arrays["codes"])
    damping = next(d for d in (0.1, 1.0, 10.0, 100.0) if lifted(hessian[1], d))
    alone = GPTQ.quantize(weight[1], hessian[1], G64, SolverOptions(damping=damping)).quantized
    same = (alone.arrays["codes"] == solved.arrays["codes"][1]).float().mean()
    assert float(same) > 0.9  # the scale search saw another damping


def lifted(hessian, damping):
    """Whether the damped matrix has a Cholesky factor."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    return int(torch.linalg.cholesky_ex(damped).info) == 0


def test_a_hopeless_hessian_is_named():
    weight, hessian = problem(fresh(), 4, 16, 64)
    hessian[2, 5, 5] = float("nan")
    with pytest.raises(NumericalError, match="matrix 2 "):
        GPTQ.quantize(weight, hessian, AffineScheme(4, 32, True), SolverOptions())


def test_arguments_that_do_not_fit():
    weight, hessian = problem(fresh(), 2, 16, 64)
    with pytest.raises(ValueError, match="Hessian"):
        GPTQ.quantize(weight, None, G64, SolverOptions())
    with pytest.raises(ValueError, match=r"expected \(2, 64, 64\)"):
        GPTQ.quantize(weight, hessian[:1], G64, SolverOptions())
    with pytest.raises(ValueError, match="does not divide"):
        GPTQ.quantize(weight, hessian, AffineScheme(4, 48, True), SolverOptions())
    with pytest.raises(ValueError, match="damping"):
        SolverOptions(damping=0.0)


def test_reduced_precision_products_are_switched_off_and_on_again():
    weight, hessian = problem(fresh(), 2, 32, 128)
    plain = GPTQ.quantize(weight, hessian, G64, SolverOptions())
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        solved = GPTQ.quantize(weight, hessian, G64, SolverOptions())
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(solved.quantized.arrays["codes"], plain.quantized.arrays["codes"])
    assert torch.equal(solved.loss, plain.loss)


def test_quantisers_are_found_by_name():
    assert {"gptq", "rtn"} <= set(QUANTIZERS)
    assert GPTQ.needs_hessian
    assert not RTN.needs_hessian
