"""Which road computes which expert: a table per layer, from memory, use and measured rates.

resident  in GPU memory
zero-copy in pinned host memory, read over PCIe by the GPU's kernels
cpu       in host memory, computed by the CPU

The last two can share zero-copy experts: each lies in one layout that both read, so while the model
decodes, a part of every token's calls goes to the CPU, whichever experts they are (`handover.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.checkpoint.shard_map import LayerExperts, fill
from pipeline.errors import UserError

Road = Literal["resident", "zero-copy", "cpu"]
Table = dict[int, list[Road]]
ROADS: tuple[Road, ...] = get_args(Road)


BOTH = "both"
"""A request: all zero-copy, and calls divided as measured, or as "both:3" says."""

_BY_KERNELS = 0.88
"""Of the rate of copies, what kernels reach that read host memory themselves."""
_THERE_AND_BACK = 25e-6
"""Seconds from a layer's calls being handed to the CPU to its sums being back, beside computing."""
_WORTH = 0.9
"""Of a layer's time over PCIe alone, what both roads together may take at most to be chosen."""

Division = Callable[[int, int], int]
"""(a token's calls of experts in host memory, tokens) -> how many of them the CPU takes"""


@dataclass(frozen=True)
class Rates:
    """Bytes per second at which experts in host memory are read, both roads at once."""

    pcie: float
    cpu: float
    alone: float | None = None
    """Of PCIe, while the CPU reads nothing; as `pcie` where that is not known."""


def divide(rates: Rates, nbytes: int) -> Division:
    """So many calls to the CPU that both roads end at about the same time; nbytes: of an expert."""

    def to_cpu(calls: int, tokens: int) -> int:
        ends = _ends(rates, nbytes, calls, tokens)
        return ends.index(min(ends))

    return to_cpu


def fixed(calls: int) -> Division:
    """So many calls of each token to the CPU, or all that there are."""
    return lambda some, _tokens: min(calls, some)


def worth_dividing(rates: Rates, nbytes: int, calls: int) -> bool:
    """Whether both roads read one token's calls that much sooner than PCIe alone."""
    alone = calls * nbytes / ((rates.alone or rates.pcie) * _BY_KERNELS)
    return min(_ends(rates, nbytes, calls, 1)) <= _WORTH * alone


def _ends(rates: Rates, nbytes: int, calls: int, tokens: int) -> list[float]:
    """Seconds until both roads have read a layer's calls, with none, one, two ... on the CPU."""
    size = nbytes * tokens
    pcie, cpu = size / (rates.pcie * _BY_KERNELS), size / rates.cpu
    return [
        max((calls - some) * pcie, _THERE_AND_BACK + some * cpu if some else 0.0)
        for some in range(calls + 1)
    ]


def divided(request: str) -> tuple[str, int | None]:
    """The placement that "both" or "both:3" stands for, and calls of a token for the CPU (None: as
    measured); UserError for a number that is none.  Other requests have none for it: 0."""
    name, _, number = request.partition(":")
    if name != BOTH:
        return request, 0
    if not number:
        return "zero-copy", None
    if not number.isdecimal():
        raise UserError(f'placement "{request}": say both, or both:3 for 3 calls of each token')
    return "zero-copy", int(number)


def by_policy(layers: Mapping[int, LayerExperts], free: int, rates: Rates | None) -> Table:
    """The most used experts resident, as `free` bytes of GPU memory allow; the others on the two
    roads from host memory, so that by their use both finish together.

    A CPU slower than PCIe gets none: at 24 beside 55 GB/s its part won less than handing it over
    and waiting for it took in every layer (docs/performance.md).  rates None: the CPU gets none, as
    calls will be divided.
    """
    resident = fill(max(free, 0), layers)
    table: Table = {}
    for layer, experts in layers.items():
        shares = _shares(experts)
        roads: list[Road] = ["cpu"] * experts.experts
        ranked = _ranked(shares)
        for expert in ranked[: resident[layer]]:
            roads[expert] = "resident"
        rest = ranked[resident[layer] :]
        if rates is None:
            for expert in rest:
                roads[expert] = "zero-copy"
            table[layer] = roads
            continue
        load = {"zero-copy": 0.0, "cpu": 0.0}
        speed = {"zero-copy": rates.pcie, "cpu": rates.cpu}
        for expert in rest:
            ends = {road: (load[road] + shares[expert]) / speed[road] for road in load}
            sooner = ends["zero-copy"] <= ends["cpu"] or rates.cpu < rates.pcie
            road: Road = "zero-copy" if sooner else "cpu"
            roads[expert] = road
            load[road] += shares[expert]
        table[layer] = roads
    return table


def by_request(layers: Mapping[int, LayerExperts], request: str) -> Table:
    """A road for all ("zero-copy"), or parts of each layer's experts, the most used first
    ("resident:0.1,zero-copy:0.5,cpu:0.4"); UserError for anything else."""
    parts = _parse(request)
    table: Table = {}
    for layer, experts in layers.items():
        roads: list[Road] = [parts[-1][0]] * experts.experts
        ranked = _ranked(_shares(experts))
        done = 0.0
        for road, part in parts:
            begin, done = round(done * experts.experts), done + part
            for expert in ranked[begin : round(done * experts.experts)]:
                roads[expert] = road
        table[layer] = roads
    return table


def as_copies(
    table: Table, layers: Mapping[int, LayerExperts]
) -> tuple[dict[int, list[int]], Table]:
    """For a resident set that follows use: layer -> resident experts, the most used first, and the
    table of where experts are at home, all of those in pinned memory.  A layer that is resident as
    a whole has nothing to follow, and stays so."""
    copies: dict[int, list[int]] = {}
    homes: Table = {}
    for layer, roads in table.items():
        if all(road == "resident" for road in roads):
            homes[layer] = roads
            continue
        ranked = _ranked(_shares(layers[layer]))
        copies[layer] = [expert for expert in ranked if roads[expert] == "resident"]
        homes[layer] = ["zero-copy" if road == "resident" else road for road in roads]
    return {k: v for k, v in copies.items() if v}, homes


def copies_each(begin: Sequence[Sequence[int]]) -> int:
    """Copies that every layer gets: the mean of those to begin with, at least one if there are."""
    total = sum(map(len, begin))
    return max(1, total // len(begin)) if total else 0


def count(table: Table) -> dict[str, dict[str, int]]:
    """Layer -> road -> experts, for reports."""
    return {
        str(layer): {road: roads.count(road) for road in ROADS if road in roads}
        for layer, roads in table.items()
    }


def _parse(request: str) -> list[tuple[Road, float]]:
    parts: list[tuple[Road, float]] = []
    for piece in request.split(","):
        name, _, part = piece.strip().partition(":")
        road = next((known for known in ROADS if known == name), None)
        try:
            share = float(part) if part else 1.0
        except ValueError:
            share = -1.0
        if road is None or not 0 <= share <= 1:
            raise UserError(
                f'placement "{request}": "{piece.strip()}" is no road: say auto, fill, {BOTH}, one '
                f"of {', '.join(ROADS)}, or parts such as resident:0.1,zero-copy:0.5,cpu:0.4"
            )
        parts.append((road, share))
    if abs(sum(share for _, share in parts) - 1) > 1e-6:
        raise UserError(f'placement "{request}": its parts must add up to 1')
    return parts


def _shares(experts: LayerExperts) -> list[float]:
    return experts.shares() or [1 / experts.experts] * experts.experts


def _ranked(shares: Sequence[float]) -> list[int]:
    return sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
