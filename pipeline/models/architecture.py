"""The contract that every architecture's file fills in.

A file declares names and numbers; the few functions say how its config is read and how one decoder
layer is called.  Everything else in the package works from this declaration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def causal_positions(length: int, device: torch.device) -> Tensor:
    """Position ids [1, length] of an unpadded sequence."""
    return torch.arange(length, device=device).unsqueeze(0)
