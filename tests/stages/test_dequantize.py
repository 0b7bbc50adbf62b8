"""The bf16 checkpoint: what transformers makes of it, and that a kill does not spoil it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from support.damage import dense_experts
from support.dense import source_model, source_state
from support.kill import run_killed
from support.recipes import Project, digests
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.checkpoint.verify import verify_directory
from pipeline.stages.dequantize import CHECK_UNIT


@pytest.fixture(scope="module")
def written(tmp_path_factory, texts):
    """The bf16 directory of the micro model."""
    project = Project(tmp_path_factory.mktemp("written"), texts)
    project.change(dequantize={"write": True}).run(until="dequantize")
    return project


def test_transformers_loads_it_and_gives_the_sources_logits(written, micro, one_thread):
    folder = written.folder / "out-bf16"
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = torch.randint(5, 512, (2, 48))
    with torch.inference_mode():
        expected = source_model(micro, torch.float32)(tokens).logits
        found = model.eval()(tokens).logits
    assert torch.equal(found, expected)


def test_every_tensor_is_bitsandbytes_own_value(written, micro):
    folder = written.folder / "out-bf16"
    expected = source_state(micro)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, expected.pop(name).to(torch.bfloat16)), name
                assert index["weight_map"][name] == file.name
    assert expected == {}
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(folder)("value").input_ids
    assert verify_directory(folder) == []


def test_killed_at_any_moment(written, tmp_path, texts):
    expected = digests(written.folder / "out-bf16", ())
    data = Project(tmp_path / "count", texts).change(dequantize={"write": True})
    data.folder.mkdir()
    changes = run_killed(data.data, data.text, "dequantize", None)
    renamed = next(i for i, change in enumerate(changes) if change.startswith("rename"))
    layer = next(i for i, c in enumerate(changes) if c.startswith("replace") and "layer-001" in c)
    for kill_at in (layer, renamed, renamed + 1):
        project = Project(tmp_path / str(kill_at), texts).change(dequantize={"write": True})
        project.folder.mkdir()
        assert run_killed(project.data, project.text, "dequantize", kill_at) is None
        target = project.folder / "out-bf16"
        assert target.exists() == (kill_at > renamed)
        project.run(until="dequantize")
        assert digests(target, ()) == expected
        assert sorted(p.name for p in project.folder.iterdir()) == ["out-bf16", "out.partial"]


def test_an_earlier_one_is_kept_or_replaced(written, tmp_path, texts, micro):
    project = Project(tmp_path, texts)
    target = tmp_path / "out-bf16"
    shutil.copytree(written.folder / "out-bf16", target)
    inode = target.stat().st_ino
    project.change(dequantize={"write": True}).run(until="dequantize")
    assert target.stat().st_ino == inode  # made from the very same source
    source = shutil.copytree(micro, tmp_path / "source")
    dense_experts(source, 96)
    project.change(source={"model": str(source)}).run(until="dequantize", fresh=True)
    assert target.stat().st_ino != inode
    config = json.loads((target / "config.json").read_text())
    assert config["moe_intermediate_size"] == 96
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "out-bf16", "out.partial"}


def test_the_check_notes_what_it_saw(project, micro):
    project.run(until="dequantize")
    marker = project.work().finished(CHECK_UNIT)
    assert marker.data["formats"] == {"nf4": 65, "dense": 13}
    expected = digests(micro)
    for name, file in marker.data["files"].items():
        assert file["sha256"] == expected[name]
        assert file["size"] == (micro / name).stat().st_size
    assert len(marker.data["files"]) == 3


def test_experts_left_in_bf16_beside_quantised_attention(project, micro):
    """What transformers 5 writes: converted like any other."""
    source = shutil.copytree(micro, project.folder / "source")
    dense_experts(source, 96)
    project.change(source={"model": str(source)}, dequantize={"write": True})
    project.run(until="shard")
    assert verify_directory(project.output) == []
    made = json.loads((project.output / "conversion.json").read_text())
    assert len(made["layers"]) == 2
    assert set(made["stages"]) == {"dequantize", "requantize", "shard"}
    written = source_state(source)
    with safe_open(project.folder / "out-bf16" / "model-layer-000.safetensors", "pt") as opened:
        name = "model.layers.0.mlp.experts.7.down_proj.weight"
        assert torch.equal(opened.get_tensor(name), written[name])
