"""Prefill's way for experts in host memory: all of a layer travel to the device once, ahead of use.

The layers' records come part by part through a ring of device buffers.  Copies run on a stream of
their own, as far ahead as there are buffers, into the next layers too; so the link is busy while
the device computes attention and multiplies what has come.  Nothing waits on the host, but for
records that are not pinned: a thread copies those to pinned buffers on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.hybrid.host import host_memory
from pipeline.hybrid.placing import Road
from pipeline.hybrid.records import Records

PART_BYTES = 100 << 20
"""About so much travels at once: long enough for the link's full rate."""
PARTS = 8
"""Buffers in the ring: a layer of Qwen3-Next-80B at 4 bits."""
LEAST_PARTS = 2
"""One that is read while the other is filled."""

NEAR: tuple[Road, ...] = ("zero-copy",)
BOTH: tuple[Road, ...] = ("zero-copy", "cpu")
"""What may come of each layer, in this order: what the device computes anyway, or all."""


@dataclass(frozen=True)
class Part:
    """Experts of a layer that have come: records first, first + 1 ... lie from an address on."""

    first: int
    count: int
    address: int


def ring(counts: Sequence[int], size: int, most: int = PARTS) -> tuple[int, int]:
    """Buffers, `most` or fewer, and records of `size` bytes in each, for so many records in a row
    each time."""
    each = min(max(1, PART_BYTES // size), max(counts))
    return min(most, sum(-(-count // each) for count in counts)), each


class Stream:
    """The ring, and the order in which layers come."""

    def __init__(
        self,
        layers: Sequence[Mapping[Road, Records]],
        device: torch.device,
        most: int = PARTS,
    ) -> None:
        """layers: each one's records by road (`BOTH`), all of equal layout, in the order in which
        the model calls the layers; most: buffers in the ring.

        RuntimeError where records are not pinned, and no buffers for them can be.
        """
        self._layers = list(layers)
        self.device = device
        blocks = [layer[road] for layer in layers for road in BOTH if road in layer]
        size = blocks[0].layout.nbytes
        self._parts, self._each = ring([block.count for block in blocks], size, most)
        self._orders = {roads: self._order(roads) for roads in (NEAR, BOTH)}
        self._items: list[_Item] = []
        self._size = size
        self._buffers: Tensor | None = None
        self._issued = 0
        self._due = 0
        cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if cuda else None
        self._ready = [torch.cuda.Event() if cuda else None for _ in range(self._parts)]
        self._free = [torch.cuda.Event() if cuda else None for _ in range(self._parts)]
        self._coming: dict[int, Future[None]] = {}
        pinned = all(item.pinned for item in self._orders[BOTH][0])
        self._stage = None if pinned else _Stage(self._each * size, self._side)

    @property
    def nbytes(self) -> int:
        """Bytes of the ring, once it is used."""
        return self._parts * self._each * self._size

    @property
    def staged(self) -> bool:
        """Whether some records are not pinned, and go through buffers that are."""
        return self._stage is not None

    def bytes_of(self, layer: int) -> int:
        """Bytes of all that may come of a layer."""
        return sum(records.nbytes for records in self._layers[layer].values())

    def parts(self, layer: int, roads: tuple[Road, ...]) -> Iterator[Part]:
        """The layer's experts on `roads` (NEAR or BOTH), part by part, numbered in that order; each
        is there until the next is asked for.

        Kernels that are queued on the current stream between find it in place.
        """
        if self._buffers is None:
            shape = (self._parts, self._each, self._size)
            with torch.inference_mode(False):  # to be written under any mode
                self._buffers = torch.empty(shape, dtype=torch.uint8, device=self.device)
        items, layers = self._orders[roads]
        # not behind the layer before: a new prompt, or a layer left out
        if self._items is not items or layers[layer].start != self._due:
            self._restart(items, layers[layer].start)
        for number in layers[layer]:
            item = items[number]
            while self._issued < min(number + self._parts, len(items)):
                self._issue(self._issued)
            slot = number % self._parts
            if sent := self._coming.pop(number, None):
                sent.result()
            if ready := self._ready[slot]:
                torch.cuda.current_stream(self.device).wait_event(ready)
            yield Part(item.first, len(item.data), self._buffers[slot].data_ptr())
            if free := self._free[slot]:
                free.record(torch.cuda.current_stream(self.device))
            self._due = number + 1
        if self._due == len(items):
            self._due = self._issued = 0

    def _order(self, roads: tuple[Road, ...]) -> tuple[list[_Item], list[range]]:
        """What comes one after the other, and of each layer which of it."""
        items: list[_Item] = []
        layers = []
        for layer in self._layers:
            begin, before = len(items), 0
            for road in (road for road in roads if road in layer):
                records = layer[road]
                pinned = records.data.is_pinned()
                for first in range(0, records.count, self._each):
                    data = records.data[first : first + self._each]
                    items.append(_Item(before + first, data, pinned))
                before += records.count
            layers.append(range(begin, len(items)))
        return items, layers

    def _restart(self, items: list[_Item], begin: int) -> None:
        """Whatever is under way came in vain; buffers are free when what is queued is done."""
        wait(self._coming.values())
        self._coming.clear()
        self._items = items
        self._due = self._issued = begin
        for free in self._free:
            if free:
                free.record(torch.cuda.current_stream(self.device))

    def _issue(self, number: int) -> None:
        """Queue the copy of an item, behind whatever its buffer is needed for."""
        item = self._items[number]
        if item.pinned or self._stage is None:
            self._send(number, item.data)
        else:
            self._coming[number] = self._stage.hand.submit(self._send_staged, number, item.data)
        self._issued = number + 1

    def _send_staged(self, number: int, source: Tensor) -> None:
        assert self._stage is not None, "there is one where records are not pinned"
        with self._stage.holding(source) as pinned:
            self._send(number, pinned)

    def _send(self, number: int, source: Tensor) -> None:
        assert self._buffers is not None, "allocated by its only caller"
        slot = number % self._parts
        target = self._buffers[slot, : len(source)]
        ready, free = self._ready[slot], self._free[slot]
        if ready and free and self._side:
            with torch.cuda.stream(self._side):
                self._side.wait_event(free)
                target.copy_(source, non_blocking=True)
                ready.record(self._side)
        else:
            target.copy_(source)


class _Stage:
    """Two pinned buffers, filled in turn by a thread while the link reads the other."""

    def __init__(self, nbytes: int, side: torch.cuda.Stream | None) -> None:
        """side: on which what they hold is sent.  RuntimeError where they cannot be pinned."""
        self._buffers = [host_memory(nbytes, pin=side is not None) for _ in range(2)]
        self._sent = [None if side is None else torch.cuda.Event() for _ in range(2)]
        self._side = side
        self._next = 0
        threads = torch.get_num_threads()  # each copy is shared among these
        self.hand = ThreadPoolExecutor(
            1, "stage", initializer=torch.set_num_threads, initargs=(threads,)
        )

    @contextmanager
    def holding(self, source: Tensor) -> Iterator[Tensor]:
        """A pinned copy, for the one thread; sent when the block is left."""
        turn, self._next = self._next, 1 - self._next
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        yield self._buffers[turn][: source.nbytes].view(source.shape).copy_(source)
        if sent is not None:
            sent.record(self._side)


@dataclass(frozen=True)
class _Item:
    """What travels at once."""

    first: int
    """Number of its first record among those of the layer."""
    data: Tensor
    """uint8 [count, bytes of a record]"""
    pinned: bool
