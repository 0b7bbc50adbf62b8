"""AWQ from recipe to directory: verified, loaded, split, killed and resumed, and refused."""

import json
import random
import shutil

import pytest
import torch
from hybrid_models import dequantised_state, plain_model
from safetensors.torch import load_file, save_file
from support.kill import run_killed
from support.recipes import Project, digests

from pipeline import hybrid
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.verify import verify_directory
from pipeline.errors import RecipeError
from pipeline.plan import plan, prepare
from pipeline.stages.shard import split_existing

EVERYTHING = ["experts", "attention", "deltanet", "shared_expert"]
AWQ = {"method": "awq", "symmetric": False, "modules": EVERYTHING}


@pytest.fixture(scope="module")
def loud(tmp_path_factory, micro):
    """The micro model with norms that make some channels loud, so that scales have a meaning."""
    folder = shutil.copytree(micro, tmp_path_factory.mktemp("loud") / "model")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[torch.randperm(len(tensor))[:8]] = 7.0
                tensor[torch.randperm(len(tensor))[:2]] = -1 + 2.0**-8
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory, texts, loud):
    """One conversion of all modules, by a run that was not stopped; and its changes of the disk."""
    project = Project(tmp_path_factory.mktemp("awq"), texts)
    project.change(requantize=AWQ, source={"model": str(loud)})
    threads = torch.get_num_threads()
    project.changes = run_killed(project.data, project.text, "shard", None)
    torch.set_num_threads(threads)
    return project


@pytest.fixture(scope="module")
def output(project):
    return project.output


def test_the_directory_is_awq_and_whole(output, loud):
    assert verify_directory(output) == []
    table = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (table["quant_method"], table["version"], table["zero_point"]) == ("awq", "gemm", True)
    checkpoint = Checkpoint.open(output)
    assert "stored one by one as awq 4 bits; router dense" in checkpoint.describe().verdict
    names = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.endswith("g_idx") for name in names)
    made = json.loads((output / "conversion.json").read_text())["layers"]
    folds = [sorted(layer["folds"]) for layer in made]
    assert folds == [
        ["gated_norm", "input_norm", "post_norm", "shared_up"],
        ["input_norm", "post_norm", "shared_up", "value"],
    ]
    source = Checkpoint.open(loud)
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert not torch.equal(checkpoint.load(norm), source.load(norm))


def test_the_hybrid_model_is_what_the_directory_stands_for(output, one_thread):
    plain = plain_model(output, dequantised_state(output), torch.float32)
    model = hybrid.load(output, device="cpu", dtype=torch.float32)
    ids = torch.randint(0, plain.config.vocab_size, (1, 40))
    with torch.no_grad():
        expected, found = plain(ids).logits, model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_the_way_back_from_the_folds_is_the_source(output, loud, one_thread):
    """The weights as folded, their folds undone, are those of the source but for rounding."""
    made, source = Checkpoint.open(output), Checkpoint.open(loud)

    def loaded(checkpoint, name):
        return checkpoint.load(f"model.layers.0.{name}.weight").float()

    divided = (1 + loaded(source, "post_attention_layernorm")) / (
        1 + loaded(made, "post_attention_layernorm")
    )
    assert float(divided.max() / divided.min()) > 1.5
    for name, bound in (
        ("mlp.gate", 2.0**-8),
        ("mlp.shared_expert_gate", 2.0**-8),
        ("mlp.experts.3.gate_proj", 0.2),
        ("mlp.shared_expert.gate_proj", 0.2),
    ):
        was = loaded(source, name)
        error = (loaded(made, name) / divided - was).norm() / was.norm()
        assert float(error) < bound, name


def test_killed_and_resumed_gives_the_same_bytes(project, loud, tmp_path, texts):
    (written,) = (
        i for i, c in enumerate(project.changes) if "replace" in c and "requantize-layer-000." in c
    )
    for number, kill_at in enumerate((written, random.randrange(3, len(project.changes)))):
        again = Project(tmp_path / str(number), texts)
        again.change(requantize=AWQ, source={"model": str(loud)})
        again.folder.mkdir()
        assert run_killed(again.data, again.text, "shard", kill_at) is None
        again.run(until="shard")
        assert digests(again.output) == digests(project.output), kill_at


def test_it_is_split_like_gptq(output, tmp_path):
    split_existing(output, tmp_path / "split", lambda _line: None)
    assert verify_directory(tmp_path / "split") == []
    for file in output.glob("model-*.safetensors"):
        again, there = load_file(tmp_path / "split" / file.name), load_file(file)
        assert again.keys() == there.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in there.items())


def test_experts_only_in_either_format(tmp_path, texts, one_thread):
    """GPTQ on scaled weights; and what is planned to be written is written."""
    project = Project(tmp_path, texts)
    project.change(requantize={"method": "awq+gptq", "format": "awq", "symmetric": False})
    context = prepare(project.recipe, project.text)
    planned = {job.unit: job for job in plan(context).jobs}
    project.run(until="shard")
    assert verify_directory(project.output) == []
    for layer in (0, 1):
        file = project.output / f"model-experts-layer-{layer:03d}.safetensors"
        job = planned[f"requantize-layer-{layer:03d}"]
        assert job.bytes_written - sum(t.nbytes for t in load_file(file).values()) >= 0
    config = json.loads((project.output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert "mlp.shared_expert.up_proj" in config["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"method": "awq", "bits": 8},
            r"^requantize.bits 8 cannot be stored: AWQ's format holds 4 bits only; change it, or"
            r" set requantize.format to gptq$",
        ),
        ({"format": "awq", "bits": 8}, r"^requantize.bits 8 cannot be stored"),
        ({"format": "gguf"}, r"^requantize.format 'gguf' is unknown; known: awq, gptq$"),
        ({"method": "awk"}, r"^requantize.method 'awk' is unknown; known: awq, awq\+gptq, gptq"),
    ],
)
def test_what_cannot_be_stored(tmp_path, texts, change, said):
    project = Project(tmp_path, texts).change(requantize=change)
    with pytest.raises(RecipeError, match=said):
        prepare(project.recipe, project.text)


def test_an_awq_model_is_no_source(output, tmp_path, texts, cli):
    project = Project(tmp_path, texts).change(source={"model": str(output)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(project.text)
    answer = cli("plan", recipe)
    assert answer.code == 2
    assert "is already quantised as awq; split it as it is with `requant shard`" in answer.err
    assert answer.err.count("\n") == 1
