"""bitsandbytes formats: against bitsandbytes matrix by matrix, and against the second reader."""

import json
import re
from pathlib import Path

import bitsandbytes.functional as bnb
import independent
import numpy as np
import pytest
import torch
from layout import eight_bit, four_bit, write_model

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NumericalError

MICRO = Path(__file__).parents[1] / "models" / "micro-nf4"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def direct(tensors, name):
    """bitsandbytes' own decoding of one matrix, its rows laid flat.

    Flat, because with the matrix's shape the CPU code of 0.50 mixes up the scales of rows that
    are not whole blocks; a shape of one row is always right.
    """
    parts = {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    shape = state.shape
    if shape[-1] % state.blocksize:
        state.shape = torch.Size((1, shape.numel()))
    # Some sizes go through torch.compile, 12 s for each shape; eagerly the code is the same.
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(tensors[name], state).reshape(shape)


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stack_is_bit_identical(tmp_path, quant_type, double, block, dtype):
    """A stack decoded at once equals each matrix decoded alone, on sizes easy and awkward."""
    for size, shape in enumerate([(64, 256), (24, 100), (5, 3), (1, 192), (48, 130)]):
        tensors = {}
        names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(3)]
        for i, name in enumerate(names):
            weight = torch.randn(shape, dtype=torch.float32).mul(10.0 ** (i - 1)).to(dtype)
            tensors |= four_bit(name, weight, quant_type, block, double)
        path = write_model(tmp_path / str(size), {"model.safetensors": tensors})
        checkpoint = Checkpoint.open(path)
        stack = checkpoint.load_stack(names)
        assert stack.dtype == dtype
        assert stack.shape == (3, *shape)
        plain = independent.read_files(path)
        for i, name in enumerate(names):
            expected = rounded(independent.dense_of(plain, name), dtype)
            assert torch.equal(stack[i], expected)
            assert torch.equal(checkpoint.load(name), stack[i])
            assert torch.equal(stack[i], direct(tensors, name))


def test_rows_shorter_than_a_block(tmp_path):
    """512 columns in blocks of 1024: two rows share a scale, on every CPU."""
    weight = torch.randn(8, 512)
    tensors = four_bit("w.weight", weight, "nf4", 1024, False)
    path = write_model(tmp_path, {"model.safetensors": tensors})
    error = (Checkpoint.open(path).load("w.weight") - weight).norm() / weight.norm()
    assert error < 0.12  # NF4 on Gaussian blocks of 1024: 0.104; wrong scales: 0.15


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage(tmp_path, storage):
    weight = torch.randn(32, 128, dtype=torch.bfloat16)
    tensors = four_bit("w.weight", weight, storage=storage)
    assert tensors["w.weight"].dtype == storage
    path = write_model(tmp_path, {"model.safetensors": tensors})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.weights["w.weight"].elements == weight.numel()
    plain = four_bit("w.weight", weight)
    assert torch.equal(checkpoint.load("w.weight"), direct(plain, "w.weight"))


