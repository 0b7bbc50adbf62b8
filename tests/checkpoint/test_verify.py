"""Verification: a sound directory has no problems, each kind of damage is named."""

import json
from pathlib import Path

import pytest
import torch
from layout import CONFIG, four_bit, truncate_to_header, write_model

from pipeline.checkpoint.formats.gptq import pack
from pipeline.checkpoint.header import read_header
from pipeline.checkpoint.index import INDEX_NAME, build_index
from pipeline.checkpoint.shard_map import LayerExperts, MappedFile, Reserve, build_shard_map
from pipeline.checkpoint.split import plan_split
from pipeline.checkpoint.sums import write_sums
from pipeline.checkpoint.verify import verify_directory
from pipeline.checkpoint.writer import write_json, write_safetensors
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

MICRO = Path(__file__).parents[1] / "models" / "micro-nf4"
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
    "checkpoint_format": "gptq", "dynamic": {"-:.*self_attn.*": {}},
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def packed(name):
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    arrays = {
        "codes": codes,
        "scales": (torch.rand(32, 2) + 0.01).half(),
        "zeros": torch.full((32, 2), 8, dtype=torch.uint8),
    }
    parts = pack(QuantizedTensor(AffineScheme(4, 32, True), arrays))
    return {f"{name}.{part}": value for part, value in parts.items()}


def tensors():
    found = {"lm_head.weight": torch.randn(8, 64).bfloat16()}
    for layer in range(2):
        found[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(8, 64).bfloat16()
        for expert in range(4):
            found |= packed(f"model.layers.{layer}.mlp.experts.{expert}.up_proj")
    return found


def sealed(path, given=None, settings=None, shape_map=lambda table: table):
    """A whole output directory as the pipeline makes it."""
    given = given or tensors()
    path.mkdir(exist_ok=True)
    shards = plan_split({name: tensor.nbytes for name, tensor in given.items()}, 1 << 20)
    mapped, files, sums = [], {}, {}
    for shard in shards:
        record = write_safetensors(path / shard.name, {n: given[n] for n in shard.tensors})
        mapped.append(MappedFile(shard.name, shard.kind, shard.layer, record.size, record.sha256))
        files[shard.name] = {name: given[name].nbytes for name in shard.tensors}
        sums[record.name] = record.sha256
    layers = {layer: LayerExperts(4, 2048) for layer in range(2)}
    write_json(path / INDEX_NAME, build_index(files))
    write_json(
        path / "shard_map.json", shape_map(build_shard_map(mapped, layers, Reserve(1, 1, 1)))
    )
    write_json(path / "config.json", CONFIG | {"quantization_config": GPTQ | (settings or {})})
    write_sums(path, sums)
    return path


def found(path):
    return [str(problem) for problem in verify_directory(path)]


def one(path, *texts):
    problems = found(path)
    assert len(problems) == 1, problems
    for text in texts:
        assert text in problems[0]


def test_sound_directories(tmp_path):
    assert found(sealed(tmp_path)) == []
    assert found(MICRO) == []


def test_headers_only(tmp_path):
    path = sealed(tmp_path)
    for file in path.glob("*.safetensors"):
        truncate_to_header(file)
    (path / "SHA256SUMS").unlink()
    assert found(path) == []


def test_bit_flip(tmp_path):
    path = sealed(tmp_path)
    file = path / "model-experts-layer-001.safetensors"
    entry = next(e for e in read_header(file, "x").entries if e.name == f"{EXPERT}.qweight")
    data = bytearray(file.read_bytes())
    data[entry.offset] ^= 1
    file.write_bytes(data)
    one(path, "model-experts-layer-001.safetensors", "SHA-256")


def test_stray_model_file(tmp_path):
    path = sealed(tmp_path)
    write_safetensors(path / "old.safetensors", {"a": torch.ones(1)})
    write_safetensors(path / "validation_reference.safetensors", {"a": torch.ones(1)})
    write_sums(path)
    one(path, "old.safetensors", "the index has not got it")


def test_damage_that_headers_show(tmp_path):
    path = sealed(tmp_path)
    file = path / "model-experts-layer-001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    problems = found(path)
    assert len(problems) == 2
    assert "SHA-256" in problems[0]
    assert "truncated" in problems[1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bits": 8}, "is packed with 4 bits, config.json says 8"),
        ({"group_size": 64}, "has 2 groups of its 64 inputs, config.json says group size 64"),
        ({"group_size": -1}, "has 2 groups of its 64 inputs"),
        ({"dynamic": {"-:.*experts.*": {}}}, "the dynamic rule -:.*experts.*"),
        ({"modules_to_not_convert": ["up_proj"]}, "modules_to_not_convert, up_proj"),
    ],
)
def test_config_against_tensors(tmp_path, settings, text):
    problems = found(sealed(tmp_path, settings=settings))
    assert len(problems) == 8
    assert all(text in problem for problem in problems)
    assert any(f"{EXPERT}: " in problem for problem in problems)


