"""Numbers that no solver can use: found, named, counted; never a bad tensor under a good name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.damage import edit_tensors
from support.recipes import MICRO

from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import NumericalError
from pipeline.models import ARCHITECTURES
from pipeline.quantize.correction import corrected
from pipeline.quantize.factor import damped_factor
from pipeline.quantize.grid import SMALLEST_SCALE
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.rows import row_order
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.sensitivity import Sensitivity

NAN, INF = float("nan"), float("inf")
SCHEME = AffineScheme(4, 32, True)


def _moments(experts=3, columns=64):
    x = torch.randn(experts, 4 * columns, columns)
    return x.transpose(1, 2) @ x / (4 * columns)


def _hopeless(columns=64):
    """Symmetric with so negative an eigenvalue that no step of damping lifts it."""
    bad = _moments(1, columns)[0]
    bad[0, 1] = bad[1, 0] = 1e9 * bad.diagonal().mean()
    return bad


@pytest.mark.parametrize("bad", [NAN, INF, None])
def test_a_hessian_that_cannot_be_factorised_is_named(bad):
    """In the solver and in error correction alike."""
    weight, hessian = torch.randn(3, 16, 64), _moments()
    if bad is None:
        hessian[1] = _hopeless()
    else:
        hessian[1, 5, 5] = bad
    for attempt in (
        lambda: corrected(weight, hessian, torch.randn(3, 64, 64)),
        lambda: QUANTIZERS["gptq"].quantize(weight, hessian, SCHEME, SolverOptions()),
    ):
        with pytest.raises(NumericalError, match="matrix 1 of the batch has no Cholesky factor"):
            attempt()


def test_a_target_that_overflows_is_named():
    weight = torch.randn(3, 16, 64)
    weight[2] *= 1e30
    with pytest.raises(NumericalError, match=r"matrix 2 of the batch .* NaN or Inf"):
        corrected(weight, _moments(), torch.full((3, 64, 64), 1e20))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_sensitivity_that_cannot_be_factorised_is_named(bad):
    sensitivity = _moments(1, 16)[0]
    sensitivity[3, 3] = bad
    with pytest.raises(NumericalError, match=r"the sensitivity .* no Cholesky factor"):
        row_order(sensitivity)


def test_outputs_that_nobody_reads_are_solved_all_the_same():
    weight, hessian = torch.randn(2, 32, 64), _moments(2)
    plain = QUANTIZERS["gptq"].quantize(weight, hessian, SCHEME, SolverOptions())
    unread = QUANTIZERS["gptq"].quantize(
        weight, hessian, SCHEME, SolverOptions(), row_order(torch.zeros(32, 32))
    )
    assert torch.equal(plain.quantized.arrays["codes"], unread.quantized.arrays["codes"])


def test_damping_that_had_to_grow_is_counted():
    weight, hessian = torch.randn(3, 16, 64), _moments()
    assert QUANTIZERS["gptq"].quantize(weight, hessian, SCHEME, SolverOptions()).raised == 0
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    hessian[1] -= 8 * hessian[1].diagonal().mean() * torch.outer(direction, direction)
    solved = QUANTIZERS["gptq"].quantize(weight, hessian, SCHEME, SolverOptions())
    assert solved.raised == 1
    assert bool(torch.isfinite(solved.quantized.dequantize()).all())
    added = torch.full((3,), 0.01)
    damped = hessian + 0.01 * torch.eye(64)
    factor, raised = damped_factor(damped, added, "it")
    assert raised.tolist() == [False, True, False]
    torch.testing.assert_close(factor @ factor.mT, damped, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        damped, hessian + added.view(-1, 1, 1) * torch.eye(64), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_odd_matrices_are_solved_and_counted(method):
    """Zero rows, constant columns, weights below the smallest scale: finite, in range, counted."""
    weight, hessian = torch.randn(4, 16, 64), _moments(4)
    weight[0, 3] = 0
    weight[1, :, 7] = 0.25
    weight[2, 5] = 1e-30  # denormal in bfloat16 after a division or two
    hessian[3, 9] = hessian[3, :, 9] = 0
    solved = QUANTIZERS[method].quantize(weight, hessian, SCHEME, SolverOptions())
    arrays, dense = solved.quantized.arrays, solved.quantized.dequantize()
    assert bool(torch.isfinite(dense).all() & torch.isfinite(solved.loss).all())
    assert float(arrays["scales"].abs().min()) >= SMALLEST_SCALE
    assert float(dense[0, 3].abs().max()) == 0
    assert float(dense[2, 5].abs().max()) <= 8 * SMALLEST_SCALE
    assert solved.smallest_scales == 4  # two groups of each of the two rows


def test_a_head_that_overflows_is_named(monkeypatch):
    checkpoint = Checkpoint.open(MICRO)
    load = checkpoint.load

    def huge(name, *rest):
        return load(name, *rest) * (1e25 if "lm_head" in name else 1)

    monkeypatch.setattr(checkpoint, "load", huge)
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    with pytest.raises(NumericalError, match=r"the head cannot be weighed: .* lm_head.weight"):
        Sensitivity(checkpoint, architecture, torch.device("cpu"))


def test_zeros_in_a_source_are_counted_in_the_report(project, tmp_path):
    """From the checkpoint to report.json; an expert of zeros is a tensor like another."""

    source = shutil.copytree(MICRO, tmp_path / "source")
    part = "layers.1.mlp.experts.3.down_proj.weight.nested_absmax"
    edit_tensors(source, lambda _name, tensor: tensor * 0, part)
    edit_tensors(source, lambda _name, tensor: tensor * 0, part.replace("nested_", "nested_o"))
    project.change(source={"model": str(source)}).run()
    layers = json.loads((project.output / "conversion.json").read_text())["layers"]
    assert [layer["raised_damping"] for layer in layers] == [0, 0]
    report = project.report()["experts"]
    assert report["raised_damping"] == 0
    assert report["smallest_scales"] == sum(layer["smallest_scales"] for layer in layers)
    tensors = load_file(project.output / "model-experts-layer-001.safetensors")
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name
