"""What connects a loaded model's layers: prefill's stream, copies that follow use, decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from pipeline.hybrid import delta_prefill
from pipeline.hybrid.generation import install
from pipeline.hybrid.placing import copies_each
from pipeline.hybrid.residency import Residency
from pipeline.hybrid.split import SplitExperts
from pipeline.hybrid.stream import Stream


def connect(
    model: PreTrainedModel,
    copies: Mapping[int, Sequence[int]] | None = None,
    *,
    kernels: bool | None = None,
) -> Residency | None:
    """Stream zero-copy experts to long prompts, and let `model.generate` decode in fixed buffers.

    copies: per decoder layer, the experts to begin with of those that get copies on the device; as
    many in every layer as the mean, and which follows use from then on.  None: no copies.
    kernels: see `Decoder`.
    """
    layers = {
        number: module
        for number, layer in enumerate(model.model.layers)
        for module in layer.modules()
        if isinstance(module, SplitExperts) and "zero-copy" in module.device_roads
    }
    residency = None
    alike = len({split.layout for split in layers.values()}) == 1
    if alike:  # buffers and copies are of one size
        device: torch.device = model.device
        records = [split.device_roads["zero-copy"].records for split in layers.values()]
        stream = Stream(records, device)
        for number, split in enumerate(layers.values()):
            split.stream_from(stream, number)
        if copies:
            begin = [copies.get(number, ()) for number in layers]
            residency = Residency(list(layers.values()), copies_each(begin), device)
            residency.begin_with(begin)
    if model.device.type == "cuda" if kernels is None else kernels:
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                delta_prefill.install(layer.linear_attn)
    install(model, residency, kernels=kernels)
    return residency
