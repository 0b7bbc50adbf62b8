"""The unit of work inside a layer: a tile of routed experts, from stored bytes to packed bytes.

Decode, statistics, solving, packing and the tile's share of the layer's output all happen here, on
the device that the job names, from the layer's routed activations and references into the source.
Only packed tensors and two sums leave.  The same function could be called on another device or
another machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import NumericalError
from pipeline.models import Architecture
from pipeline.quantize.hessian import routed_hessians, shrink
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.solved import Quantizer, Solved
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor
from pipeline.stages.stream import COMPUTE_DTYPE, Recorded

TILE_EXPERTS = 32
"""Experts decoded and solved together.  Fixed: another tile gives other bytes."""

DOWN_SAMPLE_TOKENS = 512
"""Tokens of the layer that an under-covered expert's own gate and up turn into down inputs."""

WELL_COVERED = 4
"""Routed tokens per inner column above which an expert's down needs no substitute."""

GATE_UP_STRENGTH = 64.0
"""Tokens' worth of the all-token second moment mixed into an expert's own."""

DOWN_STRENGTH = 64.0
"""Tokens' worth of the substitute mixed into the second moment of an under-covered down."""


@dataclass(frozen=True)
class Routed:
    """A stream's inputs to the experts of one layer, sorted by expert."""

    inputs: Tensor
    """bf16 [tokens, hidden]"""
    tokens: Tensor
    """int64 [pairs]: the token of each (token, expert) pair, pairs in expert order."""
    weights: Tensor
    """float32 [pairs]: the router's weight of each pair."""
    offsets: tuple[int, ...]
    """Expert e owns pairs offsets[e] to offsets[e + 1]."""

    def count(self, expert: int) -> int:
        """Tokens routed to an expert."""
        return self.offsets[expert + 1] - self.offsets[expert]


def sort_by_expert(recorded: Recorded, experts: int) -> Routed:
    """Sort a layer's recorded (token, expert) pairs by expert; stable, so deterministic."""
    assert recorded.inputs is not None
    assert recorded.index is not None
    assert recorded.weight is not None
    top_k = recorded.index.shape[1]
    flat = recorded.index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return Routed(
        inputs=recorded.inputs,
        tokens=order // top_k,
        weights=recorded.weight.reshape(-1)[order],
        offsets=tuple(offsets),
    )


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


@dataclass(frozen=True)
class DenseTile:
    """Decoded weights of a tile, bf16 on the device."""

    gate_up: Tensor
    """[experts, 2 * inner, hidden]; gate's rows first"""
    down: Tensor
    """[experts, hidden, inner]"""


@dataclass(frozen=True)
class SolvedTile:
    """A tile's result."""

    gate: QuantizedTensor
    up: QuantizedTensor
    down: QuantizedTensor
    dense: DenseTile
    """The quantised weights, dequantised: what the next layer must see."""
    gate_up_loss: list[float]
    down_loss: list[float]


def decode_tile(job: TileSource, dtype: torch.dtype = COMPUTE_DTYPE) -> DenseTile:
    """Read and decode a tile's matrices from the source."""
    a = job.architecture

    def stack(projection: str) -> Tensor:
        names = [f"{a.expert_module(job.layer, e, projection)}.weight" for e in job.experts]
        return job.checkpoint.load_stack(names, job.device, dtype)

    return DenseTile(torch.cat([stack(a.gate), stack(a.up)], dim=1), stack(a.down))


def add_output(job: TileSource, tile: DenseTile, routed: Routed, total: Tensor) -> None:
    """Add the tile's weighted outputs to `total`, float32 [tokens, hidden].

    Experts are added one after another, so that no two additions meet the same row at once: the sum
    has one order, on every device.
    """
    first = job.experts.start
    for expert in job.experts:
        pairs = slice(routed.offsets[expert], routed.offsets[expert + 1])
        tokens = routed.tokens[pairs]
        if len(tokens) == 0:
            continue
        hidden = routed.inputs[tokens]
        output = _inner(job, hidden, tile.gate_up[expert - first]) @ tile.down[expert - first].T
        total.index_add_(0, tokens, output.float() * routed.weights[pairs, None])


def solve_tile(
    job: TileJob, tile: DenseTile, routed: Routed, common: Tensor, sample: Tensor
) -> SolvedTile:
    """Quantise a tile's matrices on the activations routed to it.

    `common`: second moment of all the layer's tokens, float32 [hidden, hidden], mixed into the
    statistics of experts that saw few; `sample`: inputs of a seeded sample of the layer's tokens,
    bf16 [sample, hidden], which such an expert's own gate and up turn into inputs of its down.
    """
    experts, inner = job.experts, job.inner
    offsets = [routed.offsets[e] - routed.offsets[experts.start] for e in experts]
    offsets.append(routed.offsets[experts.stop] - routed.offsets[experts.start])
    pairs = slice(routed.offsets[experts.start], routed.offsets[experts.stop])
    inputs = routed.inputs[routed.tokens[pairs]]
    offsets_tensor = torch.tensor(offsets)
    counts = offsets_tensor.diff()

    hessian = None
    if job.quantizer.needs_hessian:
        hessian = shrink(routed_hessians(inputs, offsets_tensor), counts, common, GATE_UP_STRENGTH)
    solved = _quantize(job, "gate and up", tile.gate_up, hessian)
    gate_up = solved.quantized.dequantize(COMPUTE_DTYPE)
    del hessian

    down_hessian = None
    if job.quantizer.needs_hessian:
        down_inputs = torch.empty(len(inputs), inner, dtype=COMPUTE_DTYPE, device=job.device)
        for i in range(len(experts)):
            rows = slice(offsets[i], offsets[i + 1])
            down_inputs[rows] = _inner(job, inputs[rows], gate_up[i])
        own = [
            _inner(job, sample, gate_up[i])
            if offsets[i + 1] - offsets[i] < WELL_COVERED * inner
            else sample.new_zeros(0, inner)
            for i in range(len(experts))
        ]
        own_offsets = [0]
        for part in own:
            own_offsets.append(own_offsets[-1] + len(part))
        substitute = routed_hessians(torch.cat(own), torch.tensor(own_offsets)) / len(sample)
        down_hessian = shrink(
            routed_hessians(down_inputs, offsets_tensor), counts, substitute, DOWN_STRENGTH
        )
    solved_down = _quantize(job, "down", tile.down, down_hessian)

    return SolvedTile(
        gate=solved.quantized.rows(0, inner),
        up=solved.quantized.rows(inner, 2 * inner),
        down=solved_down.quantized,
        dense=DenseTile(gate_up, solved_down.quantized.dequantize(COMPUTE_DTYPE)),
        gate_up_loss=solved.loss.tolist(),
        down_loss=solved_down.loss.tolist(),
    )


def _quantize(job: TileJob, what: str, weight: Tensor, hessian: Tensor | None) -> Solved:
    """Solve a tile's matrices; the quantiser knows their numbers only, errors here say whose."""
    try:
        return job.quantizer.quantize(weight.float(), hessian, job.scheme, job.options)
    except NumericalError as error:
        first, last = job.experts.start, job.experts.stop - 1
        where = f"layer {job.layer}, {what} of experts {first} to {last}"
        raise NumericalError(f"{where}: {error}") from None


def _inner(job: TileSource, hidden: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (hidden @ gate_up.T).chunk(2, dim=-1)
    return job.architecture.activation(gate) * up


def tiles(experts: int) -> list[range]:
    """The fixed tiles of a layer."""
    return [range(s, min(s + TILE_EXPERTS, experts)) for s in range(0, experts, TILE_EXPERTS)]
