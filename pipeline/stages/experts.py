"""The unit of work inside a layer: a tile of routed experts, from stored bytes to packed bytes.

Decode, statistics, solving, packing and the tile's share of the layer's output all happen here, on
the device that the job names, from the layer's routed activations and references into the source.
Only packed tensors and sums leave, so the same function could run on another device or machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.checkpoint.files import fresh, page_locked
from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import NumericalError
from pipeline.models import Architecture
from pipeline.quantize.correction import corrected, routed_drift
from pipeline.quantize.hessian import (
    effective_rank,
    rounded_out,
    routed_hessians,
    router_emphasis,
    shrink,
)
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.routed import add_rows, grouped_product, token_sums
from pipeline.quantize.rows import RowOrder
from pipeline.quantize.scaling import best_scales, candidate_scales, scale_losses
from pipeline.quantize.sent import sent
from pipeline.quantize.solved import Quantizer, Solved
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor
from pipeline.stages.home import Home
from pipeline.stages.routing import Routed, rows_of
from pipeline.stages.stream import COMPUTE_DTYPE

CHUNK_PAIRS = 1 << 16
"""Pairs whose outputs are computed, or move, together.  Fixed, as the tile is."""

DOWN_SAMPLE_TOKENS = 2048
"""Tokens of the layer that an under-covered expert's own gate and up turn into down inputs.  For
experts without tokens of their own 512 left 0.991 of rounding's error, 2,048 leave 0.798
(docs/quality.md)."""

WELL_COVERED = 4
"""Routed tokens per inner column above which an expert's down needs no substitute."""

STRENGTH = 3.0
"""Weight of substitute statistics, in tokens per input column: an expert that saw three times as
many tokens as its matrix has columns is half its own.  Measured on held-out tokens of the shipped
model with experts starved on purpose (docs/quality.md): best of 0.02 to 10 at 64 to 1,024 tokens
an expert, or within 0.002 of the best."""


@dataclass(frozen=True)
class TileSource:
    """Where a tile's dense weights come from and where they go."""

    checkpoint: Checkpoint
    architecture: Architecture
    layer: int
    experts: range
    device: torch.device


@dataclass(frozen=True)
class TileJob(TileSource):
    """Everything that solving a tile needs; no globals, no hidden device choice."""

    quantizer: Quantizer
    scheme: AffineScheme
    options: SolverOptions
    inner: int
    router_weighted: bool = False
    """Weight tokens by what the router gives them."""


@dataclass(frozen=True)
class DenseTile:
    """Decoded weights of a tile, bf16 on the device."""

    gate_up: Tensor
    """[experts, 2 * inner, hidden]; gate's rows first"""
    down: Tensor
    """[experts, hidden, inner]"""


@dataclass(frozen=True)
class LayerStatistics:
    """What all tiles of a layer share."""

    common: Tensor
    """Second moment of all the layer's tokens, float32 [hidden, hidden], mixed into the
    statistics of gate and up."""
    sample: Tensor
    """Inputs of a seeded sample of the layer's tokens, bf16 [sample, hidden], which an
    under-covered expert's own gate and up turn into inputs of its down."""
    target: Tensor | None
    """The source's own inputs at the layer's tokens, bf16 [tokens, hidden]; None: do not correct
    for what earlier layers lost."""
    outputs: RowOrder | None = None
    """For how much the model behind listens to each direction of the layer's output; None: to all
    alike."""
    scale: Tensor | None = None
    """What folding divided the inputs by, float32 [hidden], those of `target` excepted."""
    folds_down: bool = False
    """Whether each expert's up is to be divided by scales that its down is multiplied by."""

    def to(self, device: torch.device, home: Home) -> LayerStatistics:
        """The same for another device; `home`: where the streams live."""
        return replace(
            self,
            common=self.common.to(device),
            sample=self.sample.to(device),
            target=None if self.target is None else home.reach(self.target, device),
            outputs=None if self.outputs is None else self.outputs.to(device),
            scale=None if self.scale is None else self.scale.to(device),
        )