def test_stacked_3d_experts_in_4_bit(tmp_path):
    weight = torch.randn(4, 32, 64, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    path = write_model(tmp_path, {"model.safetensors": four_bit(name, weight)})
    loaded = Checkpoint.open(path).load(name)
    expected = independent.dense_of(independent.read_files(path), name)
    assert torch.equal(loaded, rounded(expected, torch.bfloat16))


def test_int8(tmp_path):
    weights = [torch.randn(48, 96) * 10.0**i for i in range(3)]
    tensors = {}
    for i, weight in enumerate(weights):
        tensors |= eight_bit(f"layers.{i}.proj", weight)
    path = write_model(tmp_path, {"model.safetensors": tensors})
    checkpoint = Checkpoint.open(path)
    names = [f"layers.{i}.proj.weight" for i in range(3)]
    stack = checkpoint.load_stack(names)
    assert stack.dtype == torch.bfloat16  # what config.json computes in
    plain = independent.read_files(path)
    for i, name in enumerate(names):
        own = bnb.int8_vectorwise_dequant(tensors[name], tensors[f"layers.{i}.proj.SCB"])
        assert torch.equal(stack[i], own.to(torch.bfloat16))
        expected = torch.from_numpy(independent.dense_of(plain, name)).float()
        loose = checkpoint.load(name, dtype=torch.float32)
        torch.testing.assert_close(loose, expected, rtol=1e-2, atol=0)
        assert (loose - weights[i]).abs().max() <= weights[i].abs().max() / 127


def test_int8_layouts_of_old_gpus_are_refused(tmp_path):
    tensors = eight_bit("proj", torch.randn(4, 8))
    tensors["proj.weight_format"].fill_(1)
    path = write_model(tmp_path, {"model.safetensors": tensors})
    with pytest.raises(CheckpointError, match=r"proj\.weight_format is 1"):
        Checkpoint.open(path).load("proj.weight")


def test_mixed_stack(tmp_path):
    """Experts of one layer may be stored in different ways."""
    weights = [torch.randn(64, 64, dtype=torch.bfloat16) for _ in range(5)]
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(5)]
    tensors = four_bit(names[0], weights[0])
    tensors |= {names[1]: weights[1]}
    tensors |= four_bit(names[2], weights[2], block=128, double=False)
    tensors |= four_bit(names[3], weights[3], "fp4")
    tensors |= eight_bit(names[4].removesuffix(".weight"), weights[4])
    path = write_model(tmp_path, {"model.safetensors": tensors})
    checkpoint = Checkpoint.open(path)
    stack = checkpoint.load_stack(names)
    for i, name in enumerate(names):
        assert torch.equal(stack[i], checkpoint.load(name))
        assert (stack[i] - weights[i]).float().norm() < 0.2 * weights[i].float().norm()
    assert torch.equal(stack[1], weights[1])
    summary = checkpoint.describe()
    assert set(summary.formats) == {"nf4", "nf4 double", "fp4 double", "int8", "dense BF16"}
    assert any("experts are stored in 5 ways" in text for text in summary.oddities)


def test_asked_dtype_only_rounds(tmp_path):
    tensors = four_bit("w.weight", torch.randn(16, 64, dtype=torch.bfloat16))
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    native = checkpoint.load("w.weight")
    assert torch.equal(checkpoint.load("w.weight", dtype=torch.float32), native.float())


def test_micro_model_against_second_reader():
    checkpoint = Checkpoint.open(MICRO)
    plain = independent.read_files(MICRO)
    for name, weight in checkpoint.weights.items():
        loaded = checkpoint.load(name)
        assert loaded.shape == weight.shape
        expected = rounded(independent.dense_of(plain, name), loaded.dtype)
        assert torch.equal(loaded, expected), name


def corrupt(tensors, part, change):
    tensors[part] = change(tensors[part].clone())
    return tensors


def state_with(**changes):
    def change(data):
        table = json.loads(bytes(data.numpy())) | changes
        return torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8)

    return change


STATE = "w.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (STATE, lambda t: t[:20], "malformed"),
        (STATE, state_with(shape=[32, 65]), "32, 65"),
        (STATE, state_with(shape="big"), "malformed"),
        (STATE, state_with(shape=[32, -64]), "malformed"),
        (STATE, state_with(blocksize=63), "blocksize is 63"),
        (STATE, state_with(blocksize=128), "absmax has 32 values"),
        (STATE, state_with(quant_type="fp4"), "quant_type is fp4"),
        (STATE, state_with(dtype="int8"), "malformed"),
        (STATE, state_with(nested_blocksize=16), "nested_absmax"),
        (STATE, state_with(nested_offset=float("nan")), "malformed"),
        ("w.weight.absmax", lambda t: t[:-1], "absmax has 31 values"),
        ("w.weight.nested_quant_map", lambda t: t[:-1], "nested_quant_map has 255"),
        ("w.weight.quant_map", lambda t: t.flip(0), "not the table of nf4"),
        ("w.weight", lambda t: t[:-1], "1,023 bytes"),
    ],
)
def test_malformed_states(tmp_path, part, change, message):
    tensors = corrupt(four_bit("w.weight", torch.randn(32, 64)), part, change)
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        checkpoint.load("w.weight")
    assert "w.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_states_can_be_checked_at_once(tmp_path):
    tensors = four_bit("a.weight", torch.randn(32, 64)) | four_bit("w.weight", torch.randn(32, 64))
    corrupt(tensors, STATE, lambda t: t[:20])
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    checkpoint.check_states(["a.weight"])
    with pytest.raises(CheckpointError, match=r"w\.weight\.quant_state"):
        checkpoint.check_states()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("double", [False, True])
