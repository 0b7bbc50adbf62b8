"""Which experts the device keeps copies of, following their use while the model decodes.

Every step adds each expert's calls to a count on the device, and all counts fade, by a factor that
docs/performance.md chose by replaying recorded routing.  Now and then the counts come to the host,
where in each layer the most used experts without a copy displace the least used that have one.
Copies travel on a stream of their own and nothing ever waits for them: a table entry changes when
its copy has come.  Captured graphs read the tables, so they need not be captured again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.hybrid.split import SplitExperts

DECAY = 0.99
"""What is left of a count after a step."""
INTERVAL = 8
"""Steps from one look at the counts to the next."""
MOST_MOVES = 1
"""Experts that may come in one layer and interval: the link carries decoding's reads as well."""
_GAIN = 1.5
"""How much more used a newcomer must be than what it displaces, so that no two alternate."""


class Residency:
    """Copies of some of each layer's zero-copy experts in device memory."""

    def __init__(self, layers: Sequence[SplitExperts], copies: int, device: torch.device) -> None:
        """layers: of equal layout and number of experts, with zero-copy records for all that may
        have a copy; copies: how many per layer.  Tables of the layers become rows of one tensor.
        """
        self._layers = list(layers)
        self._device = device
        first = self._layers[0]
        experts = first.num_experts
        self.counts = torch.zeros((len(layers), experts), device=device)
        """float32 [layers, experts]: calls, faded."""
        self._tables = torch.stack([layer.table for layer in layers])
        self._homes = self._tables.cpu().clone()
        shape = (len(layers), copies, first.layout.nbytes)
        self._store = torch.empty(shape, dtype=torch.uint8, device=device)
        self._kept = torch.full((len(layers), copies), -1)
        self._places = []
        for number, layer in enumerate(layers):
            layer.table = self._tables[number]
            layer.uses = self.counts[number]
            members = layer.device_roads["zero-copy"].experts
            self._places.append({expert: place for place, expert in enumerate(members)})
        cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if cuda else None
        self._seen = torch.empty(self.counts.shape, pin_memory=cuda)
        self._looked: torch.cuda.Event | None = None
        self._looking = False
        self._moves: list[tuple[int, int, int]] = []
        self._moved: torch.cuda.Event | None = None
        self._steps = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self._store.nbytes

    def kept(self) -> list[list[int]]:
        """Per layer, the experts that have a copy or will soon."""
        return [[e for e in row if e >= 0] for row in self._kept.tolist()]

    def begin_with(self, experts: Sequence[Sequence[int]]) -> None:
        """Copy these experts of each layer before the first step."""
        moves = [
            (layer, slot, expert)
            for layer, some in enumerate(experts)
            for slot, expert in enumerate(some[: self._kept.shape[1]])
        ]
        self._start(moves)
        self._finish()

    def after_step(self) -> None:
        """To be called between steps; queues work, waits for nothing."""
        self._steps += 1
        if self._moves and (self._moved is None or self._moved.query()):
            self._finish()
        if self._looking and not self._moves and (self._looked is None or self._looked.query()):
            self._looking = False
            self._start(self._choose())
        elif self._steps % INTERVAL == 0 and not self._looking and not self._moves:
            self._looking = True
            self._seen.copy_(self.counts, non_blocking=True)
            self._looked = self._note()

    def _choose(self) -> list[tuple[int, int, int]]:
        """(layer, slot, expert) of what is to come."""
        moves = []
        counts = self._seen
        for layer, kept in enumerate(self._kept):
            mine = counts[layer].clone()
            held = torch.where(kept >= 0, mine[kept.clamp(min=0)], -1.0)
            mine[kept[kept >= 0]] = -1.0
            mine[self._homes[layer] == 0] = -1.0  # the CPU's
            newest = mine.topk(min(MOST_MOVES, len(kept)))
            oldest = held.topk(len(newest.values), largest=False)
            pairs = zip(newest.values, newest.indices, oldest.values, oldest.indices, strict=True)
            moves += [
                (layer, int(slot), int(expert))
                for more, expert, less, slot in pairs
                if more > max(_GAIN * float(less), 0.0)
            ]
        return moves

    def _start(self, moves: list[tuple[int, int, int]]) -> None:
        """Take displaced experts out of the tables, then queue the newcomers' copies."""
        if not moves:
            return
        leaving = [(layer, int(self._kept[layer, slot])) for layer, slot, _ in moves]
        self._write([(la, e, int(self._homes[la, e])) for la, e in leaving if e >= 0])
        for layer, slot, expert in moves:
            self._kept[layer, slot] = expert
        if self._side is None:
            self._copy(moves)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._copy(moves)
            self._moved = torch.cuda.Event()
            self._moved.record(self._side)
        self._moves = moves

    def _copy(self, moves: list[tuple[int, int, int]]) -> None:
        for layer, slot, expert in moves:
            records = self._layers[layer].device_roads["zero-copy"].records
            place = self._places[layer][expert]
            self._store[layer, slot].copy_(records.data[place], non_blocking=True)

    def _finish(self) -> None:
        """The copies have come: let the kernels read them."""
        if self._moved is not None:
            torch.cuda.current_stream(self._device).wait_event(self._moved)
        first, step = self._store.data_ptr(), self._store.shape[2]
        slots = self._store.shape[1]
        moves = self._moves
        self._write([(la, e, first + (la * slots + slot) * step) for la, slot, e in moves])
        self._moves = []

    def _write(self, entries: list[tuple[int, int, int]]) -> None:
        """(layer, expert, address) into the tables, in the order of the current stream."""
        if not entries:
            return
        columns = torch.tensor(entries, dtype=torch.int64).t().contiguous()
        if self._side is not None:
            columns = columns.pin_memory().to(self._device, non_blocking=True)
        layer, expert, address = columns
        self._tables.index_put_((layer, expert), address)

    def _note(self) -> torch.cuda.Event | None:
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event
