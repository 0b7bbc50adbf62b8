"""A second storage format is one new file: nothing else is told of it."""

import pytest
import torch
from layout import four_bit, write_model
from support import toy_format

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

CONFIG = {"model_type": "qwen3_next", "quantization_config": {"quant_method": "toy", "bits": 4}}


def random_matrices(count):
    arrays = {
        "codes": torch.randint(0, 16, (count, 8, 64), dtype=torch.uint8),
        "scales": torch.rand(count, 8, 2).half() + 0.01,
        "zeros": torch.randint(1, 16, (count, 8, 2), dtype=torch.uint8),
    }
    return QuantizedTensor(AffineScheme(4, 32, False), arrays)


def write_toy(path, matrices):
    tensors = four_bit("other.weight", torch.randn(8, 64)) | {"norm.weight": torch.randn(8)}
    for i in range(matrices.shape[0]):
        tensors |= toy_format.toy_parts(f"m.{i}", matrices[i])
    return write_model(path, {"model.safetensors": tensors}, CONFIG)


def test_a_registered_format_is_read(tmp_path, monkeypatch):
    matrices = random_matrices(3)
    path = write_toy(tmp_path, matrices)
    with pytest.raises(CheckpointError, match="no weight of a known format"):
        Checkpoint.open(path)
    toy_format.register(monkeypatch)
    checkpoint = Checkpoint.open(path)
    names = [f"m.{i}.weight" for i in range(3)]
    assert set(checkpoint.weights) == {*names, "other.weight", "norm.weight"}
    assert torch.equal(checkpoint.load_stack(names), matrices.dequantize(torch.float16))
    got = checkpoint.load_quantized(names)
    assert got.scheme == matrices.scheme
    assert all(torch.equal(got.arrays[k], v) for k, v in matrices.arrays.items())
    assert checkpoint.is_packed("m.0.weight") and not checkpoint.convertible("m.0.weight")
    assert checkpoint.problems(names) == []
    assert "toy 4 bits" in checkpoint.describe().formats


def test_what_can_only_be_decoded(tmp_path, monkeypatch):
    toy_format.register(monkeypatch)
    checkpoint = Checkpoint.open(write_toy(tmp_path, random_matrices(1)))
    for name, form in (("other.weight", "nf4"), ("norm.weight", "dense")):
        assert checkpoint.convertible(name) and not checkpoint.is_packed(name)
        with pytest.raises(CheckpointError, match=f"{name} is stored as {form}, which can only"):
            checkpoint.load_quantized([name])
    with pytest.raises(CheckpointError, match=r"other\.weight is not laid out as m\.0\.weight"):
        checkpoint.load_quantized(["m.0.weight", "other.weight"])
