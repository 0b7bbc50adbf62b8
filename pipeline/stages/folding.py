"""Folding: scales that quantisation wants on input channels, moved into what makes the channels.

A layer is folded before it is quantised.  One pass of the calibration stream through the source's
layer gives the second moments of every fold's channels; the scale that costs the quantised
consumers least is chosen; the producer is divided by it and every consumer outside the routed
experts, quantised or not, multiplied.  Experts are multiplied tile by tile when they are solved
(`pipeline.stages.experts`), and their own up is folded into down there, since each has a scale of
its own.  The layer's function stays what it was, so the other streams need not know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.models import Architecture
from pipeline.models.architecture import Fold, Geometry
from pipeline.quantize.hessian import add_moment, routed_hessians
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.scaling import best_scales, candidate_scales, fold_norm, scale_losses
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.context import Context
from pipeline.stages.experts import TileSource, decode_tile
from pipeline.stages.formats import module_rules
from pipeline.stages.routing import rows_of, sort_by_expert
from pipeline.stages.stream import COMPUTE_DTYPE, LayerStream, Recorded
from pipeline.stages.tiling import tiles


@dataclass(frozen=True)
class FoldedLayer:
    """What folding made of a layer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The dense tensors that it rewrote, by full name, in their stored dtypes."""
    experts: Tensor | None = None
    """What the inputs of the routed experts were divided by, float32 [hidden]; None: nothing."""
    down: bool = False
    """Whether each expert's own up is to be folded into its down."""
    scales: dict[str, list[float]] = field(default_factory=dict)
    """Least and greatest scale of each fold, for the record."""


def layer_folds(
    architecture: Architecture, names: Collection[str], layer: int, chosen: Collection[str]
) -> list[Fold]:
    """The folds that serve a layer: its modules are there and one of the consumers is quantised.

    `names`: all tensors of the model; `chosen`: module classes that are quantised.
    """
    quantized = _quantized(architecture, chosen)
    found = []
    for fold in architecture.folds:
        modules = (fold.producer, *fold.consumers)
        there = [f"{architecture.fold_module(layer, m)}.weight" in names for m in modules]
        if all(there) and quantized & set(fold.consumers):
            found.append(fold)
    return found


def check_folds(
    architecture: Architecture,
    geometry: Geometry,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    chosen: Collection[str],
) -> None:
    """Refuse folds whose members disagree in shape: RecipeError naming fold, module and shapes."""
    for layer in range(geometry.layers):
        for fold in layer_folds(architecture, shapes, layer, chosen):
            producer = architecture.fold_module(layer, fold.producer)
            made = shapes[f"{producer}.weight"][0]
            try:
                channels = _channels(fold, made, config)
            except ValueError as error:
                raise RecipeError(f"fold {fold.name} of layer {layer}: {error}") from None
            for consumer in fold.consumers:
                name = architecture.fold_module(layer, consumer)
                read = shapes[f"{name}.weight"][-1]
                if read != len(channels) or int(channels.max()) >= made:
                    raise RecipeError(
                        f"fold {fold.name} of layer {layer}: {name} reads {read} channels,"
                        f" {producer} makes {made}, of which the declaration reads"
                        f" {len(channels)} up to number {int(channels.max())}; quantise by a"
                        " method that does not fold"
                    )


def fold_tensors(
    architecture: Architecture,
    fold: Fold,
    layer: int,
    tensors: Mapping[str, Tensor],
    scale: Tensor,
    config: Mapping[str, Any],
    dtype: torch.dtype = COMPUTE_DTYPE,
) -> tuple[dict[str, Tensor], Tensor]:
    """Divide a fold's producer by `scale`, float32 [channels], and multiply those of its consumers
    that are among `tensors` (full names).

    Returns the rewritten tensors, in their own dtypes, and what the channels were really divided
    by.  `dtype`: what readers hold norms in.
    """
    prefix = architecture.layer_prefix(layer)
    producer = f"{prefix}{fold.producer}"
    weight = tensors[f"{producer}.weight"]
    rewritten: dict[str, Tensor] = {}
    if fold.form == "rows":
        effective = scale
        for name in (f"{producer}.weight", f"{producer}.bias"):
            if name in tensors:
                whole = tensors[name]
                by = scale.view(-1, *[1] * (whole.dim() - 1))
                rewritten[name] = (whole.float() / by).to(whole.dtype)
    else:
        rewritten[f"{producer}.weight"], effective = fold_norm(
            weight, scale, plus_one=fold.form == "1+w", dtype=dtype
        )
    columns = effective[_channels(fold, len(scale), config).to(scale.device)]
    for consumer in fold.consumers:
        name = f"{prefix}{consumer}.weight"
        if name in tensors:
            whole = tensors[name]
            rewritten[name] = (whole.float() * columns).to(whole.dtype)
    return rewritten, effective


def _channels(fold: Fold, made: int, config: Mapping[str, Any]) -> Tensor:
    return torch.arange(made) if fold.channels is None else fold.channels(config)


