"""Block FP8: against a decoder written from the type's description, element by element."""

import numpy as np
import pytest
import torch
from layout import write_model
from support.variants import fp8_parts

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NumericalError

CONFIG = {
    "model_type": "qwen3_next",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def e4m3(bits: np.ndarray) -> np.ndarray:
    """OCP 8-bit floating point, E4M3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no Inf."""
    bits = bits.astype(np.int64)
    sign = np.where(bits >> 7, -1.0, 1.0)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = sign * np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)
    return np.where(bits & 127 == 127, np.nan, value)


def expected(tensors, module, height=128, width=128):
    codes = e4m3(tensors[f"{module}.weight"].view(torch.uint8).numpy())
    scales = tensors[f"{module}.weight_scale_inv"].float().numpy()
    out = np.empty(codes.shape)
    for (o, i), value in np.ndenumerate(codes):
        out[o, i] = np.float32(value) * scales[o // height, i // width]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("shape", [(256, 128), (130, 300), (5, 129), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_decoder(tmp_path, shape, dtype):
    tensors = {"norm.weight": torch.randn(8, dtype=torch.bfloat16)}
    for i in range(3):
        parts = fp8_parts(f"m.{i}", torch.randn(shape) * 10.0 ** (i - 1))
        parts[f"m.{i}.weight_scale_inv"] = parts[f"m.{i}.weight_scale_inv"].to(dtype)
        tensors |= parts
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}, CONFIG))
    stack = checkpoint.load_stack([f"m.{i}.weight" for i in range(3)])
    assert stack.dtype == torch.bfloat16 and stack.shape == (3, *shape)
    for i in range(3):
        assert torch.equal(stack[i], expected(tensors, f"m.{i}").bfloat16())
    assert checkpoint.convertible("m.0.weight") and not checkpoint.is_packed("m.0.weight")
    assert checkpoint.problems([f"m.{i}.weight" for i in range(3)]) == []
    summary = checkpoint.describe()
    assert summary.formats["fp8"].count == 3 and summary.quant_method == "fp8"


def test_every_code(tmp_path):
    """All 254 finite codes, and a block that is not square."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    tensors = {
        "m.weight": codes.view(torch.float8_e4m3fn).reshape(2, 127),
        "m.weight_scale_inv": torch.rand(2, 4) + 0.1,
    }
    config = {**CONFIG, "quantization_config": {"weight_block_size": [1, 32]}}
    path = write_model(tmp_path, {"model.safetensors": tensors}, config)
    got = Checkpoint.open(path).load("m.weight")
    assert torch.equal(got, expected(tensors, "m", 1, 32).bfloat16())


def _refused(tmp_path, change, config=CONFIG):
    tensors = fp8_parts("m.0", torch.randn(200, 130)) | fp8_parts("m.1", torch.randn(8, 8))
    change(tensors)
    path = write_model(tmp_path, {"model.safetensors": tensors}, config)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_malformed(tmp_path):
    def put(name, value):
        return lambda tensors: tensors.update({name: value})

    scale, weight = "m.0.weight_scale_inv", "m.0.weight"
    said = _refused(tmp_path / "a", lambda t: t.pop(scale))
    assert "m.0 (model.safetensors) has no weight_scale_inv" in said
    said = _refused(tmp_path / "b", lambda t: t.pop(weight))
    assert "m.0 (model.safetensors) has no weight;" in said
    said = _refused(tmp_path / "c", put(scale, torch.rand(1, 2)))
    assert f"{scale} is F32 [1, 2]; F32 or BF16 [2, 2] was expected" in said
    said = _refused(tmp_path / "d", put(scale, torch.ones(2, 2, dtype=torch.int32)))
    assert f"{scale} is I32" in said
    said = _refused(tmp_path / "e", put(weight, torch.ones(200, 130)))
    assert f"{weight} is F32 [200, 130]; an F8_E4M3 matrix" in said
    for size in ([128], "128", [0, 128], [True, 128], 128):
        config = {**CONFIG, "quantization_config": {"weight_block_size": size}}
        said = _refused(tmp_path / f"f{size}", lambda t: None, config)
        assert "weight_block_size is" in said


def test_nan_is_named(tmp_path):
    for part, bad in (("weight", "codes"), ("weight_scale_inv", "scales")):
        tensors = fp8_parts("m.0", torch.randn(8, 8)) | fp8_parts("m.1", torch.randn(8, 8))
        values = tensors[f"m.1.{part}"]
        if bad == "codes":
            values.view(torch.uint8)[3, 4] = 127
        else:
            values[0, 0] = float("nan")
        path = write_model(tmp_path / bad, {"model.safetensors": tensors}, CONFIG)
        checkpoint = Checkpoint.open(path)
        with pytest.raises(NumericalError, match=r"m\.1\.weight: .* are NaN"):
            checkpoint.load_stack(["m.0.weight", "m.1.weight"])
        assert len(checkpoint.problems(["m.0.weight", "m.1.weight"])) == 1
