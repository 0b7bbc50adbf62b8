"""AWQ GEMM: packing there and back, decoding against the second reader, bad parts and configs."""

import re

import independent
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout import write_model
from test_format_gptq import random_tensor

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.formats.awq import pack, unpack
from pipeline.checkpoint.output import ModuleRules, OutputFormat
from pipeline.errors import CheckpointError, NumericalError
from pipeline.quantize.tensor import AffineScheme


def config(**changes):
    table = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
    return {"model_type": "qwen3_next", "quantization_config": table | changes}


def write(path, parts, **changes):
    tensors = {f"m.{part}": value.contiguous() for part, value in parts.items()}
    return write_model(path, {"model.safetensors": tensors}, config(**changes))


@settings(max_examples=30, deadline=None)
@given(
    group=st.sampled_from([-1, 32, 64, 128]),
    symmetric=st.booleans(),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(1, 4),
)
def test_unpack_of_pack(*, group, symmetric, batch, rows):
    scheme = AffineScheme(4, group, symmetric)
    tensor = random_tensor((*batch, 8 * rows, 256), scheme, low=0)
    parts = pack(tensor)
    groups = 1 if group == -1 else 256 // group
    assert parts["qweight"].shape == (*batch, 256, rows)
    assert parts["qzeros"].shape == (*batch, groups, rows)
    assert parts["scales"].shape == (*batch, groups, 8 * rows)
    dtypes = [parts[part].dtype for part in ("qweight", "qzeros", "scales")]
    assert dtypes == [torch.int32, torch.int32, torch.float16]
    back = unpack(parts, scheme)
    for name, array in tensor.arrays.items():
        assert torch.equal(back.arrays[name], array)


def test_order_of_the_nibbles():
    """Outputs 0, 2, 4, 6 are the low half of a word, 1, 3, 5, 7 the high one."""
    tensor = random_tensor((8, 1), AffineScheme(4, -1, False))
    tensor.arrays["codes"][:, 0] = torch.arange(8)
    assert pack(tensor)["qweight"].item() & 0xFFFFFFFF == 0x75316420


@pytest.mark.parametrize("group", [32, -1])
def test_decode_against_second_reader(tmp_path, group):
    tensor = random_tensor((3, 32, 64), AffineScheme(4, group, False), low=0)
    parts = pack(tensor)
    tensors = {f"m.{i}.{part}": value[i] for part, value in parts.items() for i in range(3)}
    path = write_model(tmp_path, {"model.safetensors": tensors}, config(group_size=group))
    checkpoint = Checkpoint.open(path)
    names = [f"m.{i}.weight" for i in range(3)]
    stack = checkpoint.load_stack(names)
    assert torch.equal(stack, tensor.dequantize(torch.float16))
    stored = independent.read_files(path)
    for i in range(3):
        arrays = {part: stored[f"m.{i}.{part}"][1] for part in parts}
        expected = torch.from_numpy(independent.awq_dense(arrays))
        assert torch.equal(stack[i], expected.to(torch.float16))
    kept = checkpoint.load_quantized(names)
    assert kept.scheme == AffineScheme(4, group, False)
    assert all(torch.equal(kept.arrays[k], v) for k, v in tensor.arrays.items())
    assert checkpoint.describe().formats.keys() == {"awq 4 bits"}
    assert checkpoint.problems(names) == []


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="4 bits"):
        pack(random_tensor((16, 64), AffineScheme(8, -1, True)))
    with pytest.raises(ValueError, match="multiples of 8"):
        pack(random_tensor((12, 64), AffineScheme(4, -1, True)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", None, "has no qweight"),
        ("qzeros", None, "has no qzeros"),
        ("scales", None, "has no scales"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros is I32 \[2, 3\]"),
        ("scales", lambda t: t[:, :16], "packed with 8 bits"),
        ("scales", lambda t: t.to(torch.int32), "scales is I32"),
        ("qweight", lambda t: t[:-1], "2 groups for 63 inputs"),
        ("qweight", lambda t: t[0], "packed in no known way"),
    ],
)
def test_bad_parts(tmp_path, part, change, message):
    parts = pack(random_tensor((32, 64), AffineScheme(4, 32, True)))
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(write(tmp_path, parts))
    assert re.search(r"\bm\b", str(caught.value))


def test_other_layouts_are_refused_by_name(tmp_path):
    parts = pack(random_tensor((32, 64), AffineScheme(4, 32, True)))
    with pytest.raises(CheckpointError, match="layout 'gemv'; only 'gemm'"):
        Checkpoint.open(write(tmp_path, parts, version="GEMV"))


def test_bad_values(tmp_path):
    parts = pack(random_tensor((32, 64), AffineScheme(4, 32, True)))
    parts["scales"][0, 3] = float("inf")
    checkpoint = Checkpoint.open(write(tmp_path, parts, bits=8, group_size=64, zero_point=False))
    with pytest.raises(NumericalError, match=r"m\.weight: 1 of 64 scales"):
        checkpoint.load("m.weight")
    said = [problem.what for problem in checkpoint.problems(["m.weight"])]
    assert said == [
        "is packed with 4 bits, config.json says 8",
        "has 2 groups of its 64 inputs, config.json says group size 64",
        "has zero points, config.json says zero_point: false",
        "scales are not all finite and above 0 (below 0 in symmetric groups only)",
    ]


def test_only_symmetric_groups_may_be_turned_around(tmp_path):
    quantized = random_tensor((32, 64), AffineScheme(4, 32, True))
    quantized.arrays["scales"][0, 1] = -0.5
    (tmp_path / "1").mkdir()
    assert Checkpoint.open(write(tmp_path / "1", pack(quantized))).problems(["m.weight"]) == []
    quantized.arrays["zeros"][0, 1] = 7  # that very group
    (tmp_path / "2").mkdir()
    (problem,) = Checkpoint.open(write(tmp_path / "2", pack(quantized))).problems(["m.weight"])
    assert "below 0 in symmetric groups only" in problem.what


def test_packed_though_the_config_leaves_it_dense(tmp_path):
    parts = pack(random_tensor((32, 64), AffineScheme(4, 32, True)))
    checkpoint = Checkpoint.open(write(tmp_path, parts, modules_to_not_convert=["m"]))
    (problem,) = checkpoint.problems(["m.weight"])
    assert problem.what == "is packed, but config.json leaves it dense (modules_to_not_convert, m)"


def test_output_format():
    awq = FORMATS["awq"]
    assert isinstance(awq, OutputFormat)
    rules = ModuleRules(
        "mlp.experts", ("gate_proj",), ("self_attn.q_proj",), ("mlp.gate",), ("lm_head",)
    )
    table = awq.quantization_config(AffineScheme(4, 128, True), rules, "1")
    assert table["modules_to_not_convert"] == ["mlp.gate", "lm_head"]
    assert (table["version"], table["zero_point"], table["group_size"]) == ("gemm", True, 128)
    assert awq.refusal(AffineScheme(4, -1, True)) is None
    assert awq.refusal(AffineScheme(8, 128, True)) == "AWQ's format holds 4 bits only"
    for group in (32, -1):
        scheme = AffineScheme(4, group, False)
        parts = pack(random_tensor((32, 64), scheme))
        assert awq.packed_bytes(scheme, 32, 64) == sum(part.nbytes for part in parts.values())
