"""GPTQ: packing there and back, decoding against the second reader, act-order and bad parts."""

import re

import independent
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout import write_model

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.formats.gptq import pack, unpack
from pipeline.checkpoint.gptq_settings import ModuleSettings, settings_of
from pipeline.checkpoint.output import ModuleRules, OutputFormat
from pipeline.checkpoint.words import pack_words, unpack_words
from pipeline.errors import CheckpointError, NumericalError
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


def random_tensor(shape, scheme, low=1):
    *batch, rows, columns = shape
    groups = columns // scheme.group(columns)
    codes = torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)
    scales = (torch.rand(*batch, rows, groups) + 0.01).to(torch.float16)
    if scheme.symmetric:
        scales = torch.where(torch.rand(scales.shape) < 0.5, -scales, scales)
        zeros = torch.full(scales.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    else:
        zeros = torch.randint(low, 2**scheme.bits, scales.shape, dtype=torch.uint8)
    return QuantizedTensor(scheme, {"codes": codes, "scales": scales, "zeros": zeros})


def config(bits=4, version=1, group=-1):
    form = "gptq" if version == 1 else "gptq_v2"
    table = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": form}
    return {"model_type": "qwen3_next", "quantization_config": table}


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([-1, 32, 64, 128]),
    symmetric=st.booleans(),
    version=st.sampled_from([1, 2]),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(1, 4),
)
def test_unpack_of_pack(*, bits, group, symmetric, version, batch, rows):
    scheme = AffineScheme(bits, group, symmetric)
    tensor = random_tensor((*batch, 16 * rows, 256), scheme, low=2 - version)
    parts = pack(tensor, version)
    assert parts["qweight"].shape == (*batch, 256 * bits // 32, 16 * rows)
    assert {part: value.dtype for part, value in parts.items()} == {
        "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16,
        "g_idx": torch.int32,
    }  # fmt: skip
    back = unpack(parts, scheme, version)
    for name, array in tensor.arrays.items():
        assert torch.equal(back.arrays[name], array)


def test_symmetric_zeros_are_the_known_word():
    parts = pack(random_tensor((16, 32), AffineScheme(4, -1, True)))
    assert (parts["qzeros"] == 0x77777777).all()


def test_first_code_is_in_the_lowest_bits():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_words(codes, 4).item() & 0xFFFFFFFF == 0x87654321
    assert torch.equal(unpack_words(pack_words(codes, 4), 4), codes)


def test_packing_leaves_codes_alone():
    tensor = random_tensor((8, 8), AffineScheme(4, -1, True))
    before = tensor.arrays["codes"].clone()
    pack(tensor)
    assert torch.equal(tensor.arrays["codes"], before)


@pytest.mark.parametrize(("bits", "version"), [(4, 1), (4, 2), (8, 1), (8, 2), (2, 1)])
@pytest.mark.parametrize("group", [32, -1])
def test_decode_against_second_reader(tmp_path, bits, version, group):
    scheme = AffineScheme(bits, group, False)
    tensor = random_tensor((3, 32, 64), scheme, low=2 - version)
    parts = pack(tensor, version)
    tensors = {f"m.{i}.{part}": value[i] for part, value in parts.items() for i in range(3)}
    path = write_model(tmp_path, {"model.safetensors": tensors}, config(bits, version))
    checkpoint = Checkpoint.open(path)
    stack = checkpoint.load_stack([f"m.{i}.weight" for i in range(3)])
    assert torch.equal(stack, tensor.dequantize(torch.float16))
    stored = independent.read_files(path)
    for i in range(3):
        arrays = {part: stored[f"m.{i}.{part}"][1] for part in parts}
        expected = torch.from_numpy(independent.gptq_dense(arrays, bits, version))
        assert torch.equal(stack[i], expected.to(torch.float16))
    raw = checkpoint.load_parts([f"m.{i}.weight" for i in range(3)])
    assert torch.equal(raw["qweight"], parts["qweight"])
    assert checkpoint.describe().formats.keys() == {f"gptq {bits} bits"}


def test_act_order_decodes_but_stays_dense(tmp_path):
    scheme = AffineScheme(4, 32, False)
    parts = pack(random_tensor((16, 128), scheme))
    parts["g_idx"] = parts["g_idx"][torch.randperm(128)]
    path = write_model(
        tmp_path, {"model.safetensors": {f"m.{k}": v for k, v in parts.items()}}, config()
    )
    loaded = Checkpoint.open(path).load("m.weight")
    arrays = {part: stored for part, (_, stored) in independent.read_files(path).items()}
    arrays = {part.removeprefix("m."): value for part, value in arrays.items()}
    assert torch.equal(loaded, torch.from_numpy(independent.gptq_dense(arrays, 4, 1)).half())
    with pytest.raises(CheckpointError, match="act-order"):
        unpack(parts, scheme)


def test_zero_sixteen_is_understood_but_not_written(tmp_path):
    """Version 1 files of others hold 15 where the zero is 16."""
    scheme = AffineScheme(4, -1, False)
    tensor = random_tensor((8, 8), scheme)
    parts = pack(tensor)
    parts["qzeros"].fill_(-1)
    assert (unpack(parts, scheme).arrays["zeros"] == 16).all()
    tensor.arrays["zeros"].fill_(0)
    with pytest.raises(ValueError, match="zeros 1 to 15"):
        pack(tensor)
    tensor.arrays["zeros"].fill_(16)
    with pytest.raises(ValueError, match="zeros 1 to 15"):
        pack(tensor)


@pytest.mark.parametrize("shape", [(12, 64), (64, 12)])
def test_sizes_that_fill_no_words(shape):
    with pytest.raises(ValueError, match="words of 8"):
        pack(random_tensor(shape, AffineScheme(4, -1, True)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", None, "has no qweight"),
        ("qzeros", None, "has no qzeros"),
        ("scales", None, "has no scales"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros is I32 \[2, 3\]"),
        ("scales", lambda t: t[:, :-1], r"scales is F16 \[2, 31\]"),
        ("scales", lambda t: t.to(torch.int32), "scales is I32"),
        ("g_idx", lambda t: t[:-3], "bits"),
        ("qweight", lambda t: t[0], "packed in no known way"),
    ],
)
def test_bad_parts(tmp_path, part, change, message):
    parts = pack(random_tensor((32, 64), AffineScheme(4, 32, True)))
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    tensors = {f"m.{k}": v.contiguous() for k, v in parts.items()}
    path = write_model(tmp_path, {"model.safetensors": tensors}, config())
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert re.search(r"\bm\b", str(caught.value))


def test_bad_values(tmp_path):
    parts = pack(random_tensor((32, 64), AffineScheme(4, 32, True)))
    parts["g_idx"][5] = 2
    path = tmp_path / "groups"
    write_model(path, {"model.safetensors": {f"m.{k}": v for k, v in parts.items()}}, config())
    with pytest.raises(CheckpointError, match=r"m\.g_idx names groups beyond the 2"):
        Checkpoint.open(path).load("m.weight")
    parts["g_idx"][5] = 0
    parts["scales"][0, 3] = float("inf")
    path = tmp_path / "scales"
    write_model(path, {"model.safetensors": {f"m.{k}": v for k, v in parts.items()}}, config())
    with pytest.raises(NumericalError, match=r"m\.weight: 1 of 64 scales"):
        Checkpoint.open(path).load("m.weight")


def test_without_g_idx(tmp_path):
    tensor = random_tensor((32, 64), AffineScheme(4, 32, True))
    parts = pack(tensor)
    del parts["g_idx"]
    path = write_model(
        tmp_path, {"model.safetensors": {f"m.{k}": v for k, v in parts.items()}}, config()
    )
    assert torch.equal(Checkpoint.open(path).load("m.weight"), tensor.dequantize(torch.float16))


@pytest.mark.parametrize("beside", ["mlp.shared_expert.up_proj", "mlp.up_proj"])
def test_quantization_config_tells_every_reader(beside):
    """`beside`: what else stands in the experts' block need not have a block of its own."""
    rules = ModuleRules(
        experts="mlp.experts",
        expert_projections=("gate_proj", "up_proj", "down_proj"),
        quantized=(),
        skipped=("self_attn.q_proj", "mlp.gate", beside),
        outside=("lm_head",),
    )
    gptq = FORMATS["gptq"]
    assert isinstance(gptq, OutputFormat)
    table = gptq.quantization_config(AffineScheme(4, 128, True), rules, "1")
    assert (table["bits"], table["group_size"], table["desc_act"]) == (4, 128, False)
    dense = [f"model.layers.{i}.{name}" for i in (0, 11) for name in rules.skipped]
    for name in [*dense, "lm_head"]:
        assert not settings_of(name, table).quantized
        assert not settings_of(name, table | {"dynamic": {}}).quantized
        assert not settings_of(name, table | {"modules_to_not_convert": []}).quantized
    for name in ("gate_proj", "up_proj", "down_proj"):
        said = settings_of(f"model.layers.3.mlp.experts.7.{name}", table)
        assert said == ModuleSettings(True, 4, 128, True, False)


def test_settings_of_others():
    table = {"bits": 4, "group_size": 128, "sym": True, "desc_act": True}
    table["dynamic"] = {r"+:.*\.1\..*": {"bits": 8}, r".*down": {"group_size": -1}, "-:.*gate$": {}}
    assert settings_of("layers.1.up", table) == ModuleSettings(True, 8, 128, True, True)
    assert settings_of("layers.2.down", table) == ModuleSettings(True, 4, -1, True, True)
    assert not settings_of("layers.2.gate", table).quantized
    with pytest.raises(CheckpointError, match="not a regular expression"):
        settings_of("x", {"dynamic": {"-:(": {}}})
    with pytest.raises(CheckpointError, match="group_size 0"):
        settings_of("x", {"group_size": 0})
    with pytest.raises(CheckpointError, match="not a table of rules"):
        settings_of("x", {"dynamic": [1]})
    with pytest.raises(CheckpointError, match="not a list of names"):
        settings_of("x", {"modules_to_not_convert": "lm_head"})
