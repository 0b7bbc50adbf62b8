"""Where experts were and which roads their calls took, as rows of text for any kind of table."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.progress import size
from pipeline.report.words import percent

PLACES = {
    "resident": "GPU memory",
    "zero-copy": "RAM, read by the GPU over PCIe",
    "cpu": "RAM, computed by the CPU",
}
"""Road -> where its experts are."""

_OTHERS = {"resident": "copies", "zero-copy": "none", "cpu": "those of zero-copy"}
"""Road -> what it computed without experts of its own."""

Use = Mapping[str, Mapping[str, float]]
"""Layer -> road -> its part of the layer's calls."""


def by_road(nbytes: Mapping[str, int], use: Use) -> list[list[str]]:
    """Road, place, size, and part of all calls (layers weigh alike; empty when not counted).

    A road without bytes of its own was taken by copies that followed use, or, the CPU's, by calls
    of zero-copy experts, which both read.
    """
    return [
        [
            road,
            place,
            size(nbytes[road]) if nbytes.get(road) else _OTHERS[road],
            percent(_mean(use, road)) if use else "",
        ]
        for road, place in PLACES.items()
        if nbytes.get(road) or (use and _mean(use, road))
    ]


def by_layer(
    experts: Mapping[str, str | Mapping[str, int]], phases: Mapping[str, Use]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each layer's experts by road, and the part of its calls in every phase.

    experts: layer -> the road of all of them, or road -> how many, as in `hybrid_placement`.
    Roads that no layer has and no call took are left out.
    """
    held = {k: {v: "all"} if isinstance(v, str) else _words(v) for k, v in experts.items()}
    taken = [parts for use in phases.values() for parts in use.values()]
    seen = {road for here in (*held.values(), *taken) for road in here}
    roads = [road for road in PLACES if road in seen]
    head = ["layer", *roads]
    head += [f"{name}: {road}" for name in phases for road in roads]
    rows = []
    for layer, here in held.items():
        row = [layer, *(here.get(road, "") for road in roads)]
        for use in phases.values():
            parts = use.get(layer)
            row += [percent(parts.get(road, 0.0)) if parts else "" for road in roads]
        rows.append(row)
    return head, rows


def _words(counts: Mapping[str, int]) -> dict[str, str]:
    return {road: str(number) for road, number in counts.items()}


def _mean(use: Use, road: str) -> float:
    return sum(parts.get(road, 0.0) for parts in use.values()) / len(use)
