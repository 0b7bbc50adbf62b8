"""Model directories that are refused, each in one line that names the file or tensor."""

import json
import os
import random
import re

import pytest
import torch
from layout import (
    CONFIG,
    INDEX,
    ONE,
    TWO,
    eight_bit,
    four_bit,
    truncate_to_header,
    two_files,
    write_model,
    write_raw,
)

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, UserError


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)


def edit_index(path, change):
    table = json.loads((path / INDEX).read_text())
    change(table["weight_map"])
    (path / INDEX).write_text(json.dumps(table))


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


EMPTY = '{"metadata": {}, "weight_map": {}}'


@pytest.mark.parametrize(
    "index", ["[", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', EMPTY]
)
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
        (b"[1]", "a table was expected"),
        (b"[" * 100_000, "nested without end"),
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
    refused(path, r"w\.weight is .* no weight of a known format .*fp8.*known: awq, bnb4")


def test_one_file_cut_after_its_header(tmp_path):
    path = write_model(tmp_path, two_files())
    truncate_to_header(path / TWO)
    refused(path, f"{TWO}: truncated after its header, while {ONE} is whole")


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
