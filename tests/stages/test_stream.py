"""The streaming pass against the whole model, as transformers runs it."""

import json
from functools import partial

import pytest
import torch
from hybrid_models import dequantised
from safetensors.torch import load_file
from support.dense import source_model

from pipeline.checkpoint import Checkpoint
from pipeline.errors import NumericalError
from pipeline.evaluate.windows import Windows
from pipeline.models import ARCHITECTURES
from pipeline.stages import experts, requantize, stream, tiles
from pipeline.stages.source import stream_logits
from pipeline.stages.units import layer_unit, streams_file

QWEN = ARCHITECTURES["qwen3_next"]


@pytest.fixture
def in_float32(monkeypatch, cpu_only):
    """The whole conversion in float32: what remains of a difference is a mistake, no rounding."""
    for module in (experts, requantize):
        monkeypatch.setattr(module, "COMPUTE_DTYPE", torch.float32)
    for module, function in ((requantize, stream.LayerStream), (tiles, experts.decode_tile)):
        exact = partial(function, dtype=torch.float32)
        monkeypatch.setattr(module, function.__name__, exact)


def _windows(count, length):
    ids = torch.randint(5, 512, (count, length))
    scored = torch.ones(ids.shape, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(ids, scored)


def _streamed(micro, windows, dtype):
    parts = dict(stream_logits(Checkpoint.open(micro), QWEN, windows, torch.device("cpu"), dtype))
    return torch.cat([parts[first] for first in sorted(parts)])


def _relative(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


def test_source_equals_the_whole_model(micro, one_thread):
    windows = _windows(3, 70)  # no multiple of DeltaNet's chunk
    with torch.inference_mode():
        expected = source_model(micro, torch.float32)(windows.token_ids).logits
    found = _streamed(micro, windows, torch.float32)
    assert found.shape == expected.shape
    assert _relative(found, expected) < 1e-5


def test_bf16_is_as_near_as_transformers_own(micro, one_thread):
    """An untrained model doubles noise quickly: what counts is that ours is not the larger."""
    windows = _windows(4, 64)
    with torch.inference_mode():
        exact = source_model(micro, torch.float32)(windows.token_ids).logits
        plain = source_model(micro, torch.bfloat16)(windows.token_ids).logits
    found = _streamed(micro, windows, torch.bfloat16)
    assert 0 < _relative(found, exact) < 1.5 * _relative(plain, exact) < 0.2


def test_token_batches_change_nothing(micro, one_thread, monkeypatch):
    windows = _windows(5, 32)
    whole = _streamed(micro, windows, torch.float32)
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", 64)
    assert _relative(_streamed(micro, windows, torch.float32), whole) < 1e-5


def test_a_layer_holds_memory_while_it_is_the_current_one_only(micro):
    layers = stream.LayerStream(Checkpoint.open(micro), QWEN, torch.device("cpu"))
    first = layers.build_layer(0, layers.load_dense(0))
    again = layers.build_layer(0, layers.load_dense(0))
    assert again is first
    assert not any(p.is_meta for p in first.parameters())
    second = layers.build_layer(1, layers.load_dense(1))
    assert all(p.is_meta for p in first.parameters())
    assert not any(p.is_meta for p in second.parameters())


def _counted(model, tokens):
    """Tokens that every expert of every layer sees in a forward pass of the whole model."""
    counts = {}

    def hook(layer):
        def count(_module, inputs):
            counts[layer] = torch.bincount(inputs[1].flatten(), minlength=8)

        return count

    handles = [
        block.mlp.experts.register_forward_pre_hook(hook(i))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        hidden = model.model(tokens).last_hidden_state
    for handle in handles:
        handle.remove()
    return hidden, counts


EVERYTHING = ["experts", "attention", "deltanet", "shared_expert"]


@pytest.mark.parametrize("modules", [["experts"], EVERYTHING])
def test_both_streams_equal_whole_models(project, one_thread, in_float32, modules):
    """Evaluation goes through the source, calibration through the quantised model; the experts'
    token counts are those of the quantised model."""
    project.change(requantize={"modules": modules})
    context = project.run(until="requantize")
    saved = load_file(project.partial / streams_file(1))
    markers = [context.work.finished(layer_unit(i)) for i in range(2)]
    project.run(until="shard")

    def final(model, hidden):
        return model.model.norm(hidden)

    plain = source_model(context.checkpoint.path, torch.float32)
    expected, _ = _counted(plain, context.texts.windows.token_ids)
    with torch.inference_mode():
        assert _relative(final(plain, saved["evaluation"]), expected) < 1e-5

    quantised = dequantised(project.output, torch.float32)
    expected, counts = _counted(quantised, context.texts.calibration)
    with torch.inference_mode():
        assert _relative(final(quantised, saved["calibration"]), expected) < 1e-5
    for layer, marker in enumerate(markers):
        assert marker.data["tokens"] == counts[layer].tolist()
        assert sum(marker.data["tokens"]) == 8 * 64 * 2
        assert len(marker.data["gate_up_loss"]) == len(marker.data["down_loss"]) == 8
        assert all(0 < loss < 0.2 for loss in marker.data["gate_up_loss"])


def test_routed_counts_in_bf16(project, one_thread, cpu_only):
    """As `requant run` does it: counts of the first layer exactly, of the next up to noise."""
    context = project.run(until="shard")
    layers = json.loads((project.output / "conversion.json").read_text())["layers"]
    model = dequantised(project.output, torch.bfloat16)
    _, counts = _counted(model, context.texts.calibration)
    assert layers[0]["tokens"] == counts[0].tolist()
    moved = (torch.tensor(layers[1]["tokens"]) - counts[1]).abs().sum() / 2
    assert moved <= 0.02 * counts[1].sum()


def test_non_finite_activations_are_named():
    hidden = torch.zeros(3, 4, 5, dtype=torch.bfloat16)
    stream.check_finite(hidden, "layer 7")
    for bad in (float("nan"), float("inf"), -float("inf")):
        hidden[2, 1, 3] = bad
        with pytest.raises(NumericalError, match=r"after layer 7 hold NaN or Inf \(sequence 2\)"):
            stream.check_finite(hidden, "layer 7")
