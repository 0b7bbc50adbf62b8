"""Where one load puts experts, and how much room they and their prompts' ring get.

Roads come from `roads.py`; here they are fitted into a GPU's memory, item by item (`ledger.py`),
and into RAM.  Experts of the CPU may come to the GPU for prompts as zero-copy ones do, if both
sides read the same records and there is room for a ring; so they are pinned where RAM allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.hybrid.ledger import Experts, Ledger, ledger, resident_threads
from pipeline.hybrid.placing import Table, as_copies, by_request
from pipeline.hybrid.roads import (
    CHOSEN,
    allowed_on,
    check_device,
    check_host,
    choose,
    kernels_fail,
)
from pipeline.hybrid.routed import LayoutError, RoutedExperts
from pipeline.hybrid.steps import STEPS
from pipeline.hybrid.stream import BOTH, LEAST_PARTS, NEAR, PARTS
from pipeline.models.architecture import Geometry

UNPINNED = 4 << 30
"""Bytes of RAM that are left to all else where the CPU's experts are pinned, which they need not
be: pinned memory cannot be taken back when it gets scarce."""


@dataclass
class Places:
    """What was decided for one load."""

    roads: Table = field(default_factory=dict)
    homes: Table = field(default_factory=dict)
    """The same, but for residents that are copies."""
    copies: dict[int, list[int]] = field(default_factory=dict)
    """See `ledger.Experts`."""
    ledger: Ledger | None = None
    buffers: int = PARTS
    """In the ring that prompts' experts pass through, at most."""
    visiting: bool = False
    """Whether the CPU's experts may come to the GPU for prompts."""
    why_not: str = ""
    """Why they stay, where that is for want of memory."""
    pinning: bool = False
    """Whether they are to be pinned."""
    remarks: list[str] = field(default_factory=list)
    """What is to be said of it."""


@dataclass(frozen=True)
class Machine:
    """One load's device and what it may take; `native`: see `hybrid.load`."""

    device: torch.device
    dtype: torch.dtype
    limit: int | None
    """Bytes of the device."""
    host: int | None
    """Bytes of RAM for experts."""
    follow_use: bool
    native: bool


def find_places(
    placement: str,
    layers: Mapping[int, LayerExperts],
    experts: RoutedExperts,
    config: Any,  # noqa: ANN401  (a transformers config)
    geometry: Geometry,
    need: int,
    machine: Machine,
    where: str,
) -> Places:
    """Roads for all experts; need: bytes that all else takes on the device; where: the model.

    Raises UserError for a placement that is unknown, ResourceError when experts do not fit where
    it wants them.
    """
    found = Places()
    fit = _Fit(found, experts, config, geometry, need, machine)
    cuda = machine.device.type == "cuda"
    room = 0
    if placement in CHOSEN and cuda:
        why = "no GPU memory for the ring that they would pass through"
        try:
            room = fit.allowed - fit.ledger(by_request(layers, "zero-copy"), {}).total
        except LayoutError as error:
            room, why = -1, str(error)
        if room < 0:
            placement = "cpu"
            found.remarks.append(f"the CPU computes all experts: {why}")
    if placement == "fill" and cuda:
        layers = {
            layer: replace(known, expert_nbytes=experts.layout(layer).nbytes)
            for layer, known in layers.items()
        }
    dividing = placement == "fill" and cuda and fit.divides(layers)
    found.roads, remarks = choose(placement, layers, machine.device, room, machine.native, dividing)
    found.remarks += remarks
    found.homes = found.roads
    if machine.follow_use:
        found.copies, found.homes = as_copies(found.roads, layers)
    if cuda:
        on_cpu = [layer for layer, roads in found.homes.items() if "cpu" in roads]
        found.visiting = bool(on_cpu) and all(map(experts.native, on_cpu))
        found.visiting = found.visiting and kernels_fail(machine.device) is None
        found.ledger = fit.ledger(found.homes, found.copies)
        check_device(found.ledger, machine.device, machine.limit, where)
    left = check_host(found.homes, layers, machine.host, where)
    found.pinning = found.visiting and left >= UNPINNED
    return found


@dataclass(frozen=True)
class _Fit:
    """Ledgers of one load's tables."""

    found: Places
    experts: RoutedExperts
    config: Any
    geometry: Geometry
    need: int
    machine: Machine

    @property
    def allowed(self) -> int:
        """Bytes of the GPU."""
        return allowed_on(self.machine.device, self.machine.limit)

    def divides(self, layers: Iterable[int]) -> bool:
        """Whether decode steps may give calls of all these layers' zero-copy experts to the CPU."""
        native = all(map(self.experts.native, layers)) and kernels_fail(self.machine.device) is None
        return native and STEPS.get(self.config.model_type) is not None

    def ledger(self, homes: Table, copies: Mapping[int, list[int]]) -> Ledger:
        """What the GPU will hold, with as large a ring as there is room for; where there is none
        for the smallest, the CPU's experts stay."""
        found, allowed = self.found, self.allowed
        for found.buffers in range(PARTS, LEAST_PARTS - 1, -1):
            told = self._ledger(homes, copies)
            if told.total <= allowed:
                return told
        if found.visiting:
            found.visiting, found.why_not = False, ": no GPU memory for the ring"
            return self.ledger(homes, copies)
        return told

    def _ledger(self, homes: Table, copies: Mapping[int, list[int]]) -> Ledger:
        visiting = self.found.visiting
        used = [
            layer
            for layer, roads in homes.items()
            if visiting or any(road != "cpu" for road in roads)
        ]
        layouts = {layer: self.experts.layout(layer) for layer in used}
        experts = Experts(
            homes,
            {layer: layout.nbytes for layer, layout in layouts.items()},
            copies,
            alike=len(set(layouts.values())) < 2,
            streamed=BOTH if visiting else NEAR,
            buffers=self.found.buffers,
        )
        return ledger(
            self.config,
            self.geometry,
            self.need,
            experts,
            dtype=self.machine.dtype,
            threads=resident_threads(self.machine.device),
        )
