"""The second architecture, which arrived as one file: from an NF4 source to loaded results."""

import dataclasses
import json
import shutil

import pytest
import torch
from hybrid_models import dequantised_state, plain_model
from make_synthetic_checkpoint import write_checkpoint
from support.dense import source_model, source_state
from support.qwen3_moe import CONFIG, micro_moe
from support.variants import bf16_source
from synthetic_geometries import MODELS

from pipeline import hybrid
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.verify import verify_directory
from pipeline.errors import CheckpointError, RecipeError
from pipeline.evaluate.windows import Windows
from pipeline.models import ARCHITECTURES
from pipeline.models.skeleton import geometry_of
from pipeline.plan import plan, prepare
from pipeline.stages.folding import fold_tensors, layer_folds
from pipeline.stages.source import stream_logits

QWEN = ARCHITECTURES["qwen3_moe"]
RECIPES = {
    "gptq": {"group_size": 32},
    "gptq-attention": {"group_size": 64, "modules": ["experts", "attention"]},
    "awq": {"method": "awq", "symmetric": False, "modules": ["experts", "attention"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return micro_moe(tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture
def moe(project, source):
    return project.change(source={"model": str(source)})


def _error(found, wanted):
    return float((found.float() - wanted).norm() / wanted.norm())


def test_source_streamed_is_the_whole_model(source, one_thread):
    ids = torch.randint(5, 512, (3, 50))
    scored = torch.ones(ids.shape, dtype=torch.bool)
    scored[:, 0] = False
    windows = Windows(ids, scored)
    with torch.inference_mode():
        expected = source_model(source, torch.float32)(ids).logits
    device = torch.device("cpu")
    parts = dict(stream_logits(Checkpoint.open(source), QWEN, windows, device, torch.float32))
    assert _error(torch.cat([parts[first] for first in sorted(parts)]), expected) < 1e-5


@pytest.mark.parametrize("name", list(RECIPES))
def test_from_recipe_to_a_loaded_model(moe, name, one_thread):
    moe.change(requantize=RECIPES[name]).run()
    assert verify_directory(moe.output) == []
    report = moe.report()
    assert report["passed"] and report["experts"]["fallback"] == 0
    assert report["experts"]["count"] == 8
    verdict = Checkpoint.open(moe.output).describe().verdict
    form = "awq" if name == "awq" else "gptq"
    assert verdict.startswith(f"qwen3_moe: 2 layers of 8 experts stored one by one as {form} 4")
    ids = torch.randint(5, 512, (2, 40))
    state = dequantised_state(moe.output)
    with torch.inference_mode():
        wanted = plain_model(moe.output, state, torch.float32)(ids).logits
        model = hybrid.load(moe.output, device="cpu", dtype=torch.float32)
        found = model(ids).logits
        made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        again = model(made).logits[:, ids.shape[1] - 1 : -1]
    assert _error(found, wanted) < 1e-4
    chosen = again.gather(-1, made[:, ids.shape[1] :].unsqueeze(-1)).squeeze(-1)
    assert bool((chosen > again.amax(-1) - 1e-3).all())  # each was the likeliest, step by step
    made = json.loads((moe.output / "conversion.json").read_text())["layers"]
    if name == "awq":
        folds = [sorted(layer["folds"]) for layer in made]
        assert folds == [["input_norm", "post_norm", "value"], ["input_norm", "value"], folds[0]]


def _numbered(fold):
    """A fold with every routed expert named: one for each where it has a producer of its own."""
    numbers = [[e] for e in range(8)] if "*" in fold.producer else [range(8)]
    return [
        dataclasses.replace(
            fold,
            producer=fold.producer.replace("*", str(some[0])),
            consumers=tuple(
                dict.fromkeys(c.replace("*", str(e)) for c in fold.consumers for e in some)
            ),
        )
        for some in numbers
    ]


@pytest.mark.parametrize("fold", QWEN.folds, ids=lambda fold: fold.name)
def test_folds_leave_the_model_as_it_is(fold, source, one_thread):
    """By scales that no one would choose; a dense layer has the folds of its attention alone."""
    state = {name: tensor.float() for name, tensor in source_state(source).items()}
    ids = torch.randint(0, 512, (2, 30))
    folded, layers = dict(state), set()
    for layer in range(3):
        if fold not in layer_folds(QWEN, state, layer, QWEN.module_classes):
            continue
        layers.add(layer)
        for one in _numbered(fold):
            made = len(folded[f"{QWEN.layer_prefix(layer)}{one.producer}.weight"])
            scale = torch.rand(made) * 3 + 0.3
            changed, _ = fold_tensors(QWEN, one, layer, folded, scale, CONFIG, torch.float32)
            assert len(changed) == 1 + len(one.consumers)
            folded |= changed
    assert layers == ({0, 1, 2} if fold.name in ("input_norm", "value") else {0, 2})
    with torch.inference_mode():
        before = plain_model(source, state, torch.float32)(ids).logits
        after = plain_model(source, folded, torch.float32)(ids).logits
    assert _error(after, before) < 1e-4


def test_the_official_form_is_a_source_too(source, moe, tmp_path):
    """As transformers 5 saves it, which calls the number of experts `num_local_experts`."""
    folder = bf16_source(source, tmp_path / "bf16")
    assert "num_experts" not in json.loads((folder / "config.json").read_text())
    context = prepare(moe.change(source={"model": str(folder)}).recipe, moe.text)
    assert context.geometry == geometry_of(QWEN, CONFIG, "m")


def test_plan_of_the_true_geometry_from_headers(project, tmp_path, roomy):
    """Qwen3-30B-A3B: 48 layers of 128 experts."""
    model = MODELS["qwen3-30b-a3b"]
    write_checkpoint(model, tmp_path / "headers", seed=0, headers_only=True, threads=1)
    project.change(source={"model": str(tmp_path / "headers")}, requantize={"group_size": 128})
    made = plan(prepare(project.recipe, project.text))
    assert [job.unit for job in made.jobs if "layer" in job.unit][-1].endswith("047")
    experts = 48 * 128 * 3 * 2048 * 768
    written = sum(job.bytes_written for job in made.jobs if job.stage == "requantize")
    assert 4 / 8 * experts < written < 6 / 8 * experts


def test_what_is_refused(moe, source, tmp_path):
    with pytest.raises(RecipeError, match=r"'deltanet' is unknown; known here: experts, attention"):
        prepare(moe.change(requantize={"modules": ["experts", "deltanet"]}).recipe, moe.text)
    with pytest.raises(CheckpointError, match=r"^m/config.json.*sliding window is not supported"):
        geometry_of(QWEN, CONFIG | {"use_sliding_window": True}, "m")
    broken = shutil.copytree(source, tmp_path / "broken")
    config = CONFIG | {"mlp_only_layers": []}  # then layer 1 would have experts
    (broken / "config.json").write_text(json.dumps(config))
    moe.change(requantize={"modules": ["experts"]}, source={"model": str(broken)})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj.* missing"):
        prepare(moe.recipe, moe.text)
