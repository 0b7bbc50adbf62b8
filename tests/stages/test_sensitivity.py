"""What a layer's output is read by, against the matrices added up one by one."""

from __future__ import annotations

import pytest
import torch

from pipeline.checkpoint.reader import Checkpoint
from pipeline.models.skeleton import architecture_of
from pipeline.stages.sensitivity import ROUTER_SHARE, Sensitivity

CPU = torch.device("cpu")
MIXERS = {
    0: ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    1: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}


def unit(matrices):
    """Gram matrix of stacked readers, of trace 1."""
    stacked = torch.cat(matrices).double()
    gram = stacked.T @ stacked
    return gram / gram.trace()


@pytest.fixture
def model(micro):
    checkpoint = Checkpoint.open(micro)
    return checkpoint, architecture_of(checkpoint.config, str(micro))


def behind(checkpoint, first, layers=2):
    """The sum over layers from `first` on, and the head, float64."""

    def load(name):
        return checkpoint.load(f"{name}.weight").float()

    head = load("lm_head") * (1 + load("model.norm"))
    total = unit([head - head.mean(0)])
    for layer in range(first, layers):
        prefix = f"model.layers.{layer}."
        gain = 1 + load(f"{prefix}input_layernorm")
        total += unit([load(prefix + name) * gain for name in MIXERS[layer]])
        router = load(f"{prefix}mlp.gate") * (1 + load(f"{prefix}post_attention_layernorm"))
        total += ROUTER_SHARE * unit([router - router.mean(0)])
    return total


def test_everything_behind_a_layer_counts(model):
    checkpoint, architecture = model
    sensitivity = Sensitivity(checkpoint, architecture, CPU)
    for layer in range(2):
        found = sensitivity.after(layer).double()
        torch.testing.assert_close(found, behind(checkpoint, layer + 1), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_gets_the_same_bytes(model):
    whole, resumed = Sensitivity(*model, CPU), Sensitivity(*model, CPU)
    whole.after(0)
    assert torch.equal(whole.after(1), resumed.after(1))
    assert torch.equal(whole.after(1), resumed.after(1))
    with pytest.raises(ValueError, match="layer 0 was asked for after layer 1"):
        whole.after(0)
