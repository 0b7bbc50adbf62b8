"""Model directories: what opens, what is refused, and what is said about it."""

import json
import os
import random
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layout import CONFIG, eight_bit, four_bit, truncate_to_header, write_model

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NumericalError, UserError

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_files():
    return {
        ONE: {"a.weight": torch.randn(8, 16, dtype=torch.bfloat16), "a.bias": torch.randn(8)},
        TWO: four_bit("b.weight", torch.randn(32, 64)),
    }


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)


def edit_index(path, change):
    table = json.loads((path / INDEX).read_text())
    change(table["weight_map"])
    (path / INDEX).write_text(json.dumps(table))


def write_raw(path, header, data=b"", length=None):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


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


def test_missing_directory_config_index(tmp_path):
    refused(tmp_path / "none", "not a directory")
    path = write_model(tmp_path / "a", two_files())
    (path / INDEX).unlink()
    refused(path, "index.json is missing")
    path = write_model(tmp_path / "b", two_files())
    (path / "config.json").unlink()
    refused(path, re.escape("config.json: not in"))
    path = write_model(tmp_path / "c", two_files())
    (path / "config.json").write_text("{")
    refused(path, re.escape("config.json: not JSON"))
    (path / "config.json").write_text("[]")
    refused(path, "a table was expected")
    (path / "config.json").write_text('{"quantization_config": "nf4"}')
    refused(path, "quantization_config is not a table")
    (tmp_path / "d").mkdir()
    refused(tmp_path / "d", "holds no model.safetensors.index.json")
    (tmp_path / "d" / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "d", "GGUF")


def test_missing_file(tmp_path):
    path = write_model(tmp_path, two_files())
    (path / TWO).unlink()
    refused(path, f"{TWO}: not in")


@pytest.mark.parametrize("index", ["[", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(tmp_path, index):
    path = write_model(tmp_path, two_files())
    (path / INDEX).write_text(index)
    refused(path, re.escape(INDEX))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../x.safetensors", "outside the model directory"),
        ("/etc/x.safetensors", "outside the model directory"),
        ("a/../../x.safetensors", "outside the model directory"),
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("model.npz", "not a safetensors file"),
        (7, "mapped to no file name"),
    ],
)
def test_index_names_what_is_refused(tmp_path, file, message):
    (tmp_path / "x.safetensors").write_bytes(b"")
    path = write_model(tmp_path / "model", two_files())
    edit_index(path, lambda table: table.update({"a.weight": file}))
    refused(path, message)


def test_pickles_alone_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pytorch_model\.bin: a pickle")


def test_links(tmp_path):
    """Into the blobs of the same cache folder only."""
    elsewhere = write_model(tmp_path / "elsewhere", two_files())
    path = write_model(tmp_path / "model", two_files())
    (path / TWO).unlink()
    (path / TWO).symlink_to(elsewhere / TWO)
    refused(path, f"{TWO}: a link to .*refused")
    cache = tmp_path / "models--org--name"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, source in enumerate(sorted(elsewhere.iterdir())):
        blob = blobs / f"{number:040d}"
        blob.write_bytes(source.read_bytes())
        (snapshot / source.name).symlink_to(os.path.relpath(blob, snapshot))
    Checkpoint.open(snapshot).load("b.weight")
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to(elsewhere / TWO)
    refused(snapshot, "refused")
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_bytes((elsewhere / TWO).read_bytes())
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to(other / "0")
    refused(snapshot, "refused")


def test_index_and_headers_disagree(tmp_path):
    path = write_model(tmp_path, two_files())
    edit_index(path, lambda table: table.update({"c.weight": ONE}))
    refused(path, r"c\.weight is said to be in .*no such tensor")
    path = write_model(tmp_path, two_files())
    edit_index(path, lambda table: table.pop("a.bias"))
    refused(path, r"a\.bias is not listed")
    path = write_model(tmp_path, two_files())
    edit_index(path, lambda table: table.update({"a.bias": TWO}))
    refused(path, rf"a\.bias is said to be in {TWO}, but is in {ONE}")


def test_duplicates(tmp_path):
    files = two_files()
    files[TWO]["a.bias"] = files[ONE]["a.bias"]
    refused(write_model(tmp_path / "1", files), r"a\.bias is in .* too")
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    path = write_model(tmp_path / "2", {"model.safetensors": {"a": torch.ones(1)}})
    write_raw(path / "model.safetensors", f"{{{entry}, {entry}}}".encode(), b"\0" * 4)
    refused(path, "a is listed twice")
    tensors = eight_bit("w", torch.randn(32, 64))
    four = four_bit("w.weight", torch.randn(32, 64))
    tensors |= {key: value for key, value in four.items() if key != "w.weight"}
    refused(write_model(tmp_path / "3", {"model.safetensors": tensors}), r"w\.weight is I8")


