"""The synthetic checkpoints that time and memory are measured on, cut small: hidden size and
expert shapes are the true ones, layers, experts and vocabulary are few."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from make_synthetic_checkpoint import STD, TOKENIZER, outside_experts, write_checkpoint
from support.recipes import Project, digests
from synthetic_converted import METHODS, write_converted
from synthetic_geometries import MODELS

from pipeline import hybrid
from pipeline.checkpoint.reader import Checkpoint
from pipeline.hybrid.native.library import name as kernel_name
from pipeline.plan import prepare
from pipeline.stages.verify import verify_model

VOCABULARY = 3072


def small(name: str, experts: int):
    """One layer of a model, with the vocabulary of the tokenizer it comes with."""
    model = MODELS[name].cut(1, experts)
    config = model.config | {"vocab_size": VOCABULARY}
    return replace(model, vocabulary=VOCABULARY, config=config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    write_checkpoint(small("qwen3-next-80b", 12), folder, seed=1, headers_only=False, threads=2)
    return folder


def test_it_is_a_source_to_convert(made, texts, tmp_path):
    project = Project(tmp_path, texts).change(source={"model": str(made)})
    context = prepare(project.recipe, project.text)
    assert context.geometry.experts == 12
    assert {w.format for n, w in context.checkpoint.weights.items() if "experts" in n} == {"nf4"}


def test_weights_are_of_the_size_that_keeps_activations(made):
    checkpoint = Checkpoint.open(made)
    names = [f"model.layers.0.mlp.experts.{i}.gate_proj.weight" for i in range(12)]
    stack = checkpoint.load_stack(names, dtype=torch.float32)
    assert stack.shape == (12, 512, 2048)
    assert 0.8 * STD < float(stack.std()) < 1.5 * STD
    rows, columns = stack.std((0, 2)), stack.std((0, 1))
    assert float(rows.std() / rows.mean()) > 0.02  # rows differ more than 24,576 draws would
    assert 1 <= int((columns > 5 * columns.median()).sum()) <= 4  # outlier columns
    assert not torch.equal(stack[0], stack[1])


def test_router_prefers_some_experts(made):
    router = Checkpoint.open(made).load("model.layers.0.mlp.gate.weight").float()
    norms = router.norm(dim=1)
    assert float(norms.max() / norms.min()) > 1.3


def test_bytes_depend_on_the_seed_alone(made, tmp_path):
    model = small("qwen3-next-80b", 12)
    write_checkpoint(model, tmp_path / "same", seed=1, headers_only=False, threads=1)
    assert digests(tmp_path / "same") == digests(made)
    write_checkpoint(model, tmp_path / "other", seed=2, headers_only=False, threads=1)
    assert digests(tmp_path / "other") != digests(made)


def test_headers_alone(made, tmp_path):
    model = small("qwen3-next-80b", 12)
    write_checkpoint(model, tmp_path / "headers", seed=1, headers_only=True, threads=1)
    whole, headers = Checkpoint.open(made), Checkpoint.open(tmp_path / "headers")
    assert headers.headers_only
    assert headers.entries == whole.entries


@pytest.mark.parametrize("name", list(MODELS))
def test_names_are_those_of_the_transformers_model(name, tmp_path):
    model = small(name, 8 if name == "mixtral-8x7b" else 12)
    write_checkpoint(model, tmp_path / "model", seed=0, headers_only=True, threads=1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("quantization_config")
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(
            transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
        )
    stored = Checkpoint.open(tmp_path / "model").weights
    experts = f".{model.experts_module}."
    mine = {n: w.elements for n, w in stored.items() if experts not in n}
    # transformers 5 calls Mixtral's blocks otherwise than its checkpoints do.
    mine = {n.replace("block_sparse_moe", "mlp"): e for n, e in mine.items()}
    theirs = {n: p.numel() for n, p in skeleton.named_parameters() if ".experts." not in n}
    assert mine == theirs


def test_fewer_experts_than_a_token_wants():
    with pytest.raises(ValueError, match="more than 9 experts"):
        MODELS["qwen3-next-80b"].cut(1, 9)


@pytest.mark.parametrize("method", list(METHODS))
def test_converted_models_are_whole_and_run(method, tmp_path, one_thread):
    """The same bytes from any number of processes; more experts than are made at once."""
    model = small("qwen3-next-80b", 40)
    for threads in (1, 2):
        write_converted(
            model,
            tmp_path / str(threads),
            outside_experts(model),
            method=method,
            seed=3,
            threads=threads,
            side=TOKENIZER,
        )
    path = tmp_path / "1"
    assert digests(path) == digests(tmp_path / "2")
    assert verify_model(path) == []
    names = [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in (0, 39)]
    stack = Checkpoint.open(path).load_stack(names, dtype=torch.float32)
    assert 0.8 * STD < float(stack.std()) / 2 < 1.5 * STD
    assert not torch.equal(stack[0], stack[1])
    loaded = hybrid.load(path, device="cpu")
    with torch.inference_mode():
        logits = loaded(torch.randint(5, VOCABULARY, (1, 3)), use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert loaded.hybrid_placement["backends"]["experts"].keys() <= {"int4pack", kernel_name()}
