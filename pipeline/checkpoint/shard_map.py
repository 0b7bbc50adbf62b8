"""shard_map.json: which file holds what, how often each expert is used, what fits which GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.index import read_json
from pipeline.checkpoint.split import FileClass
from pipeline.checkpoint.untrusted import check_name, is_size, shown
from pipeline.errors import CheckpointError

MAP_NAME = "shard_map.json"
SCHEMA_VERSION = 1
GIB = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
GPU_GIB = (8, 10, 16, 24, 48, 80)


@dataclass(frozen=True)
class Reserve:
    """Device memory that weights must leave free, in bytes."""

    context: int
    """What the driver takes: context, code, kernels' local memory, page tables."""
    workspace: int
    """Activations, libraries' workspaces, and the buffers that experts pass through in prefill."""
    cache: int
    """Keys, values and recurrent state of the sequence."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.context + self.workspace + self.cache


@dataclass(frozen=True)
class MappedFile:
    """One weight file of the directory."""

    name: str
    kind: FileClass
    layer: int | None
    nbytes: int
    """Size of the file."""
    sha256: str | None = None


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of one layer."""

    experts: int
    expert_nbytes: int
    """Stored bytes of one expert's tensors."""
    calls: Sequence[int] | None = None
    """Tokens of the calibration that chose each expert; None when nothing was counted."""

    def shares(self) -> list[float] | None:
        """Each expert's part of the layer's calls (they add up to 1)."""
        if self.calls is None or not sum(self.calls):
            return None
        total = sum(self.calls)
        return [round(count / total, 9) for count in self.calls]


@dataclass(frozen=True)
class Placement:
    """What one size of GPU holds beside the non-experts."""

    memory_gib: int
    fits: bool
    """Whether the non-experts and the reserve fit at all."""
    free_nbytes: int
    """Left for experts; negative: missing."""
    resident: Mapping[int, int]
    """Layer -> experts kept on the device, the most used first."""
    expected_hits: float | None
    """Part of expert calls that find their expert resident, on text like the calibration's."""


def place(
    memory_gib: int, nonexpert_nbytes: int, layers: Mapping[int, LayerExperts], reserve: Reserve
) -> Placement:
    """Fill the memory that is left with experts, see `fill`."""
    free = memory_gib * GIB - nonexpert_nbytes - reserve.total
    if free < 0:
        return Placement(memory_gib, False, free, dict.fromkeys(layers, 0), None)
    resident = fill(free, layers)
    shares = {layer: experts.shares() for layer, experts in layers.items()}
    hits = None
    if shares and all(known is not None for known in shares.values()):
        found = [
            sum(sorted(known, reverse=True)[: resident[layer]])
            for layer, known in shares.items()
            if known is not None
        ]
        hits = round(min(sum(found) / len(found), 1.0), 4)
    return Placement(memory_gib, True, free, resident, hits)


def fill(free: int, layers: Mapping[int, LayerExperts]) -> dict[int, int]:
    """Layer -> how many of its experts, the most used first, go into `free` bytes.

    Where calls were counted, the most used experts of all layers go first (per byte); where not,
    every layer gets the same number, earlier layers one more.
    """
    resident = dict.fromkeys(layers, 0)
    shares = {layer: experts.shares() for layer, experts in layers.items()}
    wishes: list[tuple[float, int, int]] = []
    for layer, experts in layers.items():
        known = shares[layer]
        ranked = sorted(known, reverse=True) if known else [0.0] * experts.experts
        wishes += [
            (-share / experts.expert_nbytes, rank, layer) for rank, share in enumerate(ranked)
        ]
    left = free
    full: set[int] = set()
    for _, _, layer in sorted(wishes):
        size = layers[layer].expert_nbytes
        if layer in full or size > left:
            full.add(layer)  # its later experts are used less, so they do not jump the queue
            continue
        resident[layer] += 1
        left -= size
    return resident


def build_shard_map(
    files: Sequence[MappedFile],
    layers: Mapping[int, LayerExperts],
    reserve: Reserve,
) -> dict[str, Any]:
    """Contents of shard_map.json; see the keys' own `about`."""
    nonexpert = sum(file.nbytes for file in files if file.kind == "nonexpert")
    return {
        "schema_version": SCHEMA_VERSION,
        "about": "class nonexpert: wanted on the GPU; class experts: routed experts of one layer. "
        "activation_frequency: each expert's share of its layer's calls in the calibration text. "
        "placements: experts per layer that fit a GPU of so many GiB beside all non-experts and "
        "the reserve, the most used first.",
        "files": [_file(file) for file in files],
        "nonexpert_bytes": nonexpert,
        "experts_bytes": sum(file.nbytes for file in files if file.kind == "experts"),
        "layers": {
            str(layer): {
                "experts": experts.experts,
                "bytes_per_expert": experts.expert_nbytes,
                "activation_frequency": experts.shares(),
            }
            for layer, experts in sorted(layers.items())
        },
        "reserve": {
            "context": reserve.context,
            "workspace": reserve.workspace,
            "cache": reserve.cache,
        },
        "placements": [
            _placement(place(gib, nonexpert, layers, reserve), reserve) for gib in GPU_GIB
        ],
    }


def read_shard_map(directory: Path) -> dict[str, Any]:
    """shard_map.json as written; CheckpointError when missing or of another schema version."""
    return check_version(read_json(directory, MAP_NAME))


def check_version(table: dict[str, Any]) -> dict[str, Any]:
    """The table itself; CheckpointError for one of another schema version."""
    version = table.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{MAP_NAME}: schema version {shown(version, 30)}, this program reads"
            f" {SCHEMA_VERSION}; run `requant shard` again"
        )
    return table


def mapped_files(table: Mapping[str, Any]) -> dict[str, MappedFile]:
    """The files of a shard map by name; CheckpointError for an entry that makes no sense."""
    files = table.get("files")
    if not isinstance(files, list):
        raise CheckpointError(f"{MAP_NAME}: has no list of files")
    found: dict[str, MappedFile] = {}
    for file in files:
        if not isinstance(file, dict) or not isinstance(file.get("name"), str):
            raise CheckpointError(f"{MAP_NAME}: lists a file without a name")
        name, kind, layer = file["name"], file.get("class"), file.get("layer")
        check_name(name, MAP_NAME)
        digest = file.get("sha256")
        known = (layer is None or is_size(layer)) and is_size(file.get("bytes"))
        if kind not in ("nonexpert", "experts") or not known or name in found:
            raise CheckpointError(f"{MAP_NAME}: {name} has no proper class, layer and bytes")
        if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise CheckpointError(f"{MAP_NAME}: {name} has a sha256 that is none")
        found[name] = MappedFile(name, kind, layer, file["bytes"], digest)
    return found


def _file(file: MappedFile) -> dict[str, Any]:
    table: dict[str, Any] = {"name": file.name, "class": file.kind, "layer": file.layer}
    table["bytes"] = file.nbytes
    if file.sha256 is not None:
        table["sha256"] = file.sha256
    return table


def _placement(placement: Placement, reserve: Reserve) -> dict[str, Any]:
    table: dict[str, Any] = {"memory_gib": placement.memory_gib, "fits": placement.fits}
    if not placement.fits:
        table["note"] = (
            f"non-experts and the reserve of {reserve.total / GIB:.2f} GiB need "
            f"{-placement.free_nbytes / GIB:.2f} GiB more"
        )
        return table
    table["resident_experts"] = {str(k): v for k, v in sorted(placement.resident.items())}
    table["resident_total"] = sum(placement.resident.values())
    table["expected_hits"] = placement.expected_hits
    return table