@pytest.mark.parametrize(
    ("cut", "message"),
    [(0, "too few"), (5, "too few"), (20, "truncated within its header"), (-1, "truncated, ")],
)
def test_truncated(tmp_path, cut, message):
    path = write_model(tmp_path, two_files())
    data = (path / TWO).read_bytes()
    (path / TWO).write_bytes(data[:cut])
    refused(path, f"{TWO}: .*{message}")


def test_trailing_bytes(tmp_path):
    path = write_model(tmp_path, two_files())
    (path / TWO).write_bytes((path / TWO).read_bytes() + b"123")
    refused(path, f"{TWO}: 3 bytes follow")


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not a table"),
        (b"[" * 100_000, "not JSON"),
        ({"a": 3}, "no proper dtype"),
        ({"a": {}}, "no proper dtype"),
        ({"a": entry(data_offsets=[0])}, "no proper dtype"),
        ({"a": entry(shape="x")}, "impossible numbers"),
        ({"a": entry(shape=[-2])}, "impossible numbers"),
        ({"a": entry(shape=[2.0])}, "impossible numbers"),
        ({"a": entry(data_offsets=[8, 0])}, "impossible numbers"),
        ({"a": entry(dtype="F33")}, "unknown dtype 'F33'"),
        ({"a": entry(dtype=[])}, "unknown dtype"),
        ({"a": entry(shape=[3])}, r"a is F32 \[3\], 12 bytes, in a range of 8"),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, "b overlaps a"),
        ({"a": entry(data_offsets=[4, 12])}, "4 bytes before a are no tensor"),
        ({"a": entry(data_offsets=[2**60, 2**60 + 8])}, "before a are no tensor"),
        ({"a": entry(), "__metadata__": []}, "__metadata__"),
    ],
)
def test_malformed_headers(tmp_path, header, message):
    path = write_model(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    write_raw(path / "model.safetensors", header, b"\0" * 12)
    refused(path, f"^model.safetensors: .*{message}")


@pytest.mark.parametrize("length", [2**63, 200_000_000])
def test_absurd_header_length(tmp_path, length):
    path = write_model(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    write_raw(path / "model.safetensors", {"a": entry()}, b"\0" * 8, length)
    refused(path, "absurd")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_unknown_formats(tmp_path, dtype):
    tensors = {"w.weight": torch.ones(4, 4).to(dtype)}
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    path = write_model(tmp_path, {"model.safetensors": tensors}, config)
    refused(path, r"w\.weight is .* no weight of a known format .*fp8.*known: bnb4")


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


def test_one_file_cut_after_its_header(tmp_path):
    path = write_model(tmp_path, two_files())
    truncate_to_header(path / TWO)
    refused(path, f"{TWO}: truncated after its header, while {ONE} is whole")


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


def test_two_quant_states(tmp_path):
    tensors = four_bit("w.weight", torch.randn(32, 64), "nf4")
    tensors |= four_bit("w.weight", torch.randn(32, 64), "fp4")
    refused(write_model(tmp_path, {"model.safetensors": tensors}), r"w\.weight has two quant_st")


def test_damaged_bytes_give_clear_errors(tmp_path):
    """Any change of any byte either goes unnoticed or is the user's error, never a crash."""
    seed = random.randrange(1 << 32)
    print("seed", seed)  # shown when the test fails
    rng = random.Random(seed)
    tensors = four_bit("b.weight", torch.randn(16, 64)) | {"a.weight": torch.randn(4, 4)}
    path = write_model(tmp_path, {"model.safetensors": tensors | eight_bit("c", torch.ones(4, 8))})
    files = [path / "model.safetensors", path / INDEX, path / "config.json"]
    sound = {file: file.read_bytes() for file in files}
    for _ in range(300):
        file = rng.choice(files)
        data = bytearray(sound[file])
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(min(len(data), 2500))
            data[position] = rng.choice(b'[]{}",:0123456789\x00\xff.-aeN')
        file.write_bytes(data)
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.describe()
            for name in checkpoint.weights:
                checkpoint.load(name)
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(sound[file])


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
