"""Assembling our own output, and splitting GPTQ models that others made."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import edit_json
from support.recipes import digests

from pipeline import hybrid
from pipeline.checkpoint.shard_map import read_shard_map
from pipeline.checkpoint.verify import verify_directory
from pipeline.errors import CheckpointError, OutputError, ResourceError
from pipeline.stages import nonexpert
from pipeline.stages.shard import split_existing

SIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def single(finished, tmp_path):
    """Our output as others publish theirs: one file, no index, none of our tables."""
    folder = tmp_path / "single"
    folder.mkdir()
    tensors = {}
    for file in finished.output.glob("model-*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in SIDE:
        shutil.copyfile(finished.output / name, folder / name)
    return folder


def _ours(folder):
    return {k: v for k, v in digests(folder).items() if k.startswith("model")}


def test_output_directory(finished):
    names = {path.name for path in finished.output.iterdir()}
    assert names == {
        *SIDE,
        "special_tokens_map.json",
        "model-nonexpert-00001-of-00001.safetensors",
        "model-experts-layer-000.safetensors",
        "model-experts-layer-001.safetensors",
        "model.safetensors.index.json",
        "shard_map.json",
        "validation_reference.safetensors",
        "SHA256SUMS",
        "conversion.json",
        "recipe.yaml",
        "recipe.resolved.yaml",
        "report.json",
        "report.html",
        "README.md",
    }
    assert (finished.output / "recipe.yaml").read_text() == finished.text
    assert verify_directory(finished.output) == []
    mask = os.umask(0)
    os.umask(mask)
    for path in finished.output.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_packed_bytes_and_frequencies(finished):
    table = read_shard_map(finished.output)
    # two matrices of [128, 128] and one more: codes, scales, zeros, g_idx at groups of 32
    expert = 3 * (128 * 128 // 2 + 4 * 128 * 2 + 4 * 128 // 2 + 128 * 4)
    made = json.loads((finished.output / "conversion.json").read_text())
    for layer in (0, 1):
        entry = table["layers"][str(layer)]
        assert (entry["experts"], entry["bytes_per_expert"]) == (8, expert)
        tokens = made["layers"][layer]["tokens"]
        assert entry["activation_frequency"] == [round(n / sum(tokens), 9) for n in tokens]
    assert {file["class"] for file in table["files"]} == {"nonexpert", "experts"}


def test_a_single_file_is_split(single, finished, tmp_path):
    """Back to the very files that it was merged from; nothing is decoded on the way."""
    said = []
    split_existing(single, tmp_path / "split", said.append)
    assert len(said) == 2
    assert _ours(tmp_path / "split") == _ours(finished.output)
    assert verify_directory(tmp_path / "split") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["single", "split"]
    table = read_shard_map(tmp_path / "split")
    assert table["layers"]["0"]["activation_frequency"] is None
    model = hybrid.load(tmp_path / "split")
    assert not any(p.is_meta for p in model.parameters())
    split_existing(single, tmp_path / "split", said.append)  # again, over its own result
    assert _ours(tmp_path / "split") == _ours(finished.output)


def test_config_kept_in_the_older_place(single, finished, tmp_path):
    """AutoGPTQ wrote quantize_config.json; what is split carries it in config.json."""
    config = json.loads((single / "config.json").read_text())
    settings = config.pop("quantization_config")
    (single / "config.json").write_text(json.dumps(config))
    (single / "quantize_config.json").write_text(json.dumps(settings))
    split_existing(single, tmp_path / "split", lambda _line: None)
    made = json.loads((tmp_path / "split" / "config.json").read_text())
    assert made["quantization_config"] == settings
    assert verify_directory(tmp_path / "split") == []


def _without_expert(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if ".1.mlp.experts.7.up_proj" not in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


BAD = {
    "an expert missing": (_without_expert, "layers.1.mlp.experts.7.up_proj.weight is missing"),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json"),
    "a config without sizes": (
        lambda s: edit_json(s / "config.json", lambda c: c.pop("num_experts")),
        "'num_experts' is missing",
    ),
    "truncated": (
        lambda s: (s / "model.safetensors").write_bytes(b"12345678" * 3),
        "model.safetensors: header length",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_models_that_cannot_be_split(single, tmp_path, case):
    spoil, said = BAD[case]
    spoil(single)
    with pytest.raises(CheckpointError, match=said):
        split_existing(single, tmp_path / "split", lambda _line: None)
    assert not (tmp_path / "split").exists() and not (tmp_path / "split.partial").exists()


def test_nf4_is_converted_not_split(micro, tmp_path):
    with pytest.raises(CheckpointError, match=r"stored as nf4; only GPTQ and AWQ .*requant run"):
        split_existing(micro, tmp_path / "split", lambda _line: None)


def test_never_over_the_model_or_into_it(finished, single):
    before = digests(finished.output, ())
    for output in (finished.output, finished.output / "split"):
        with pytest.raises(OutputError, match="is the model's own directory, or inside it"):
            split_existing(finished.output, output, lambda _line: None)
    with pytest.raises(OutputError, match="is not empty and was not made by requant"):
        split_existing(finished.output, single, lambda _line: None)
    assert digests(finished.output, ()) == before


def test_nonexpert_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(nonexpert, "NONEXPERT_BYTES", 1000)
    tensors = {f"model.layers.{i}.x.weight": torch.randn(100) for i in range(7)}
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    (tmp_path / "model-nonexpert-00001-of-00009.safetensors").touch()  # of an earlier attempt
    written = nonexpert.write_nonexpert(tmp_path, described, tensors.__getitem__)
    assert len(written) == 4
    assert {f.name for f in tmp_path.iterdir()} == {record.name for record in written}
    found = {}
    for file in tmp_path.iterdir():
        assert sum(t.nbytes for t in load_file(file).values()) <= 1000
        found |= load_file(file)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_shard_that_cannot_be_read_leaves_whole_ones_only(tmp_path, monkeypatch):
    monkeypatch.setattr(nonexpert, "NONEXPERT_BYTES", 1000)
    described = {f"{i}": (torch.float32, (100,)) for i in range(7)}

    def read(name):
        if name == "3":
            raise CheckpointError("3: has been changed")
        return torch.zeros(100)

    with pytest.raises(CheckpointError, match="has been changed"):
        nonexpert.write_nonexpert(tmp_path, described, read)
    for file in tmp_path.iterdir():
        assert "3" not in load_file(file)


def test_a_conversion_is_never_replaced(single, project):
    """Neither a finished one nor the work of one that is under way."""
    project.run(until="requantize")
    with pytest.raises(OutputError, match="unfinished work of another run"):
        split_existing(single, project.output, lambda _line: None)
    assert project.partial.is_dir()
    project.run(until="shard")
    before = digests(project.output)
    with pytest.raises(OutputError, match="holds a converted model"):
        split_existing(single, project.output, lambda _line: None)
    assert digests(project.output) == before


def test_no_room_for_a_split(single, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="1000 B free"):
        split_existing(single, tmp_path / "split", lambda _line: None)
    assert not (tmp_path / "split.partial").exists()


def test_a_users_file_beside_a_split_is_kept(single, tmp_path):
    split_existing(single, tmp_path / "split", lambda _line: None)
    note = tmp_path / "split" / "notes.txt"
    note.write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt, which is not ours"):
        split_existing(single, tmp_path / "split", lambda _line: None)
    assert note.read_text() == "mine"
