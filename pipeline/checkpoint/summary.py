"""What a directory is, in numbers and in one line, from headers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.checkpoint.header import FileHeader
from pipeline.checkpoint.names import expert_of
from pipeline.checkpoint.stored import StoredWeight
from pipeline.checkpoint.untrusted import shown

ROUTERS = (".mlp.gate.weight", ".router.weight", ".block_sparse_moe.gate.weight")


@dataclass
class Share:
    """Weights of one format."""

    count: int = 0
    nbytes: int = 0
    elements: int = 0


@dataclass(frozen=True)
class Summary:
    """See `Checkpoint.describe`; `dataclasses.asdict` of it is JSON."""

    verdict: str
    """One line that says which variant this is."""
    model_type: str
    quant_method: str | None
    """As config.json says; what the tensors are is in `formats`."""
    formats: dict[str, Share]
    """By format; dense ones by dtype (`dense BF16`), double quantised ones marked."""
    nbytes: int
    """Stored bytes of all weights."""
    expert_nbytes: int
    elements: int
    layers: list[int]
    """Layers that hold routed experts."""
    experts: int
    """Routed experts per layer; 0 when there are none or they are stacked and of unknown shape."""
    expert_layout: str
    """"one by one", "stacked" or "none"."""
    router: str
    """Format of the routers."""
    files: int
    headers_only: bool
    oddities: list[str]
    """What is unusual, but can be read."""
    conflicts: list[str]
    """Where the tensors contradict config.json or one another."""


def label(weight: StoredWeight) -> str:
    """`nf4 double`, `nf4`, `gptq 4 bits`, `dense BF16` ..."""
    if weight.format == "dense":
        return f"dense {weight.parts['data'].dtype}"
    if "nested_absmax" in weight.parts:
        return f"{weight.format} double"
    bits = getattr(weight.known.details, "bits", None) if weight.known else None
    return f"{weight.format} {bits} bits" if bits else weight.format


@dataclass
class _Counts:
    formats: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    expert_formats: Counter[str] = field(default_factory=Counter)
    routers: Counter[str] = field(default_factory=Counter)
    numbered: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Layer -> experts stored one by one."""
    stacked: dict[int, int] = field(default_factory=dict)
    """Layer -> experts in one tensor (0: its shape is not known)."""
    expert_nbytes: int = 0

    def add(self, weight: StoredWeight) -> None:
        kind = label(weight)
        share = self.formats[kind]
        share.count += 1
        share.nbytes += weight.nbytes
        share.elements += weight.elements
        if weight.name.endswith(ROUTERS):
            self.routers[kind] += 1
        expert = expert_of(weight.name)
        if expert is None:
            return
        self.expert_nbytes += weight.nbytes
        self.expert_formats[kind] += 1
        if expert.expert is not None:
            self.numbered[expert.layer].add(expert.expert)
        else:
            shape = weight.known.shape if weight.known else None
            self.stacked[expert.layer] = shape[0] if shape and len(shape) == 3 else 0

    @property
    def quantised(self) -> bool:
        return any(not name.startswith("dense") for name in self.formats)

    @property
    def experts(self) -> int:
        counts = [len(found) for found in self.numbered.values()] or list(self.stacked.values())
        return max(counts, default=0)

    @property
    def layers(self) -> list[int]:
        return sorted(self.numbered.keys() | self.stacked.keys())

    @property
    def layout(self) -> str:
        return "one by one" if self.numbered else "stacked" if self.stacked else "none"


def summarise(
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    headers: Mapping[str, FileHeader],
) -> Summary:
    """Count formats, bytes and experts, and note what is unusual."""
    counts = _Counts()
    for weight in weights.values():
        counts.add(weight)
    formats = counts.formats
    return Summary(
        verdict=_verdict(config, counts),
        model_type=shown(config.get("model_type", "unknown"), 60),
        quant_method=_method(config),
        formats=dict(sorted(formats.items())),
        nbytes=sum(share.nbytes for share in formats.values()),
        expert_nbytes=counts.expert_nbytes,
        elements=sum(share.elements for share in formats.values()),
        layers=counts.layers,
        experts=counts.experts,
        expert_layout=counts.layout,
        router=", ".join(sorted(counts.routers)) or "none",
        files=len(headers),
        headers_only=any(header.headers_only for header in headers.values()),
        oddities=_oddities(counts),
        conflicts=_conflicts(config, counts),
    )


def _method(config: Mapping[str, Any]) -> str | None:
    method = (config.get("quantization_config") or {}).get("quant_method")
    return None if method is None else shown(method, 60)


def _verdict(config: Mapping[str, Any], counts: _Counts) -> str:
    kind = shown(config.get("model_type", "unknown"), 60)
    formats = counts.formats
    if counts.layout == "none":
        main = max(formats, key=lambda name: formats[name].nbytes, default="nothing")
        return f"{kind}: no routed experts, mostly {main}"
    how = " and ".join(name for name, _ in counts.expert_formats.most_common())
    number = str(counts.experts) if counts.experts else "an unknown number of"
    router = ", ".join(sorted(counts.routers)) or "not found"
    return (
        f"{kind}: {len(counts.layers)} layers of {number} experts stored {counts.layout} as "
        f"{how}; router {router}"
    )


def _oddities(counts: _Counts) -> list[str]:
    found = []
    if len(counts.expert_formats) > 1:
        found.append(f"experts are stored in {len(counts.expert_formats)} ways")
    if any(not name.startswith("dense") for name in counts.routers):
        found.append("routers are quantised")
    if counts.numbered and counts.stacked:
        found.append("some layers hold experts one by one, others stacked")
    plain = counts.expert_formats and all(
        name.startswith("dense") for name in counts.expert_formats
    )
    if plain and counts.quantised:
        found.append("experts are left unquantised beside quantised matrices")
    return found


def _conflicts(config: Mapping[str, Any], counts: _Counts) -> list[str]:
    found = []
    method = _method(config)
    sizes = {len(experts) for experts in counts.numbered.values()}
    said = config.get("num_experts", config.get("num_local_experts"))
    if len(sizes) > 1:
        found.append(f"layers hold {min(sizes)} to {max(sizes)} experts")
    elif sizes and isinstance(said, int) and sizes != {said}:
        found.append(f"config.json says {said} experts, {max(sizes)} are stored")
    if method and not counts.quantised:
        found.append(f"config.json says {method}, no tensor is quantised")
    if counts.quantised and not method:
        found.append("tensors are quantised, config.json has no quantization_config")
    return found