@dataclass(frozen=True)
class TileOutput:
    """What a tile's experts add to the layer's output."""

    rows: Tensor
    """int64 [n]: the tokens that were routed to the tile, rising."""
    values: Tensor
    """float32 [n, hidden]"""

    def to(self, device: torch.device) -> TileOutput:
        """The same on another device."""
        return TileOutput(self.rows.to(device), self.values.to(device))

    def add_to(self, total: Tensor) -> None:
        """Add to `total`, float32 [tokens, hidden], on any device.

        Tiles are to be added in their order: the sum has one order then, whoever computed them.
        """
        parts = zip(self.rows.split(CHUNK_PAIRS), self.values.split(CHUNK_PAIRS), strict=True)
        for rows, values in parts:
            add_rows(total, rows.to(total.device), values.to(total.device))


@dataclass(frozen=True)
class SolvedTile:
    """A tile's result."""

    gate: QuantizedTensor
    up: QuantizedTensor
    down: QuantizedTensor
    dense: DenseTile
    """The quantised weights, dequantised: what the next layer must see."""
    inner: Tensor | None
    """What its gate and up make of the calibration's tokens, bf16 [pairs, inner]; None where
    nothing asked for it."""
    gate_up_loss: list[float]
    down_loss: list[float]
    effective_rank: list[float]
    """Of every expert's own inputs, nothing mixed in; empty for methods without statistics."""
    raised_damping: int
    """Factorisations that needed more damping than the recipe's."""
    smallest_scales: int
    """Groups on the smallest scale there is."""


def decode_tile(job: TileSource, dtype: torch.dtype = COMPUTE_DTYPE) -> DenseTile:
    """Read and decode a tile's matrices from the source."""
    a = job.architecture

    stacks = [
        [f"{a.expert_module(job.layer, e, projection)}.weight" for e in job.experts]
        for projection in (a.gate, a.up, a.down)
    ]
    memory = page_locked if job.device.type == "cuda" else fresh
    fetched = job.checkpoint.fetch(stacks, memory).to(job.device)
    gate, up, down = job.checkpoint.decode(fetched, dtype)
    return DenseTile(torch.cat([gate, up], dim=1), down)


def tile_output(
    job: TileSource, tile: DenseTile, routed: Routed, inner: Tensor | None = None
) -> TileOutput:
    """The weighted sum of the outputs of a tile's experts, for each token routed to it.

    `inner`: the inputs of down, bf16 [pairs, inner], where they are known already.
    """
    base, stop = routed.offsets[job.experts.start], routed.offsets[job.experts.stop]
    tokens, weights = routed.tokens[base:stop], routed.weights[base:stop]
    offsets = [o - base for o in routed.offsets[job.experts.start : job.experts.stop + 1]]
    sums = token_sums(tokens, CHUNK_PAIRS)
    values = torch.zeros(len(sums.rows), tile.down.shape[1], device=job.device)
    for number, start in enumerate(range(0, len(tokens), CHUNK_PAIRS)):
        part = slice(start, min(start + CHUNK_PAIRS, len(tokens)))
        inside = [min(max(offset, part.start), part.stop) for offset in offsets]
        if inner is None:
            hidden = rows_of(routed.inputs, tokens[part])
            between = _inner_of(job, hidden, tile.gate_up, inside)
        else:
            between = inner[part]
        output = grouped_product(between, tile.down, inside)
        sums.add(values, number, start, output, weights[part])
    return TileOutput(sums.rows, values)


