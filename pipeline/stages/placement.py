"""Where a conversion's activations live and how much is in flight, by the recipe's memory limits.

What is computed, in which pieces and in which order, is fixed; the limits decide only where the
pieces wait.  So the same recipe gives the same bytes on a large GPU and on a small one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.models.architecture import Geometry
from pipeline.quantize.methods import QUANTIZERS
from pipeline.stages.context import Context
from pipeline.stages.experts import CHUNK_PAIRS, TILE_EXPERTS
from pipeline.stages.stream import TOKENS_PER_BATCH
from pipeline.stages.texts import planned_windows

AHEAD, BEHIND = 3, 8
"""Tiles that may be decoded before their turn, and packed ones that may wait for the disk."""

RETREATS = 2
"""Steps back when the device has less room than was reckoned with: one tile decoded ahead, then the
smallest placement."""

FORWARD_WIDTHS = 40
"""Activations of a batch within a layer, in units of hidden (DeltaNet's float32 copies mostly)."""


@dataclass(frozen=True)
class Placement:
    """What the limits allow, and what it takes."""

    home: torch.device
    """Where the streams live between and during layers: the device, or host memory."""
    ahead: int
    behind: int
    device_bytes: int
    """Estimated peak; 0 without a GPU."""
    host_bytes: int
    """Estimated peak of anonymous and pinned memory, without what the libraries take."""


def place(context: Context) -> Placement:
    """The fastest placement within the limits, or else the smallest there is."""
    if context.device.type == "cpu":
        return smallest(context)
    limit = int(context.recipe.limits.device_memory)
    streams, tile = stream_bytes(context), tile_bytes(context)
    decoded = _decoded_bytes(context.geometry)
    # A graph of the forward pass keeps its memory through the layer's tiles.
    # Outputs of the source's streams wait on the device until the tile is solved.
    inside = streams + tile + 2 * _output_bytes(context) + _forward_bytes(context) + decoded
    ahead = 1 if context.retreats else _fitting(limit - inside, decoded, AHEAD)
    inside += ahead * decoded
    if inside > limit or context.retreats == RETREATS:
        return smallest(context)
    saved = 2 * stream_tokens(context) * context.geometry.hidden
    packed = (BEHIND + ahead) * decoded // 3
    return Placement(context.device, ahead, BEHIND, inside, saved + packed)


def retreat(context: Context) -> bool:
    """Put less on the device from now on, its memory having run out; False: there is no less."""
    before = place(context)
    while context.retreats < RETREATS:
        context.retreats += 1
        if place(context) != before:
            return True
    return False


def smallest(context: Context) -> Placement:
    """Streams in host memory, one tile at a time on the device."""
    streams, decoded = stream_bytes(context), _decoded_bytes(context.geometry)
    tile, forward = tile_bytes(context), _forward_bytes(context)
    on_host = context.device.type == "cpu"
    # On the host the allocator keeps most of what the forward pass had, in blocks too small to be
    # given back one by one.
    work = (tile + forward if on_host else max(tile, forward)) + 2 * decoded
    need = streams + (work if on_host else decoded // 3)
    behind = _fitting(int(context.recipe.limits.host_memory) - need, decoded // 3, BEHIND)
    return Placement(
        home=torch.device("cpu"),
        ahead=1,
        behind=behind,
        device_bytes=0 if on_host else work,
        host_bytes=need + behind * decoded // 3,
    )


def stream_tokens(context: Context) -> int:
    """Tokens of all streams."""
    recipe = context.recipe
    calibration = recipe.calibration.samples * recipe.calibration.sequence_length
    evaluation = planned_windows(recipe) * recipe.validate_.window
    corrects = recipe.requantize.error_correction
    corrects &= QUANTIZERS[recipe.requantize.method].needs_hessian
    return calibration + evaluation + (calibration if corrects else 0)


def stream_bytes(context: Context) -> int:
    """What the streams take in the middle of a layer: output without experts and the experts'
    inputs (bf16), the experts' sums (float32), and the routing of each pair."""
    g = context.geometry
    return stream_tokens(context) * (g.hidden * (2 + 2 + 4) + g.top_k * 28)


def tile_bytes(context: Context) -> int:
    """Largest moment of a tile: gate and up in float32 with their Hessians and factors and the
    tile's share of the tokens, or the outputs of a chunk of its pairs and their sums.

    Measured at hidden 2048, inner 512 and 5,120 tokens an expert, with error correction: 0.135 GiB
    an expert, for which this says 0.2.
    """
    g = context.geometry
    experts = min(TILE_EXPERTS, g.experts)
    pairs = _tile_pairs(context)
    chunk = min(pairs, CHUNK_PAIRS) * (10 * g.hidden + 8 * g.inner) + _output_bytes(context)
    if not QUANTIZERS[context.recipe.requantize.method].needs_hessian:
        return max(experts * 3 * g.inner * g.hidden * 12, chunk)
    solver = experts * (4 * 2 * g.inner * g.hidden * 4 + 6 * 4 * g.hidden**2)
    return max(solver + 2 * pairs * (2 * g.hidden + 3 * g.inner), chunk)


def _tile_pairs(context: Context) -> int:
    """Pairs of the most popular tile; one and a half times the mean has not been seen."""
    g, recipe = context.geometry, context.recipe
    calibration = recipe.calibration.samples * recipe.calibration.sequence_length
    mean = calibration * g.top_k * min(TILE_EXPERTS, g.experts) // g.experts
    return min(3 * mean // 2, calibration * g.top_k)


def _output_bytes(context: Context) -> int:
    """Sums of a tile's outputs for one stream, float32."""
    return 4 * min(_tile_pairs(context), stream_tokens(context)) * context.geometry.hidden


def _forward_bytes(context: Context) -> int:
    """Activations of one token batch inside a layer."""
    return 4 * TOKENS_PER_BATCH * context.geometry.hidden * FORWARD_WIDTHS


def _decoded_bytes(g: Geometry) -> int:
    """A decoded tile, bf16, and the stored bytes it was decoded from."""
    return min(TILE_EXPERTS, g.experts) * 3 * g.inner * g.hidden * 3


def _fitting(room: int, each: int, most: int) -> int:
    """How many of `each` fit, from one to `most`."""
    return max(1, min(most, room // max(1, each)))
