"""The source's predictions on given windows, streamed: it never has to fit in memory.

For models whose record is missing: conversions record the source on the way (requantize).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipeline.calibration import load_tokenizer
from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import RecipeError
from pipeline.evaluate.reference import Reference, ReferenceBuilder
from pipeline.evaluate.windows import Windows
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import geometry_of
from pipeline.stages.experts import TileSource, decode_tile, tile_output
from pipeline.stages.routing import sort_by_expert
from pipeline.stages.stream import COMPUTE_DTYPE, LayerStream, check_finite
from pipeline.stages.tiling import tiles


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


def check_original(
    original: Checkpoint, model: Path, architecture: Architecture, geometry: Geometry, other: str
) -> None:
    """RecipeError unless `original` has the form and the tokenizer of the model in `model`.

    `other` begins the message: what is not the original of what.
    """
    if original.config.get("model_type") != architecture.model_type:
        raise RecipeError(f"{other}: its model_type is {original.config.get('model_type')!r}")
    its = asdict(geometry_of(architecture, original.config, str(original.path)))
    for name, value in asdict(geometry).items():
        if its[name] != value:
            raise RecipeError(f"{other}: its {name} is {its[name]}, the source's is {value}")
    if (original.path / "tokenizer.json").is_file():
        vocabularies = [load_tokenizer(path).vocabulary() for path in (original.path, model)]
        if vocabularies[0] != vocabularies[1]:
            raise RecipeError(f"{other}: its tokenizer has another vocabulary")


def as_stored(name: str, checkpoint: Checkpoint) -> str:
    """A checkpoint's name with the form that most of it is in."""
    formats = checkpoint.describe().formats
    return f"{name} as stored ({max(formats, key=lambda kind: formats[kind].elements)})"