def test_senseless_config(tmp_path):
    one(sealed(tmp_path / "1", settings={"dynamic": {"-:(": {}}}), "not a regular expression")
    one(sealed(tmp_path / "2", settings={"group_size": "x"}), "neither -1 nor positive")


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("scales", lambda t: t.zero_(), "not all finite and above 0"),
        ("scales", lambda t: t.fill_(float("nan")), "not all finite and above 0"),
        ("g_idx", lambda t: t.copy_(t.flip(0)), "g_idx is not in order"),
        ("qzeros", lambda t: t.zero_(), "zeros are not all in the middle"),
    ],
)
def test_values(tmp_path, part, change, text):
    given = tensors()
    change(given[f"{EXPERT}.{part}"])
    one(sealed(tmp_path, given), "model-experts-layer-001.safetensors", EXPERT, text)


def test_only_symmetric_groups_may_be_turned_around(tmp_path):
    given = tensors()
    given[f"{EXPERT}.scales"].neg_()
    assert found(sealed(tmp_path / "1", given)) == []
    zeros = given[f"{EXPERT}.qzeros"]
    zeros[0, 0] ^= 1  # one group of one output has another zero
    turned = sealed(tmp_path / "2", given, {"sym": False})
    one(turned, "model-experts-layer-001.safetensors", EXPERT, "below 0 in symmetric groups only")
    given[f"{EXPERT}.scales"][0, 0].neg_()
    assert found(sealed(tmp_path / "3", given, {"sym": False})) == []


def test_values_allowed_by_another_config(tmp_path):
    given = tensors()
    index = given[f"{EXPERT}.g_idx"]
    index.copy_(index.flip(0))
    given[f"{EXPERT}.qzeros"].zero_()
    assert found(sealed(tmp_path, given, {"sym": False, "desc_act": True})) == []
    given[f"{EXPERT}.qzeros"].fill_(-1)
    path = sealed(tmp_path, given, {"sym": False, "desc_act": True})
    one(path, "the zero 16, on which readers disagree")


def test_dense_and_bnb_values(tmp_path):
    given = tensors()
    given["lm_head.weight"][3, 3] = float("inf")
    one(sealed(tmp_path / "1", given), "lm_head.weight", "NaN, Inf")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    given = four_bit(name, torch.randn(32, 64), double=False)
    given[f"{name}.absmax"][0] = float("nan")
    config = {"model_type": "qwen3_next", "quantization_config": {"quant_method": "bitsandbytes"}}
    one(write_model(tmp_path / "2", {"model.safetensors": given}, config), name, "block scales")


def test_values_looked_at_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.checkpoint.files.PIECE_BYTES", 96)
    monkeypatch.setattr("pipeline.checkpoint.reader.CHECKED", 3)
    given = tensors()
    assert found(sealed(tmp_path / "1", given)) == []
    given["lm_head.weight"][7, 63] = float("nan")
    one(sealed(tmp_path / "2", given), "lm_head.weight", "1 of 512")
    given = tensors()
    given[f"{EXPERT[:-9]}3.up_proj.scales"][0, 0] = float("nan")
    one(sealed(tmp_path / "3", given), f"{EXPERT[:-9]}3.up_proj", "scales are not all finite")


def test_missing_experts(tmp_path):
    given = {k: v for k, v in tensors().items() if not k.startswith(EXPERT)}
    one(sealed(tmp_path, given), "config.json", "layers hold 3 to 4 experts")


def test_unquantised_against_config(tmp_path):
    given = {"lm_head.weight": torch.randn(8, 64).bfloat16()}
    path = sealed(tmp_path, given)
    one(path, "config.json", "says gptq, no tensor is quantised")


def test_shard_map_against_files(tmp_path):
    def wrong(table):
        table["files"][0]["bytes"] += 1
        table["files"][1]["layer"] = 7
        table["files"][2]["name"] = "none.safetensors"
        return table

    problems = found(sealed(tmp_path, shape_map=wrong))
    assert sum("shard_map.json: none.safetensors" in p for p in problems) == 1
    assert sum("is said to be" in p for p in problems) == 1
    assert sum("of class experts, layer 0" in p for p in problems) == 16
    (tmp_path / "shard_map.json").write_text('{"schema_version": 1}')
    write_sums(tmp_path)
    one(tmp_path, "shard_map.json", "cannot be read")


def test_index_total(tmp_path):
    path = sealed(tmp_path)
    table = json.loads((path / INDEX_NAME).read_text())
    table["metadata"]["total_size"] += 1
    write_json(path / INDEX_NAME, table)
    write_sums(path)
    one(path, "total_size")
