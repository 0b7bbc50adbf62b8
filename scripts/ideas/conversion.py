"""A conversion held in memory, with places where an idea can reach in.

The same steps as `pipeline.stages.requantize`, by the same functions: calibration and target in
bf16, and beside them the evaluation windows in float32 through the quantised weights.  Nothing is
written and nothing is packed, so that a variant takes a minute or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.checkpoint.reader import Checkpoint
from pipeline.models.skeleton import architecture_of
from pipeline.quantize.hessian import add_moment, rounded_out
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.rows import row_order
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.experts import (
    DOWN_SAMPLE_TOKENS,
    DenseTile,
    LayerStatistics,
    SolvedTile,
    TileJob,
    TileSource,
    decode_tile,
    solve_tile,
    tile_output,
)
from pipeline.stages.routing import Routed, sort_by_expert
from pipeline.stages.sensitivity import Sensitivity
from pipeline.stages.stream import LayerStream, Recorded
from pipeline.stages.tiling import tiles

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """The dense source, its calibration tokens and its evaluation windows, int64 [n, length]."""

    checkpoint: Checkpoint
    calibration: Tensor
    windows: Tensor
    device: torch.device

    @classmethod
    def of(cls, model: Path, calibration: Tensor, windows: Tensor, device: torch.device) -> Source:
        """Open a directory in bf16."""
        return cls(Checkpoint.open(model), calibration, windows, device)

    def stream(self, dtype: torch.dtype = torch.bfloat16) -> LayerStream:
        """Layers of the source on the device."""
        c = self.checkpoint
        return LayerStream(c, architecture_of(c.config, str(c.path)), self.device, dtype)


class Idea:
    """What a variant does differently; this one does nothing differently."""

    method = "gptq"
    corrects = True
    folds_down = False
    options = SolverOptions()

    def sensitivity(self, source: Source) -> Callable[[int], Tensor]:
        """M of each layer's output (see `pipeline.stages.sensitivity`)."""
        stream = source.stream()
        return Sensitivity(source.checkpoint, stream.architecture, source.device).after

    def before(
        self, stream: LayerStream, layer: int, dense: Tensors, calibration: Tensor, target: Tensor
    ) -> Tensors:
        """The layer's dense tensors as they are to be."""
        del stream, layer, calibration, target
        return dense

    def solve(
        self,
        job: TileJob,
        tile: DenseTile,
        routed: Routed,
        layer: LayerStatistics,
        recorded: Recorded,
    ) -> SolvedTile:
        """A tile's experts."""
        del recorded
        return solve_tile(job, tile, routed, layer)


def convert(source: Source, idea: Idea, group: int) -> Tensor:
    """The windows' last hidden states through the quantised model, float32."""
    low, full = source.stream(), source.stream(torch.float32)
    quantizer = QUANTIZERS[idea.method]
    behind = idea.sensitivity(source) if quantizer.weighs_outputs else None
    calibration, windows = low.embed(source.calibration), full.embed(source.windows)
    target = calibration.clone()
    for layer in range(low.geometry.layers):
        dense = low.load_dense(layer)
        with torch.inference_mode():
            wanted = low.record(low.build_layer(layer, dense), target)
            dense = idea.before(low, layer, dense, calibration, target)
            recorded = low.record(low.build_layer(layer, dense), calibration)
            routed = sort_by_expert(recorded, low.geometry.experts)
            statistics = _statistics(layer, routed)
            if idea.corrects:
                statistics = replace(statistics, target=wanted.inputs)
            if behind is not None:
                statistics = replace(statistics, outputs=row_order(behind(layer)))
            statistics = replace(statistics, folds_down=idea.folds_down)
            solved: list[tuple[TileSource, DenseTile]] = []
            faithful: list[tuple[TileSource, DenseTile]] = []
            for experts in tiles(low.geometry.experts):
                job = TileJob(
                    checkpoint=source.checkpoint,
                    architecture=low.architecture,
                    layer=layer,
                    experts=experts,
                    device=source.device,
                    quantizer=quantizer,
                    scheme=AffineScheme(4, group, True),
                    options=idea.options,
                    inner=low.geometry.inner,
                )
                tile = decode_tile(job)
                faithful.append((job, tile))
                solved.append((job, idea.solve(job, tile, routed, statistics, recorded).dense))
            calibration = _through(recorded, solved, low)
            target = _through(wanted, faithful, low)
            windows = _advance(full, full.build_layer(layer, dense), windows, solved)
    return windows


def source_states(source: Source) -> Tensor:
    """The windows' last hidden states through the source, float32."""
    full = source.stream(torch.float32)
    hidden = full.embed(source.windows)
    with torch.inference_mode():
        for layer in range(full.geometry.layers):
            whole = [
                TileSource(source.checkpoint, full.architecture, layer, experts, source.device)
                for experts in tiles(full.geometry.experts)
            ]
            decoded = [(tile, decode_tile(tile, torch.float32)) for tile in whole]
            module = full.build_layer(layer, full.load_dense(layer))
            hidden = _advance(full, module, hidden, decoded)
    return hidden


def _statistics(layer: int, routed: Routed) -> LayerStatistics:
    """As the stage has them, seed 0."""
    tokens = len(routed.inputs)
    common = add_moment(None, routed.inputs)
    generator = torch.Generator().manual_seed(layer)
    chosen = torch.randperm(tokens, generator=generator)[:DOWN_SAMPLE_TOKENS]
    chosen = chosen.to(routed.inputs.device)
    mean = rounded_out(common / tokens, tokens)
    return LayerStatistics(common=mean, sample=routed.inputs[chosen], target=None)


def _through(
    recorded: Recorded, solved: list[tuple[TileSource, DenseTile]], stream: LayerStream
) -> Tensor:
    """A stream as it leaves the layer, with these experts."""
    routed = sort_by_expert(recorded, stream.geometry.experts)
    total = torch.zeros_like(routed.inputs, dtype=torch.float32)
    for job, tile in solved:
        tile_output(job, tile, routed).add_to(total)
    return recorded.with_experts(total)


def _advance(
    stream: LayerStream,
    module: nn.Module,
    hidden: Tensor,
    solved: list[tuple[TileSource, DenseTile]],
) -> Tensor:
    """The same for float32 windows."""
    exact = [(job, DenseTile(t.gate_up.float(), t.down.float())) for job, t in solved]
    return _through(stream.record(module, hidden), exact, stream)
