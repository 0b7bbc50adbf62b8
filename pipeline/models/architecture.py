"""The contract that every architecture's file fills in.

A file declares names and numbers; the few functions say how its config is read and how one decoder
layer is called.  Everything else in the package works from this declaration alone.
What several architectures have in common stands below the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """The sizes that planning, solving and checking need, read from a config.json."""

    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    inner: int
    """Inner dimension of one routed expert."""
    vocabulary: int
    layer_kinds: tuple[str, ...]
    """Kind of every layer's token mixer, for reports."""


@dataclass(frozen=True)
class ModuleGroup:
    """Linear modules of a layer that read the same input, and so share one Hessian."""

    module_class: str
    """The name by which a recipe chooses it, such as "attention"."""
    modules: tuple[str, ...]
    """Names relative to the layer, such as "self_attn.q_proj"."""


@dataclass(frozen=True)
class Fold:
    """Linear modules whose input channels may be scaled, the model staying the same.

    What makes the channels is divided by a scale, the columns that read them are multiplied by it.
    """

    name: str
    """For reports and messages, such as "post_norm"."""
    producer: str
    """The module that makes the channels, relative to the layer; in names of folds `*` stands for
    the number of every routed expert, each with a scale of its own where the producer has one."""
    form: Literal["w", "1+w", "rows"]
    """What is divided: a norm that multiplies by w or by 1 + w, or a linear module's rows."""
    consumers: tuple[str, ...]
    """All linear modules that read the channels: one left out, quantised or not, is broken."""
    channels: Callable[[Mapping[str, Any]], Tensor] | None = None
    """config.json -> int64 [columns of a consumer]: the channel that each column reads, where
    several read one; None: column i reads channel i."""


@dataclass(frozen=True)
class Architecture:
    """Where everything lives in a model of one `model_type`, and how a layer is run."""

    model_type: str
    layer: str
    """Name of a decoder layer with a {layer} field, such as "model.layers.{layer}"."""
    embedding: str
    final_norm: str
    head: str
    router: str
    """Names from here on are relative to the layer."""
    experts: str
    """The module that transformers 5 calls as experts(hidden, top_k_index, top_k_weights)."""
    gate: str
    up: str
    down: str
    """Projections of an expert, as named on disk below `<experts>.<number>`."""
    activation: Callable[[Tensor], Tensor]
    """inner = activation(gate(x)) * up(x)"""
    mixer_groups: tuple[ModuleGroup, ...]
    """Linear groups before the router, in the order in which a forward pass reaches them."""
    shared_groups: tuple[ModuleGroup, ...]
    """Linear groups beside the routed experts, in order."""
    never_quantized: tuple[str, ...]
    """Linear modules that stay dense whatever the recipe says."""
    ignored: tuple[str, ...]
    """Parts of a checkpoint that the causal model has no use for; they are not carried over."""
    norm_form: Literal["w", "1+w"]
    """What a normalised activation is multiplied by, given the stored weight w."""
    geometry: Callable[[Mapping[str, Any]], Geometry]
    """Reads config.json; raises KeyError or ValueError for a config without the needed keys."""
    residual_norms: tuple[str, ...]
    """Norms whose input is the residual stream, relative to the layer."""
    folds: tuple[Fold, ...]
    """Where scales can be moved from one module to the next; a layer has those whose modules it
    has."""
    call_layer: Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]
    """(layer module, hidden [batch, length, hidden], rotary (cos, sin)) -> hidden, causal."""

    def layer_prefix(self, layer: int) -> str:
        """Prefix of all tensor names of a layer, with its trailing dot."""
        return self.layer.format(layer=layer) + "."

    def expert_module(self, layer: int, expert: int, projection: str) -> str:
        """On-disk module name of one expert's projection (`projection`: self.gate, up or down)."""
        return f"{self.layer_prefix(layer)}{self.experts}.{expert}.{projection}"

    def fold_module(self, layer: int, name: str, expert: int = 0) -> str:
        """Full name of a fold's module; `expert` is the one meant where it has a `*`."""
        return self.layer_prefix(layer) + name.replace("*", str(expert))

    @property
    def module_classes(self) -> tuple[str, ...]:
        """What a recipe may name under requantize.modules."""
        groups = (*self.mixer_groups, *self.shared_groups)
        return tuple(dict.fromkeys(["experts", *(g.module_class for g in groups)]))


def sparse_geometry(config: Mapping[str, Any], layer_kinds: Sequence[str]) -> Geometry:
    """Geometry from the keys of config.json that Qwen's sparse models share.

    transformers 5 writes `num_local_experts` for what its version 4 called `num_experts`.
    """
    layers = int(config["num_hidden_layers"])
    step = int(config.get("decoder_sparse_step", 1))
    dense = set(config.get("mlp_only_layers") or ())
    experts = "num_local_experts" if "num_local_experts" in config else "num_experts"
    return Geometry(
        layers=layers,
        moe_layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
        experts=int(config[experts]),
        top_k=int(config["num_experts_per_tok"]),
        hidden=int(config["hidden_size"]),
        inner=int(config["moe_intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        layer_kinds=tuple(layer_kinds),
    )


def shared_value_channels(config: Mapping[str, Any]) -> Tensor:
    """Which row of v_proj each column of o_proj reads in grouped-query attention.

    Query heads share the value head of their group.  Between the two stands nothing, or a factor
    that a scale commutes with, such as the sigmoid of Qwen3-Next's gate.
    """
    heads, shared = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    if heads % shared:
        raise ValueError(f"{shared} key and value heads do not divide {heads} attention heads")
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    column = torch.arange(heads * size)
    return column // size // (heads // shared) * size + column % size


def call_decoder_layer(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """A transformers decoder layer on whole sequences, [batch, length, hidden] -> the same."""
    # No mask: the sequences are unpadded, and scaled_dot_product_attention is causal without one.
    output: Tensor = layer(
        hidden,
        position_embeddings=rotary,
        attention_mask=None,
        position_ids=torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0),
        past_key_values=None,
        use_cache=False,
    )
    return output
