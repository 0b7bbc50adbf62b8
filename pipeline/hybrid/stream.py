"""Prefill's way for experts in host memory: all of a layer travel to the device once, ahead of use.

The layers' records come part by part through a ring of device buffers.  Copies run on a stream of
their own, as far ahead as there are buffers, into the next layers too; so the link is busy while
the device computes attention and multiplies what has come.  Nothing waits on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.hybrid.records import Records

PART_BYTES = 100 << 20
"""About so much travels at once: long enough for the link's full rate."""
PARTS = 8
"""Buffers in the ring: a layer of Qwen3-Next-80B at 4 bits."""


@dataclass(frozen=True)
class Part:
    """Experts of a layer that have come: records first, first + 1 ... lie from an address on."""

    first: int
    count: int
    address: int


def ring(counts: Sequence[int], size: int) -> tuple[int, int]:
    """Buffers, and records of `size` bytes in each, for layers of so many records."""
    each = min(max(1, PART_BYTES // size), max(counts))
    return min(PARTS, sum(-(-count // each) for count in counts)), each


class Stream:
    """The ring, and the order in which layers come."""

    def __init__(self, layers: Sequence[Records], device: torch.device) -> None:
        """layers: of equal layout, in the order in which the model calls them."""
        self._layers = list(layers)
        self._device = device
        size = self._layers[0].layout.nbytes
        counts = [records.count for records in self._layers]
        self._parts, self._each = ring(counts, size)
        self._items = [
            (layer, first)
            for layer, records in enumerate(self._layers)
            for first in range(0, records.count, self._each)
        ]
        self._starts = {layer: i for i, (layer, first) in enumerate(self._items) if first == 0}
        self._size = size
        self._buffers: Tensor | None = None
        self._issued = 0
        self._due = 0
        cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if cuda else None
        self._ready = [torch.cuda.Event() if cuda else None for _ in range(self._parts)]
        self._free = [torch.cuda.Event() if cuda else None for _ in range(self._parts)]

    @property
    def nbytes(self) -> int:
        """Bytes of the ring, once it is used."""
        return self._parts * self._each * self._size

    def parts(self, layer: int) -> Iterator[Part]:
        """The layer's experts, part by part; each is there until the next is asked for.

        Kernels that are queued on the current stream between find it in place.
        """
        if self._buffers is None:
            shape = (self._parts, self._each, self._size)
            with torch.inference_mode(False):  # to be written under any mode
                self._buffers = torch.empty(shape, dtype=torch.uint8, device=self._device)
        begin = self._starts[layer]
        if begin != self._due:  # not behind the layer before: a new prompt, or a layer left out
            self._restart(begin)
        for item in range(begin, len(self._items)):
            number, first = self._items[item]
            if number != layer:
                break
            while self._issued < min(item + self._parts, len(self._items)):
                self._issue(self._issued)
            slot = item % self._parts
            if ready := self._ready[slot]:
                torch.cuda.current_stream(self._device).wait_event(ready)
            count = min(self._each, self._layers[layer].count - first)
            yield Part(first, count, self._buffers[slot].data_ptr())
            if free := self._free[slot]:
                free.record(torch.cuda.current_stream(self._device))
            self._due = item + 1
        if self._due == len(self._items):
            self._due = self._issued = 0

    def _restart(self, begin: int) -> None:
        """Whatever is under way came in vain; buffers are free when what is queued is done."""
        self._due = self._issued = begin
        for free in self._free:
            if free:
                free.record(torch.cuda.current_stream(self._device))

    def _issue(self, item: int) -> None:
        assert self._buffers is not None, "allocated by its only caller"
        slot = item % self._parts
        layer, first = self._items[item]
        source = self._layers[layer].data[first : first + self._each]
        target = self._buffers[slot, : len(source)]
        ready, free = self._ready[slot], self._free[slot]
        if ready and free and self._side:
            with torch.cuda.stream(self._side):
                self._side.wait_event(free)
                target.copy_(source, non_blocking=True)
                ready.record(self._side)
        else:
            target.copy_(source)
        self._issued = item + 1
