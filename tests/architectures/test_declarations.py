"""Every architecture's declaration against the model that transformers builds from a config."""

import json

import pytest
import torch
from support.qwen3_moe import CONFIG as QWEN3_MOE
from support.recipes import MICRO
from torch import nn

from pipeline.models import ARCHITECTURES
from pipeline.models.skeleton import build_skeleton, geometry_of, model_config

CONFIGS = {
    "qwen3_next": json.loads((MICRO / "config.json").read_text()),
    "qwen3_moe": QWEN3_MOE,
}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def declared(request):
    """An architecture, its geometry, and the model without weights."""
    architecture, config = ARCHITECTURES[request.param], CONFIGS[request.param]
    skeleton = build_skeleton(model_config(config), torch.bfloat16)
    return architecture, geometry_of(architecture, config, "m"), skeleton


def _there(model, name):
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def test_names_are_modules_of_the_model(declared):
    architecture, geometry, skeleton = declared
    linears = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    for name in (architecture.embedding, architecture.final_norm, architecture.head):
        skeleton.get_submodule(name)
    known = {architecture.head}
    groups = (*architecture.mixer_groups, *architecture.shared_groups)
    for layer in range(geometry.layers):
        prefix = architecture.layer_prefix(layer)
        assert _there(skeleton, prefix + architecture.experts) == (layer in geometry.moe_layers)
        if layer in geometry.moe_layers:
            experts = skeleton.get_submodule(prefix + architecture.experts)
            wide = (geometry.experts, 2 * geometry.inner, geometry.hidden)
            assert experts.gate_up_proj.shape == wide
            skeleton.get_submodule(prefix + architecture.router)
        for norm in architecture.residual_norms:
            skeleton.get_submodule(prefix + norm)
        names = [m for group in groups for m in group.modules]
        known |= {prefix + name for name in (*names, *architecture.never_quantized)}
    # every linear module is either chosen by some class, or declared never to be quantised
    assert linears <= known


def test_every_name_is_somewhere(declared):
    """No group, fold or exception names a module that no layer has."""
    architecture, geometry, skeleton = declared
    groups = (*architecture.mixer_groups, *architecture.shared_groups)
    names = {m for group in groups for m in group.modules} | set(architecture.never_quantized)
    for fold in architecture.folds:
        names |= {m for m in (fold.producer, *fold.consumers) if "*" not in m}
    layers = [architecture.layer_prefix(i) for i in range(geometry.layers)]
    assert [n for n in names if not any(_there(skeleton, p + n) for p in layers)] == []


def test_modules_of_a_group_read_the_same_input(declared):
    architecture, geometry, skeleton = declared
    for group in (*architecture.mixer_groups, *architecture.shared_groups):
        for layer in range(geometry.layers):
            names = [architecture.layer_prefix(layer) + m for m in group.modules]
            found = [skeleton.get_submodule(n) for n in names if _there(skeleton, n)]
            assert len(found) in (0, len(names))
            assert len({module.in_features for module in found}) <= 1
