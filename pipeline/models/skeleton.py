"""A transformers model without weights, to be filled layer by layer or file by file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.untrusted import shown
from pipeline.errors import CheckpointError
from pipeline.models import ARCHITECTURES, Architecture
from pipeline.models.architecture import Geometry

MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What transformers raises for a config whose values make no sense, besides its own error."""


MAX_COUNT = 1 << 16
"""Layers, experts, heads: twenty times what the largest models have."""
MAX_NUMBER = 1 << 40


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The declaration for a config.json's `model_type`; CheckpointError for one we do not know."""
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{where}: model_type {shown(repr(model_type))} is not supported; known: {known}"
        )
    return architecture


def geometry_of(architecture: Architecture, config: Mapping[str, Any], where: str) -> Geometry:
    """The sizes in a config.json; CheckpointError for one that lacks some or makes no sense."""
    _check_numbers(config, where)
    try:
        geometry = architecture.geometry(config)
    except KeyError as error:
        raise CheckpointError(f"{where}/config.json: {shown(error)} is missing") from None
    except MALFORMED as error:
        raise CheckpointError(f"{where}/config.json is malformed: {shown(error)}") from None
    sizes = (geometry.layers, geometry.experts, geometry.top_k, geometry.hidden, geometry.inner)
    if min(*sizes, geometry.vocabulary) < 1 or geometry.top_k > geometry.experts:
        raise CheckpointError(f"{where}/config.json is malformed: its sizes are impossible")
    if len(geometry.layer_kinds) != geometry.layers:
        raise CheckpointError(
            f"{where}/config.json is malformed: {len(geometry.layer_kinds)} layer_types for"
            f" {geometry.layers} layers"
        )
    if not geometry.moe_layers:
        raise CheckpointError(f"{where}: config.json describes no layer with routed experts")
    return geometry


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """CheckpointError for numbers that no model has: some stand for lists that would be made."""
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        limit = MAX_COUNT if key.startswith("num_") else MAX_NUMBER
        if not -MAX_NUMBER <= value <= limit:  # false for NaN
            raise CheckpointError(f"{where}/config.json is malformed: {shown(key)} {shown(value)}")
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factors = [table.get("partial_rotary_factor", 1.0) for table in (config, rotary)
               if isinstance(table, Mapping)]  # fmt: skip
    for factor in factors:
        if not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            raise CheckpointError(
                f"{where}/config.json is malformed: partial_rotary_factor {shown(factor)}"
            )


def model_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' configuration object for a config.json, its quantisation left out.

    With the `quantization_config` in place transformers would replace modules by its own.
    """
    plain = {k: v for k, v in config.items() if k not in {"quantization_config", "auto_map"}}
    try:
        result: PreTrainedConfig = CONFIG_MAPPING[str(config["model_type"])].from_dict(plain)
    except (*MALFORMED, StrictDataclassError) as error:
        raise _malformed(error) from error
    return result


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model with every parameter and buffer on the meta device.

    transformers makes `dtype` the process's default meanwhile: anything but float32 is for times
    when no other thread computes.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except (*MALFORMED, RuntimeError) as error:
        raise _malformed(error) from error
    return model.eval().requires_grad_(False)


def expected_shapes(
    checkpoint: Checkpoint, architecture: Architecture, geometry: Geometry
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model of config.json has, by its dense name.

    Raises CheckpointError for experts stacked in one tensor, and for a config that makes no model.
    """
    shapes = {
        architecture.gate: (geometry.inner, geometry.hidden),
        architecture.up: (geometry.inner, geometry.hidden),
        architecture.down: (geometry.hidden, geometry.inner),
    }
    names: dict[str, tuple[int, ...]] = {}
    for layer in geometry.moe_layers:
        fused = f"{architecture.layer_prefix(layer)}{architecture.experts}.gate_up_proj"
        if fused in checkpoint.weights:
            raise CheckpointError(
                f"{checkpoint.path}: {fused} stacks all experts in one tensor; only checkpoints"
                " with one tensor per expert and projection can be converted"
            )
        for expert in range(geometry.experts):
            for projection, shape in shapes.items():
                names[f"{architecture.expert_module(layer, expert, projection)}.weight"] = shape
    # Only shapes are looked at, and others may compute meanwhile (see there).
    skeleton = build_skeleton(model_config(checkpoint.config), torch.float32)
    experts = tuple(
        f"{architecture.layer_prefix(i)}{architecture.experts}." for i in geometry.moe_layers
    )
    head = f"{architecture.head}.weight"
    for name, parameter in skeleton.named_parameters():
        if not name.startswith(experts):
            names[name] = tuple(parameter.shape)
    if checkpoint.config.get("tie_word_embeddings"):  # the head may be stored again, or not
        names.pop(head, None)
        if head in checkpoint.weights:
            names[head] = names[f"{architecture.embedding}.weight"]
    return names


def _malformed(error: Exception) -> CheckpointError:
    reason = shown(error, 300)
    return CheckpointError(f"config.json is malformed: {type(error).__name__}: {reason}")


def rotary_embedding(model: PreTrainedModel, device: torch.device) -> nn.Module:
    """A rotary module with real buffers: those are computed from the config and never stored."""
    meta: nn.Module = model.model.rotary_emb
    with torch.device(device):
        real: nn.Module = type(meta)(config=model.config)
    return real


def assign(module: nn.Module, tensors: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> None:
    """Put tensors in the place of a module's parameters, by name and with equal shapes.

    `ignore`: prefixes of parameters that something else provides.  Raises CheckpointError for a
    parameter without a tensor, a tensor without a parameter, and shapes that disagree.
    """
    skipped = tuple(ignore)
    expected: dict[str, Tensor] = {
        k: v for k, v in module.named_parameters() if not k.startswith(skipped or "\0")
    }
    expected |= {
        k: v
        for k, v in module.named_buffers()
        if k in tensors and not k.startswith(skipped or "\0")
    }
    for name, parameter in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(tensor.shape)},"
                f" the config asks for {tuple(parameter.shape)}"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"tensor {extra[0]} is in the checkpoint but not in the model")
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    module.requires_grad_(False)