def solve_tile(job: TileJob, tile: DenseTile, routed: Routed, layer: LayerStatistics) -> SolvedTile:
    """Quantise a tile's matrices on the activations routed to it."""
    experts, inner = job.experts, job.inner
    base = routed.offsets[experts.start]
    offsets = [routed.offsets[e] - base for e in (*experts, experts.stop)]
    tokens = routed.tokens[base : routed.offsets[experts.stop]]
    inputs = rows_of(routed.inputs, tokens)
    target = None if layer.target is None else rows_of(layer.target, tokens)
    emphasis = None
    if job.router_weighted:
        given = routed.weights[base : routed.offsets[experts.stop]]
        emphasis = router_emphasis(given, torch.tensor(offsets))

    hessian = None
    rank: Tensor | None = None
    scaled = fold_tile(tile, layer.scale, None)
    folded = None
    if layer.folds_down:
        folded = _down_scales(job, scaled, inputs, emphasis, offsets, layer)
        scaled = fold_tile(scaled, None, folded)
    weight = scaled.gate_up
    if job.quantizer.needs_hessian:
        strength = STRENGTH * inputs.shape[1]
        counts = torch.tensor(offsets).diff()
        own = routed_hessians(inputs, torch.tensor(offsets), weights=emphasis)
        rank = effective_rank(own)
        hessian = shrink(own, counts, layer.common, strength)
        del own
        if target is not None:
            wanted = target if layer.scale is None else (target / layer.scale).to(target.dtype)
            drift = routed_drift(wanted, inputs, offsets, emphasis)
            with _named(job, "gate and up"):
                drift /= _share(counts, strength, job.device)
                weight = corrected(weight, hessian, drift)
    solved = _quantize(job, "gate and up", weight, hessian)
    gate_up = solved.quantized.dequantize(COMPUTE_DTYPE)
    del hessian, weight

    weight, down_hessian, between = _down_problem(
        job, tile, scaled.down, inputs, target, emphasis, gate_up, folded, offsets, layer
    )
    solved_down = _quantize(job, "down", weight, down_hessian, layer.outputs)
    return SolvedTile(
        gate=solved.quantized.rows(0, inner),
        up=solved.quantized.rows(inner, 2 * inner),
        down=solved_down.quantized,
        dense=DenseTile(gate_up, solved_down.quantized.dequantize(COMPUTE_DTYPE)),
        inner=between,
        gate_up_loss=solved.loss.tolist(),
        down_loss=solved_down.loss.tolist(),
        effective_rank=[] if rank is None else rank.tolist(),
        raised_damping=solved.raised + solved_down.raised,
        smallest_scales=solved.smallest_scales + solved_down.smallest_scales,
    )


def fold_tile(tile: DenseTile, inputs: Tensor | None, inner: Tensor | None) -> DenseTile:
    """A tile in float32 for inputs that were divided by scales.

    `inputs`: of gate and up, float32 [hidden]; `inner`: of every expert's down, float32
    [experts, inner], by which its up is divided.  None: left as they are.
    """
    gate_up, down = tile.gate_up.float(), tile.down.float()
    if inputs is not None:
        gate_up = gate_up * inputs
    if inner is not None:
        gate, up = gate_up.chunk(2, dim=1)
        gate_up = torch.cat([gate, up / inner.unsqueeze(-1)], dim=1)
        down = down * inner.unsqueeze(1)
    return DenseTile(gate_up, down)


def _down_scales(
    job: TileJob,
    tile: DenseTile,
    inputs: Tensor,
    emphasis: Tensor | None,
    offsets: list[int],
    layer: LayerStatistics,
) -> Tensor:
    """The scale of each expert's inner channels that costs its down least.

    Returns float32 [experts, inner].  `tile`: float32, folded for `inputs`.  An expert without
    tokens keeps the neutral scale.
    """
    gate_up = tile.gate_up.to(inputs.dtype)
    _, hessian = _down_hessian(job, inputs, emphasis, gate_up, offsets, layer)
    candidates = candidate_scales(hessian.diagonal(dim1=1, dim2=2))
    losses = scale_losses(tile.down, hessian, candidates, job.scheme, job.options)
    seen = torch.tensor(offsets, device=losses.device).diff() > 0
    return best_scales(candidates, losses * seen)


