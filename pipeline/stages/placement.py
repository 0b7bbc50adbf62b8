"""Where a conversion's activations live and how much is in flight, by the recipe's memory limits.

What is computed, in which pieces and in which order, is fixed; the limits decide only where the
pieces wait.  So the same recipe gives the same bytes on a large GPU and on a small one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from pipeline.quantize.methods import QUANTIZERS
from pipeline.stages.context import Context
from pipeline.stages.experts import CHUNK_PAIRS
from pipeline.stages.stream import TOKENS_PER_BATCH
from pipeline.stages.texts import planned_windows
from pipeline.stages.tiling import TILE_EXPERTS, tiles

AHEAD, BEHIND = 3, 8
"""Tiles that may be decoded before their turn, and packed ones that may wait for the disk."""

RUNTIME_BYTES = 1 << 30
"""Host memory that Python, torch and transformers take before any tensor (measured: 0.7 GiB)."""

RETREATS = 2
"""Steps back when the device has less room than was reckoned with: one tile decoded ahead, then the
smallest placement."""

FORWARD_WIDTHS = 40
"""Activations of a batch within a layer, in units of hidden (DeltaNet's float32 copies mostly)."""


@dataclass(frozen=True)
class Placement:
    """What the limits allow, and what it takes."""

    beside: bool
    """Whether the streams lie in host memory, where the device works on them in place."""
    ahead: int
    behind: int
    device_bytes: int
    """Estimated peak; 0 without a GPU."""
    host_bytes: int
    """Estimated peak of anonymous and pinned memory, without what the libraries take."""
    crew: int = 1
    """Tiles solved at once on each device: threads of a CPU share them, a GPU has one."""
    threads: int | None = None
    """torch's threads inside each; None: as many as everywhere."""


def place(context: Context) -> Placement:
    """The fastest placement within the limits, or else the smallest there is."""
    if context.device.type == "cpu":
        return smallest(context)
    limit = int(context.recipe.limits.device_memory)
    streams, tile = stream_bytes(context), tile_bytes(context)
    decoded = _decoded_bytes(context)
    # Of several GPUs' tiles the outputs wait for their turn, of a second one's too while it is
    # being solved; a tile reaches half of the tokens that are reckoned with here.
    waiting = _outputs_bytes(context) if len(context.solvers) > 1 else 0
    work = max(tile + waiting + decoded, _weighing_bytes(context))
    # A graph of the forward pass keeps its memory through the layer's tiles.
    inside = streams + _forward_bytes(context) + work
    ahead = 1 if context.retreats else _fitting(limit - inside, decoded, AHEAD)
    inside += ahead * decoded
    if inside > limit or context.retreats == RETREATS:
        return smallest(context)
    packed = (BEHIND + ahead) * decoded // 3
    return Placement(False, ahead, BEHIND, inside, _saved_bytes(context) + packed)


def retreat(context: Context) -> bool:
    """Put less on the device from now on, its memory having run out; False: there is no less."""
    before = place(context)
    while context.retreats < RETREATS:
        context.retreats += 1
        if place(context) != before:
            return True
    return False


def smallest(context: Context) -> Placement:
    """Streams in host memory, one tile at a time on the device; on a CPU one for each of its
    threads, as far as there is room."""
    streams, decoded = stream_bytes(context), _decoded_bytes(context)
    tile, forward = tile_bytes(context), _forward_bytes(context)
    weighing = _weighing_bytes(context)
    limit = int(context.recipe.limits.host_memory) - RUNTIME_BYTES
    if context.device.type != "cpu":
        # A pass whose modules are watched has its output written elsewhere.
        watched = 2 * context.geometry.hidden * _calibration_tokens(context)
        need = streams + watched + _saved_bytes(context) + decoded // 3
        if len(context.solvers) > 1:
            need += len(context.solvers) * _outputs_bytes(context)
        behind = _fitting(limit - need, decoded // 3, BEHIND)
        return Placement(
            beside=True,
            ahead=1,
            behind=behind,
            device_bytes=max(tile, forward, weighing) + 2 * decoded + _routing_bytes(context),
            host_bytes=need + behind * decoded // 3,
        )
    kept = 2 * context.geometry.hidden * stream_tokens(context)  # a copy that is being saved
    # A tile's results wait their turn: three streams' outputs.
    each = tile + 2 * decoded + 3 * _output_bytes(context)
    # On the host the allocator keeps most of what the forward pass had, in blocks too small to be
    # given back one by one.
    base = streams + kept + forward
    threads = torch.get_num_threads()
    inside = threads_inside(context)
    crew = _fitting(limit - base, each, threads // inside)
    need = base + max(crew * each, weighing)
    behind = _fitting(limit - need, decoded // 3, BEHIND)
    return Placement(
        beside=False,
        ahead=1,
        behind=behind,
        device_bytes=0,
        host_bytes=need + behind * decoded // 3,
        crew=crew,
        threads=inside,
    )


def threads_inside(context: Context) -> int:
    """torch's threads for one tile on a CPU.

    Tiles side by side, a thread each, never wait for one another; threads inside a tile meet after
    each of its thousands of small operations.  Part of what decides the bytes, so the number of
    tiles decides, not the memory.
    """
    count = len(tiles(context.geometry.experts, context.tile_experts))
    return max(1, torch.get_num_threads() // count)


def stream_tokens(context: Context) -> int:
    """Tokens of all streams."""
    return sum(_tokens_of_streams(context))


def _tokens_of_streams(context: Context) -> list[int]:
    recipe = context.recipe.requantize
    corrects = recipe.error_correction and QUANTIZERS[recipe.method].needs_hessian
    calibration = _calibration_tokens(context)
    return [calibration, _evaluation_tokens(context), *([calibration] if corrects else [])]


def _saved_bytes(context: Context) -> int:
    """The streams' copies in pinned memory, which comes in powers of two."""
    width = 2 * context.geometry.hidden
    return sum(1 << (tokens * width - 1).bit_length() for tokens in _tokens_of_streams(context))


def _evaluation_tokens(context: Context) -> int:
    return planned_windows(context.recipe) * context.recipe.validate_.window


def stream_bytes(context: Context) -> int:
    """What the streams take in the middle of a layer: output without experts and the experts'
    inputs (bf16), the experts' sums (float32), and the routing of each pair."""
    width = context.geometry.hidden * (2 + 2 + 4)
    return stream_tokens(context) * width + _routing_bytes(context)


def _routing_bytes(context: Context) -> int:
    return stream_tokens(context) * context.geometry.top_k * 28


def tile_bytes(context: Context) -> int:
    """Largest moment of a tile: weights in float32 with their Hessians and factors (of gate and
    up, or of down) and the tile's share of the tokens, or the outputs of a chunk of its pairs and
    their sums.

    Measured at hidden 2048, inner 512 and 5,120 tokens an expert, with error correction: 0.135 GiB
    an expert, for which this says 0.2.
    """
    g, recipe = context.geometry, context.recipe.requantize
    experts = min(context.tile_experts, g.experts)
    pairs = _tile_pairs(context)
    chunk = min(pairs, CHUNK_PAIRS) * (10 * g.hidden + 8 * g.inner) + _output_bytes(context)
    quantizer = QUANTIZERS[recipe.method]
    if not quantizer.needs_hessian:
        return max(experts * 3 * g.inner * g.hidden * 12, chunk)
    copies = 4 + 2 * (recipe.output_weighting and quantizer.weighs_outputs)
    first = 4 * 2 * g.inner * g.hidden * 4 + 6 * 4 * g.hidden**2
    second = copies * g.inner * g.hidden * 4 + 6 * 4 * g.inner**2
    solver = experts * max(first, second)
    return max(solver + 2 * pairs * (2 * g.hidden + 3 * g.inner), chunk)


def _tile_pairs(context: Context) -> int:
    """Pairs of the most popular tile.

    Of 32 experts one and a half times the mean has not been seen; the fewer, the less they even
    each other out.
    """
    g, tokens = context.geometry, _calibration_tokens(context)
    experts = min(context.tile_experts, g.experts)
    mean = tokens * g.top_k * experts / g.experts
    return min(int(mean * (1 + sqrt(TILE_EXPERTS / experts) / 2)), tokens * g.top_k)


def _calibration_tokens(context: Context) -> int:
    recipe = context.recipe.calibration
    return recipe.samples * recipe.sequence_length


def _output_bytes(context: Context) -> int:
    """Sums of a tile's outputs for the calibration text, the longest stream, float32."""
    tokens = max(_calibration_tokens(context), _evaluation_tokens(context))
    return 4 * min(_tile_pairs(context), tokens) * context.geometry.hidden


def _outputs_bytes(context: Context) -> int:
    """The same of every stream's text together."""
    share = _tile_pairs(context) / _calibration_tokens(context)
    width = 4 * context.geometry.hidden
    return sum(width * int(min(share, 1) * tokens) for tokens in _tokens_of_streams(context))


def _weighing_bytes(context: Context) -> int:
    """`Sensitivity` as it reads the head: float32, and once more multiplied or centred, and some
    Gram matrices."""
    g, recipe = context.geometry, context.recipe.requantize
    if not (recipe.output_weighting and QUANTIZERS[recipe.method].weighs_outputs):
        return 0
    return 8 * g.vocabulary * g.hidden + 6 * 4 * g.hidden**2


def _forward_bytes(context: Context) -> int:
    """Activations of one token batch inside a layer."""
    return 4 * TOKENS_PER_BATCH * context.geometry.hidden * FORWARD_WIDTHS


def _decoded_bytes(context: Context) -> int:
    """A decoded tile, bf16, and the stored bytes it was decoded from."""
    g = context.geometry
    return min(context.tile_experts, g.experts) * 3 * g.inner * g.hidden * 3


def _fitting(room: int, each: int, most: int) -> int:
    """How many of `each` fit, from one to `most`."""
    return max(1, min(most, room // max(1, each)))
