"""How a model is divided into files: one for the experts of each layer, others for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.checkpoint.names import expert_of, natural

FileClass = Literal["nonexpert", "experts"]


@dataclass(frozen=True)
class Shard:
    """One file to be written."""

    name: str
    kind: FileClass
    layer: int | None
    """The layer whose routed experts it holds."""
    tensors: tuple[str, ...]
    nbytes: int
    """Of the tensors, without the header."""


def experts_file(layer: int) -> str:
    """Name of the file with the routed experts of a layer."""
    return f"model-experts-layer-{layer:03d}.safetensors"


def nonexpert_file(number: int, total: int) -> str:
    """Name of the `number`th (from 1) of the other files."""
    return f"model-nonexpert-{number:05d}-of-{total:05d}.safetensors"


def plan_split(sizes: Mapping[str, int], max_bytes: int) -> list[Shard]:
    """Files for stored tensors of the given bytes, non-experts first, then layer by layer.

    Non-expert tensors keep natural order and fill files up to `max_bytes`; the parts of one
    module stay together, and a module larger than that has a file of its own.
    """
    experts: dict[int, list[str]] = defaultdict(list)
    modules: dict[str, list[str]] = defaultdict(list)
    for name in sorted(sizes, key=natural):
        expert = expert_of(name)
        if expert is None:
            modules[name.rpartition(".")[0]].append(name)
        else:
            experts[expert.layer].append(name)
    groups: list[list[str]] = []
    filled = max_bytes
    for names in modules.values():
        size = sum(sizes[name] for name in names)
        if filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += names
        filled += size
    plain = [
        Shard(
            nonexpert_file(number, len(groups)),
            "nonexpert",
            None,
            tuple(names),
            sum(sizes[name] for name in names),
        )
        for number, names in enumerate(groups, 1)
    ]
    layered = [
        Shard(
            experts_file(layer),
            "experts",
            layer,
            tuple(names),
            sum(sizes[name] for name in names),
        )
        for layer, names in sorted(experts.items())
    ]
    return plain + layered