def _down_hessian(
    job: TileJob,
    inputs: Tensor,
    emphasis: Tensor | None,
    gate_up: Tensor,
    offsets: list[int],
    layer: LayerStatistics,
) -> tuple[Tensor, Tensor]:
    """Inputs of every expert's down, bf16 [pairs, inner], and their Hessians."""
    strength = STRENGTH * job.inner
    counts = torch.tensor(offsets).diff()
    actual = _inner_of(job, inputs, gate_up, offsets)
    sample = layer.sample
    own = [
        _inner(job, sample, gate_up[i])
        if count < WELL_COVERED * job.inner
        else sample.new_zeros(0, job.inner)
        for i, count in enumerate(counts.tolist())
    ]
    own_offsets = [0]
    for part in own:
        own_offsets.append(own_offsets[-1] + len(part))
    substitute = routed_hessians(torch.cat(own), torch.tensor(own_offsets)) / len(sample)
    substitute = rounded_out(substitute, len(sample))
    # Where there is no substitute it is zero, and shrinking only scales, which changes nothing.
    routed = routed_hessians(actual, torch.tensor(offsets), weights=emphasis)
    return actual, shrink(routed, counts, substitute, strength)


def _down_problem(
    job: TileJob,
    tile: DenseTile,
    weight: Tensor,
    inputs: Tensor,
    target: Tensor | None,
    emphasis: Tensor | None,
    gate_up: Tensor,
    folded: Tensor | None,
    offsets: list[int],
    layer: LayerStatistics,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight and Hessian for down, on what the quantised gate and up make of the tokens: that is
    the third.

    `weight`: down as folded, float32; `folded`: what its inputs were divided by, float32
    [experts, inner].
    """
    if not job.quantizer.needs_hessian:
        return weight, None, None
    actual, hessian = _down_hessian(job, inputs, emphasis, gate_up, offsets, layer)
    if target is not None:
        counts = torch.tensor(offsets).diff()
        wanted = _inner_of(job, target, tile.gate_up, offsets)
        if folded is not None:
            wanted /= folded.repeat_interleave(counts.to(folded.device), dim=0)
        drift = routed_drift(wanted, actual, offsets, emphasis)
        drift /= _share(counts, STRENGTH * job.inner, job.device)
        with _named(job, "down"):
            weight = corrected(weight, hessian, drift)
    return weight, hessian, actual


def _quantize(
    job: TileJob,
    what: str,
    weight: Tensor,
    hessian: Tensor | None,
    outputs: RowOrder | None = None,
) -> Solved:
    """Solve a tile's matrices."""
    with _named(job, what):
        return job.quantizer.quantize(weight, hessian, job.scheme, job.options, outputs)


@contextlib.contextmanager
def _named(job: TileJob, what: str) -> Iterator[None]:
    """The solver knows the matrices' numbers only; errors here say whose they are."""
    try:
        yield
    except NumericalError as error:
        first, last = job.experts.start, job.experts.stop - 1
        where = f"layer {job.layer}, {what} of experts {first} to {last}"
        raise NumericalError(f"{where}: {error}") from None


def _share(counts: Tensor, strength: float, device: torch.device) -> Tensor:
    """What `shrink` divides an expert's sum by, [E, 1, 1]."""
    return (sent(counts.float(), device) + strength).view(-1, 1, 1)


def _inner_of(job: TileSource, inputs: Tensor, gate_up: Tensor, offsets: list[int]) -> Tensor:
    """Inputs of down for pairs of a tile, in expert order: bf16 [pairs, inner]."""
    gate, up = grouped_product(inputs, gate_up, offsets).chunk(2, dim=-1)
    return job.architecture.activation(gate) * up


def _inner(job: TileSource, hidden: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (hidden @ gate_up.T).chunk(2, dim=-1)
    return job.architecture.activation(gate) * up