def test_non_finite_scales(tmp_path, value, double):
    def change(scales):
        scales[-1] = value
        return scales

    part = "b.weight.nested_absmax" if double else "b.weight.absmax"
    tensors = four_bit("a.weight", torch.randn(32, 64), double=double)
    tensors |= four_bit("b.weight", torch.randn(32, 64), double=double)
    corrupt(tensors, part, change)
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    with pytest.raises(NumericalError, match=r"^b\.weight: .* block scales"):
        checkpoint.load_stack(["a.weight", "b.weight"])
    checkpoint.load("a.weight")


def test_scales_beyond_float16(tmp_path):
    """Finite in float32, Inf once decoded to the float16 that the quant_state asks for."""
    tensors = four_bit("w.weight", torch.randn(32, 64, dtype=torch.float16), double=False)
    corrupt(tensors, "w.weight.absmax", lambda t: t * 1e6)
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    with pytest.raises(NumericalError, match=r"w\.weight"):
        checkpoint.load("w.weight")


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_missing_part(tmp_path, part):
    tensors = four_bit("w.weight", torch.randn(32, 64))
    del tensors[f"w.weight.{part}"]
    path = write_model(tmp_path, {"model.safetensors": tensors})
    with pytest.raises(CheckpointError, match=rf"w\.weight .*has no {part}"):
        Checkpoint.open(path)


def test_missing_state_missing_matrix_unknown_type(tmp_path):
    tensors = four_bit("w.weight", torch.randn(32, 64))
    for drop, message in [(STATE, "has no quant_state"), ("w.weight", "has no weight")]:
        fewer = {k: v for k, v in tensors.items() if k != drop}
        path = write_model(tmp_path / drop, {"model.safetensors": fewer})
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)
    tensors["w.weight.quant_state.bitsandbytes__af4"] = tensors.pop(STATE)
    path = write_model(tmp_path / "kind", {"model.safetensors": tensors})
    with pytest.raises(CheckpointError, match="unknown quantisation type bitsandbytes__af4"):
        Checkpoint.open(path)


def test_packed_bytes_without_any_part(tmp_path):
    tensors = {"w.weight": four_bit("w.weight", torch.randn(32, 64))["w.weight"]}
    path = write_model(tmp_path, {"model.safetensors": tensors})
    with pytest.raises(CheckpointError, match=r"w\.weight is U8 and belongs to no weight"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("drop", "message"), [("proj.SCB", "has no SCB"), ("proj.weight", "has no weight")]
)
def test_int8_missing_part(tmp_path, drop, message):
    tensors = eight_bit("proj", torch.randn(4, 8))
    del tensors[drop]
    path = write_model(tmp_path, {"model.safetensors": tensors})
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128, 4096])
def test_gpu_decodes_the_same(tmp_path, quant_type, double, block):
    tensors = {}
    names = [f"experts.{i}.weight" for i in range(8)]
    for name in names:
        weight = torch.randn(48, 130, dtype=torch.bfloat16)
        tensors |= four_bit(name, weight, quant_type, block, double)
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    on_gpu = checkpoint.load_stack(names, device="cuda")
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), checkpoint.load_stack(names))
