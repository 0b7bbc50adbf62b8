"""How a model is divided into files, and the map of them."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.index import build_index
from pipeline.checkpoint.names import expert_of, natural
from pipeline.checkpoint.shard_map import (
    GIB,
    GPU_GIB,
    MAP_NAME,
    LayerExperts,
    MappedFile,
    Reserve,
    build_shard_map,
    place,
    read_shard_map,
)
from pipeline.checkpoint.split import plan_split
from pipeline.checkpoint.writer import write_json
from pipeline.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.qweight", (3, 17, "gate_proj.qweight")),
        ("model.layers.3.mlp.experts.gate_up_proj", (3, None, "gate_up_proj")),
        ("model.language_model.layers.9.mlp.experts.0.up_proj.weight", (9, 0, "up_proj.weight")),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", (1, 7, "w1.weight")),
        ("model.layers.3.mlp.shared_expert.gate_proj.weight", None),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", None),
        ("model.layers.3.mlp.gate.weight", None),
        ("mtp.layers.0.mlp.experts.3.gate_proj.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_expert_names(name, found):
    assert expert_of(name) == found


def test_natural_order():
    names = ["a.10.w", "a.9.w", "a.w", "a.9.v", "b"]
    assert sorted(names, key=natural) == ["a.9.v", "a.9.w", "a.10.w", "a.w", "b"]


def model_sizes():
    sizes = {"model.embed_tokens.weight": 900, "lm_head.weight": 900}
    for layer in range(11):
        for part, size in (("qweight", 50), ("scales", 10)):
            sizes[f"model.layers.{layer}.self_attn.q_proj.{part}"] = size
            for expert in range(12):
                sizes[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.{part}"] = size
    return sizes


def test_split():
    sizes = model_sizes()
    names = list(sizes)
    random.shuffle(names)
    shards = plan_split({name: sizes[name] for name in names}, 1000)
    assert shards == plan_split(sizes, 1000)
    assert sorted(name for shard in shards for name in shard.tensors) == sorted(sizes)
    plain = [shard for shard in shards if shard.kind == "nonexpert"]
    assert [shard.name for shard in plain] == [
        f"model-nonexpert-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    for shard in plain:
        assert shard.nbytes == sum(sizes[name] for name in shard.tensors) <= 1000
        modules = {name.rpartition(".")[0] for name in shard.tensors}
        assert all(f"{m}.scales" in shard.tensors for m in modules if "q_proj" in m)
    experts = [shard for shard in shards if shard.kind == "experts"]
    assert [shard.name for shard in experts][-1] == "model-experts-layer-010.safetensors"
    assert [shard.layer for shard in experts] == list(range(11))
    assert experts[3].tensors[:3] == (
        "model.layers.3.mlp.experts.0.up_proj.qweight",
        "model.layers.3.mlp.experts.0.up_proj.scales",
        "model.layers.3.mlp.experts.1.up_proj.qweight",
    )


def test_module_larger_than_a_file_has_its_own():
    shards = plan_split({"a.w": 10, "b.w": 500, "c.w": 10, "d.w": 10}, 100)
    assert [shard.tensors for shard in shards] == [("a.w",), ("b.w",), ("c.w", "d.w")]
    assert plan_split({}, 100) == []


def test_index():
    index = build_index({"f2": {"b": 2}, "f1": {"c": 3, "a": 1}})
    assert index["metadata"]["total_size"] == 6
    assert list(index["weight_map"].items()) == [("a", "f1"), ("b", "f2"), ("c", "f1")]


RESERVE = Reserve(context=1 << 28, workspace=1 << 28, cache=1 << 28)


@given(
    nonexpert=st.integers(0, 12 * GIB),
    layers=st.integers(1, 5),
    experts=st.integers(1, 40),
    size=st.integers(1 << 20, 1 << 28),
    seed=st.integers(0, 1000),
    counted=st.booleans(),
)
def test_placement_fits_and_is_greedy(*, nonexpert, layers, experts, size, seed, counted):
    rng = random.Random(seed)
    table = {
        i: LayerExperts(
            experts, size, [rng.randrange(1000) for _ in range(experts)] if counted else None
        )
        for i in range(layers)
    }
    for gib in (8, 80):
        placement = place(gib, nonexpert, table, RESERVE)
        free = gib * GIB - nonexpert - RESERVE.total
        assert placement.fits == (free >= 0)
        used = sum(placement.resident.values())
        assert used == max(0, min(layers * experts, free // size))
        assert all(0 <= n <= experts for n in placement.resident.values())
        if not counted:
            counts = placement.resident.values()
            assert max(counts) - min(counts) <= 1


def test_most_used_experts_go_first():
    skewed = LayerExperts(4, GIB, [97, 1, 1, 1])
    level = LayerExperts(4, GIB, [25, 25, 25, 25])
    placement = place(8, 0, {0: skewed, 1: level}, Reserve(GIB, GIB, GIB))
    assert placement.resident == {0: 1, 1: 4}
    assert placement.expected_hits == pytest.approx((0.97 + 1) / 2)


def test_map(tmp_path):
    files = [
        MappedFile("model-nonexpert-00001-of-00001.safetensors", "nonexpert", None, 5 * GIB, "ab"),
        MappedFile("model-experts-layer-000.safetensors", "experts", 0, GIB),
    ]
    table = build_shard_map(files, {0: LayerExperts(512, GIB // 512, [3] * 512)}, RESERVE)
    write_json(tmp_path / MAP_NAME, table)
    read = read_shard_map(tmp_path)
    assert read == json.loads(json.dumps(table))
    assert read["schema_version"] == 1
    assert read["files"][0] == {
        "name": files[0].name, "class": "nonexpert", "layer": None, "bytes": 5 * GIB,
        "sha256": "ab",
    }  # fmt: skip
    assert "sha256" not in read["files"][1]
    assert [p["memory_gib"] for p in read["placements"]] == list(GPU_GIB)
    assert read["placements"][-1]["resident_experts"] == {"0": 512}
    assert read["placements"][-1]["expected_hits"] == pytest.approx(1, abs=1e-4)
    assert sum(read["layers"]["0"]["activation_frequency"]) == pytest.approx(1, abs=1e-5)
    write_json(tmp_path / MAP_NAME, table | {"schema_version": 99})
    with pytest.raises(CheckpointError, match="schema version 99"):
        read_shard_map(tmp_path)


def test_map_says_when_not_even_the_rest_fits():
    files = [MappedFile("n", "nonexpert", None, 9 * GIB)]
    table = build_shard_map(files, {0: LayerExperts(4, GIB)}, RESERVE)
    small, large = table["placements"][0], table["placements"][-1]
    assert not small["fits"]
    assert "1.75 GiB more" in small["note"]
    assert "resident_experts" not in small
    assert large["fits"]
    assert large["expected_hits"] is None
    assert table["layers"]["0"]["activation_frequency"] is None
