"""Model directories: what opens, what is read from them and what is said about them."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layout import (
    CONFIG,
    INDEX,
    ONE,
    TWO,
    four_bit,
    truncate_to_header,
    two_files,
    write_model,
    write_raw,
)

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NumericalError


def test_opens_and_loads(tmp_path):
    files = two_files()
    checkpoint = Checkpoint.open(write_model(tmp_path, files))
    assert set(checkpoint.weights) == {"a.weight", "a.bias", "b.weight"}
    assert torch.equal(checkpoint.load("a.weight"), files[ONE]["a.weight"])
    assert checkpoint.load("a.bias", dtype=torch.float16).dtype == torch.float16
    weight = checkpoint.weights["b.weight"]
    assert (weight.format, weight.shape, weight.dtype) == ("nf4", (32, 64), torch.float32)
    assert weight.nbytes == sum(t.nbytes for t in files[TWO].values())
    assert set(weight.parts) == {
        "weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"
    }  # fmt: skip
    assert torch.equal(checkpoint.read("b.weight.absmax"), files[TWO]["b.weight.absmax"])
    checkpoint.close()
    assert torch.equal(checkpoint.load("a.weight"), files[ONE]["a.weight"])


def test_single_file_without_index(tmp_path):
    path = write_model(tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, index=False)
    assert Checkpoint.open(path).load("a").tolist() == [1, 1]


def test_parts_may_lie_in_different_files(tmp_path):
    tensors = four_bit("b.weight", torch.randn(32, 64))
    whole = Checkpoint.open(write_model(tmp_path / "1", {"model.safetensors": tensors}))
    names = list(tensors)
    parts = {ONE: {n: tensors[n] for n in names[::2]}, TWO: {n: tensors[n] for n in names[1::2]}}
    split = Checkpoint.open(write_model(tmp_path / "2", parts))
    assert torch.equal(whole.load("b.weight"), split.load("b.weight"))


def test_large_and_small_tensors_in_one_stack_of_reads(tmp_path):
    """Above and below the size at which neighbours are read together, in any order."""
    for size in (10, 40_000):
        tensors = {f"t.{i}": torch.randn(size) for i in range(20)}
        path = write_model(tmp_path / str(size), {"model.safetensors": tensors})
        names = [f"t.{i}" for i in torch.randperm(20).tolist()]
        stack = Checkpoint.open(path).load_stack(names)
        assert torch.equal(stack, torch.stack([tensors[name] for name in names]))


def test_threads_may_share_it(tmp_path):
    tensors = {f"t.{i}": torch.randn(64, 200) for i in range(40)}
    path = write_model(tmp_path, {"model.safetensors": tensors | four_bit("q", torch.ones(8, 64))})
    checkpoint = Checkpoint.open(path)

    def work(i):
        names = [f"t.{(i + k) % 40}" for k in range(10)]
        same = torch.equal(checkpoint.load_stack(names), torch.stack([tensors[n] for n in names]))
        return same and checkpoint.load("q").shape == (8, 64)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_unknown_names_and_unequal_shapes(tmp_path):
    checkpoint = Checkpoint.open(write_model(tmp_path, two_files()))
    with pytest.raises(CheckpointError, match=r"has no tensor c\.weight"):
        checkpoint.load("c.weight")
    with pytest.raises(CheckpointError, match=r"no tensor is stored as b\.weight\.x"):
        checkpoint.read("b.weight.x")
    with pytest.raises(CheckpointError, match=r"b\.weight is .*a\.weight, to be stacked"):
        checkpoint.load_stack(["a.weight", "b.weight"], dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(tmp_path, dtype, value):
    good, bad = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    bad[2, 3] = value
    path = write_model(tmp_path, {"model.safetensors": {"good": good, "bad": bad}})
    checkpoint = Checkpoint.open(path)
    with pytest.raises(NumericalError, match=r"^bad: 1 of 32 values"):
        checkpoint.load_stack(["good", "bad"])
    assert torch.equal(checkpoint.load("good"), good)


def test_headers_only(tmp_path):
    files = two_files()
    whole = Checkpoint.open(write_model(tmp_path / "whole", files))
    path = write_model(tmp_path / "headers", files)
    for file in files:
        truncate_to_header(path / file)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.headers_only
    assert not whole.headers_only
    assert checkpoint.weights["b.weight"].shape is None
    assert checkpoint.weights["a.weight"].shape == (8, 16)
    for name, weight in whole.weights.items():
        assert checkpoint.weights[name].nbytes == weight.nbytes
        assert checkpoint.weights[name].elements == weight.elements
    checkpoint.check_states()
    with pytest.raises(CheckpointError, match="headers only, no weights"):
        checkpoint.load("a.weight")
    with pytest.raises(CheckpointError, match="headers only, no weights"):
        checkpoint.read("a.weight")
    summary = checkpoint.describe()
    assert summary.headers_only
    assert summary.nbytes == whole.describe().nbytes


def test_file_that_shrinks_later(tmp_path):
    checkpoint = Checkpoint.open(write_model(tmp_path, two_files()))
    truncate_to_header(tmp_path / ONE)
    with pytest.raises(CheckpointError, match=f"{ONE}: .* changed since"):
        checkpoint.load("a.weight")


def experts(layer, form):
    stem = f"model.layers.{layer}.mlp"
    tensors = {f"{stem}.gate.weight": torch.randn(4, 64, dtype=torch.bfloat16)}
    if form == "stacked":
        tensors[f"{stem}.experts.gate_up_proj"] = torch.randn(4, 64, 64, dtype=torch.bfloat16)
        tensors[f"{stem}.experts.down_proj"] = torch.randn(4, 64, 32, dtype=torch.bfloat16)
        return tensors
    for i in range(4):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"{stem}.experts.{i}.{projection}.weight"
            weight = torch.randn(64, 64, dtype=torch.bfloat16)
            tensors |= {name: weight} if form == "dense" else four_bit(name, weight, form)
    return tensors


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("nf4", "2 layers of 4 experts stored one by one as nf4 double; router dense BF16"),
        ("fp4", "stored one by one as fp4 double"),
        ("dense", "2 layers of 4 experts stored one by one as dense BF16"),
        ("stacked", "2 layers of 4 experts stored stacked as dense BF16"),
    ],
)
def test_says_which_variant_it_is(tmp_path, form, said):
    config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}
    if form in ("dense", "stacked"):
        config = CONFIG
    tensors = experts(0, form) | experts(1, form)
    path = write_model(tmp_path, {"model.safetensors": tensors}, config)
    summary = Checkpoint.open(path).describe()
    assert said in summary.verdict
    assert (summary.layers, summary.experts) == ([0, 1], 4)
    assert summary.conflicts == []
    assert summary.oddities == []


def test_stacked_experts_are_loaded_by_their_own_names(tmp_path):
    tensors = experts(0, "stacked")
    checkpoint = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors}))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(checkpoint.load(name), tensors[name])
    assert checkpoint.weights[name].shape == (4, 64, 64)


def test_oddities_and_conflicts(tmp_path):
    tensors = experts(0, "nf4") | experts(1, "stacked")
    gate = "model.layers.0.mlp.gate.weight"
    tensors |= four_bit(gate, tensors[gate])
    for key in [k for k in tensors if ".experts.3." in k]:
        del tensors[key]
    summary = Checkpoint.open(write_model(tmp_path, {"model.safetensors": tensors})).describe()
    assert "routers are quantised" in summary.oddities
    assert "experts are stored in 2 ways" in summary.oddities
    assert "some layers hold experts one by one, others stacked" in summary.oddities
    assert "config.json says 4 experts, 3 are stored" in summary.conflicts
    assert "tensors are quantised, config.json has no quantization_config" in summary.conflicts


def test_legacy_gptq_config(tmp_path):
    path = write_model(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    (path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    found = Checkpoint.open(path).config["quantization_config"]
    assert found == {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_many_tensors_open_in_seconds(tmp_path):
    """An eighth of an 80B model: 6 layers of 512 experts, 55,296 stored tensors, headers only."""
    header, index, position = {}, {}, 0
    for layer in range(6):
        for expert in range(512):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                for suffix, dtype, shape, size in (
                    ("", "U8", [524288, 1], 524288),
                    (".absmax", "U8", [16384], 16384),
                    (".nested_absmax", "F32", [64], 256),
                    (".nested_quant_map", "F32", [256], 1024),
                    (".quant_map", "F32", [16], 64),
                    (".quant_state.bitsandbytes__nf4", "U8", [170], 170),
                ):
                    end = position + size
                    header[name + suffix] = {
                        "dtype": dtype, "shape": shape, "data_offsets": [position, end]
                    }  # fmt: skip
                    index[name + suffix] = "model.safetensors"
                    position = end
    write_raw(tmp_path / "model.safetensors", header)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_experts": 512}))
    started = time.process_time()
    summary = Checkpoint.open(tmp_path).describe()
    assert time.process_time() - started < 8  # 0.6 s on the machine this was written on
    assert (summary.experts, len(summary.layers)) == (512, 6)
    assert summary.elements == 6 * 512 * 3 * 512 * 2048
    assert summary.nbytes == position