def _quantized(architecture: Architecture, chosen: Collection[str]) -> set[str]:
    """Names, as folds have them, of the modules that are quantised."""
    a = architecture
    experts = {f"{a.experts}.*.{projection}" for projection in (a.gate, a.up, a.down)}
    return experts | set(module_rules(a, chosen).quantized)


class LayerFolding:
    """Finds and applies the scales of one layer after the other."""

    def __init__(
        self,
        context: Context,
        stream: LayerStream,
        scheme: AffineScheme,
        options: SolverOptions,
    ) -> None:
        self._context = context
        self._stream = stream
        self._scheme = scheme
        self._options = options
        self._chosen = context.recipe.requantize.modules

    def fold(
        self, layer: int, module: nn.Module, stored: Mapping[str, Tensor], calibration: Tensor
    ) -> FoldedLayer:
        """Search and fold a layer.

        `module`: the source's layer; `stored`: its dense tensors; `calibration`: the stream that
        enters it, bf16 [sequences, length, hidden].
        """
        a, config = self._context.architecture, self._context.checkpoint.config
        names = self._context.checkpoint.weights
        folds = layer_folds(a, names, layer, self._chosen)
        own = [fold for fold in folds if "*" in fold.producer]
        folds = [fold for fold in folds if "*" not in fold.producer]
        if not folds:
            return FoldedLayer(down=bool(own))
        moments, recorded = self._moments(module, folds, calibration)
        tensors = dict(stored)
        rewritten: dict[str, Tensor] = {}
        experts: Tensor | None = None
        scales: dict[str, list[float]] = {}
        with torch.inference_mode():
            for fold, moment in zip(folds, moments, strict=True):
                scale = self._search(fold, layer, module, moment, recorded)
                changed, effective = fold_tensors(a, fold, layer, tensors, scale, config)
                tensors |= changed
                rewritten |= changed
                scales[fold.name] = [float(effective.min()), float(effective.max())]
                if any(consumer.startswith(f"{a.experts}.") for consumer in fold.consumers):
                    experts = effective
        return FoldedLayer(rewritten, experts, bool(own), scales)

    def _moments(
        self, module: nn.Module, folds: list[Fold], calibration: Tensor
    ) -> tuple[list[Tensor], Recorded]:
        """Sum of x x^T over the inputs of every fold's consumers, and what the router did."""
        totals: list[Tensor | None] = [None] * len(folds)

        def collect(index: int, inputs: tuple[Tensor, ...]) -> None:
            totals[index] = add_moment(totals[index], inputs[0])

        handles = []
        for index, fold in enumerate(folds):
            dense = next(consumer for consumer in fold.consumers if "*" not in consumer)
            handles.append(
                module.get_submodule(dense).register_forward_pre_hook(
                    lambda _module, inputs, index=index: collect(index, inputs)
                )
            )
        try:
            recorded = self._stream.record(module, calibration)
        finally:
            for handle in handles:
                handle.remove()
        return [total for total in totals if total is not None], recorded

    def _search(
        self, fold: Fold, layer: int, module: nn.Module, moment: Tensor, recorded: Recorded
    ) -> Tensor:
        """The scale of a fold's channels that costs its quantised consumers least."""
        a = self._context.architecture
        quantized = _quantized(a, self._chosen)
        columns = moment.diagonal()
        channels = _channels(fold, len(columns), self._context.checkpoint.config)
        channels = channels.to(moment.device)
        by_channel = torch.zeros(int(channels.max()) + 1, device=moment.device)
        candidates = candidate_scales(by_channel.index_add_(0, channels, columns))
        tried = candidates[:, channels]
        total = torch.zeros(len(candidates), device=moment.device)
        for consumer in fold.consumers:
            if consumer in quantized and "*" not in consumer:
                weight = module.get_submodule(consumer).weight
                assert isinstance(weight, Tensor)
                losses = scale_losses(
                    weight[None], moment[None], tried, self._scheme, self._options
                )
                total += losses.sum(1)
        if any("*" in consumer for consumer in fold.consumers):
            total += self._expert_losses(layer, recorded, tried)
        return best_scales(candidates, total)

    def _expert_losses(self, layer: int, recorded: Recorded, candidates: Tensor) -> Tensor:
        """Losses of all experts' gate and up, float32 [candidates]; a tile at a time."""
        context = self._context
        routed = sort_by_expert(recorded, context.geometry.experts)
        total = torch.zeros(len(candidates), device=candidates.device)
        for experts in tiles(context.geometry.experts, context.tile_experts):
            source = TileSource(
                context.checkpoint, context.architecture, layer, experts, context.device
            )
            dense = decode_tile(source)
            base = routed.offsets[experts.start]
            offsets = torch.tensor(routed.offsets[experts.start : experts.stop + 1]) - base
            tokens = routed.tokens[base : routed.offsets[experts.stop]]
            inputs = rows_of(routed.inputs, tokens)
            hessian = routed_hessians(inputs, offsets)
            losses = scale_losses(dense.gate_up, hessian, candidates, self._scheme, self._options)
            total += losses.sum(1)
        return total
