"""The source's predictions on given windows, streamed: it never has to fit in memory.

For models whose record is missing: conversions record the source on the way (requantize).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipeline.checkpoint.reader import Checkpoint
from pipeline.evaluate.reference import Reference, ReferenceBuilder
from pipeline.evaluate.windows import Windows
from pipeline.models import Architecture
from pipeline.stages.experts import TileSource, decode_tile, sort_by_expert, tile_output, tiles
from pipeline.stages.stream import COMPUTE_DTYPE, LayerStream, check_finite


def stream_logits(
    checkpoint: Checkpoint,
    architecture: Architecture,
    windows: Windows,
    device: torch.device,
    dtype: torch.dtype = COMPUTE_DTYPE,
    progress: Callable[[str], None] = lambda _message: None,
) -> Iterable[tuple[int, Tensor]]:
    """(first window, float32 logits [batch, length, vocabulary]) of a checkpoint, any format.

    `dtype` float32 takes bf16's noise out, for comparing weights and nothing else.
    """
    stream = LayerStream(checkpoint, architecture, device, dtype)
    hidden = stream.embed(windows.token_ids)
    for layer in range(stream.geometry.layers):
        progress(f"source, layer {layer + 1} of {stream.geometry.layers}")
        module = stream.build_layer(layer, stream.load_dense(layer))
        recorded = stream.record(module, hidden)
        hidden = recorded.base
        if recorded.inputs is not None:
            routed = sort_by_expert(recorded, stream.geometry.experts)
            total = torch.zeros_like(routed.inputs, dtype=torch.float32)
            with torch.inference_mode():
                for experts in tiles(stream.geometry.experts):
                    tile = TileSource(checkpoint, architecture, layer, experts, device)
                    tile_output(tile, decode_tile(tile, dtype), routed).add_to(total)
            hidden = recorded.with_experts(total)
        check_finite(hidden, f"layer {layer} of the source")
    yield from stream.logits(hidden)


def record_source(
    checkpoint: Checkpoint,
    architecture: Architecture,
    windows: Windows,
    labels: dict[str, str],
    device: torch.device,
    dtype: torch.dtype = COMPUTE_DTYPE,
    progress: Callable[[str], None] = lambda _message: None,
) -> Reference:
    """Run windows through a checkpoint layer by layer and record its predictions."""
    builder = ReferenceBuilder(windows, labels=labels)
    for first, logits in stream_logits(checkpoint, architecture, windows, device, dtype, progress):
        builder.add(first, logits)
    return builder.build()
