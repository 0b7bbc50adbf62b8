"""The declaration of Qwen3-Next against the model that transformers builds from the same config."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.models import ARCHITECTURES
from pipeline.models.skeleton import (
    architecture_of,
    assign,
    build_skeleton,
    geometry_of,
    model_config,
    rotary_embedding,
)

QWEN = ARCHITECTURES["qwen3_next"]


@pytest.fixture(scope="module")
def config(micro):
    return json.loads((micro / "config.json").read_text())


def test_norms_multiply_by_one_plus_w(micro):
    """The form that folds depend on, from what the module does."""
    model = AutoModelForCausalLM.from_config(model_config(Checkpoint.open(micro).config))
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(3, 128)
    with torch.no_grad():
        norm.weight.zero_()
        plain = norm(x)
        norm.weight.fill_(0.5)
        assert QWEN.norm_form == "1+w"
        assert torch.allclose(norm(x), 1.5 * plain) and plain.abs().max() > 0.1


def test_geometry_without_optional_keys(config):
    plain = {k: v for k, v in config.items() if k not in {"layer_types", "mlp_only_layers"}}
    kinds = geometry_of(QWEN, plain, "m").layer_kinds
    assert kinds == ("linear_attention", "full_attention")
    eight = {**plain, "num_hidden_layers": 8, "full_attention_interval": 4}
    assert geometry_of(QWEN, eight, "m").layer_kinds.index("full_attention") == 3
    sparse = {**eight, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert geometry_of(QWEN, sparse, "m").moe_layers == (1, 5, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": None}, "malformed"),
        ({"num_experts_per_tok": 9}, "sizes are impossible"),
        ({"vocab_size": 0}, "sizes are impossible"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"mlp_only_layers": [0, 1]}, "no layer with routed experts"),
    ],
)
def test_configs_that_make_no_sense(config, change, said):
    with pytest.raises(CheckpointError, match=rf"^dir.*{said}"):
        geometry_of(QWEN, {**config, **change}, "dir")


def test_unknown_architecture():
    with pytest.raises(
        CheckpointError, match=r"^dir: model_type 'gpt2' is not .* qwen3_moe, qwen3_next"
    ):
        architecture_of({"model_type": "gpt2"}, "dir")


def test_skeleton_has_no_memory_and_no_quantisation(config):
    model = build_skeleton(model_config(config), torch.float32)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert getattr(model.config, "quantization_config", None) is None
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    rotary = rotary_embedding(model, torch.device("cpu"))
    cos, _ = rotary(torch.zeros(1, 4, 128), torch.arange(4).unsqueeze(0))
    assert not cos.is_meta and bool((cos[:, 0] == 1).all())


def test_assigning_is_exact():
    module = nn.Linear(3, 2, device="meta")
    good = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    with pytest.raises(CheckpointError, match="tensor bias is missing"):
        assign(module, {"weight": good["weight"]})
    with pytest.raises(
        CheckpointError, match=r"weight has shape \(3, 2\), the config asks for \(2"
    ):
        assign(module, {**good, "weight": good["weight"].T})
    with pytest.raises(CheckpointError, match="tensor other is in the checkpoint but not in the"):
        assign(module, {**good, "other": good["bias"]})
    assign(module, good)
    assert module.weight.data_ptr() == good["weight"].data_ptr()
    assert not module.weight.requires_grad
    assign(module, {"weight": torch.zeros(2, 3)}, ignore=("bias",))
    assert torch.equal(module.bias, good["bias"])
