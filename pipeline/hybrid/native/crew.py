"""Threads that compute the CPU's experts of a decode step, called by the device itself."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ResourceError
from pipeline.hybrid.host import host_memory
from pipeline.hybrid.native.experts import NO_EXPERT, sizes_of
from pipeline.hybrid.native.library import Library
from pipeline.hybrid.records import Layout

_REQUEST, _ANSWER, _LATE = 0, 64, 128
"""Bytes from the beginning of a crew's words to each of them."""
_PATIENCE = 1 << 22
"""Looks at an answer before the device gives up, each of about a microsecond."""
_ALWAYS = 1 << 62
"""Calls that are more than any step makes."""


class Crew:
    """See crew.c.  One for each model; its words are written by one step at a time."""

    def __init__(self, library: Library, device: torch.device, threads: int) -> None:
        """device: that will call; ResourceError where there is no thread to be had."""
        self.library = library
        self.device = device
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        """int64 [1], on the device: calls that it has made."""
        self.patience = torch.full_like(self.counter, _PATIENCE)
        """int64 [1], on the device: looks at each answer; 1 since it gave up, until `check`."""
        self._words = room_for_calls(192, device)
        self._words.zero_()
        self._late = self._words[_LATE : _LATE + 8].view(torch.int64)
        handle = library.crew.new(self.request, self.answer, threads)
        if not handle:
            raise ResourceError("no threads can be started for the CPU's experts")
        self._handle = handle
        self._held: list[Tensor] = [self._words]
        weakref.finalize(self, _close, library, handle, self._held, device, os.getpid())

    @property
    def request(self) -> int:
        """Address of the word that the device writes: desk << 32 | number of the call."""
        return self._words.data_ptr() + _REQUEST

    @property
    def answer(self) -> int:
        """Address of the word that the crew writes: the number of the call, in 32 bits."""
        return self._words.data_ptr() + _ANSWER

    @property
    def late(self) -> int:
        """Address of the word that the device writes when it has waited too long."""
        return self._words.data_ptr() + _LATE

    def desk(
        self,
        layout: Layout,
        records: Tensor,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> int:
        """The number of a new desk, for one layer and number of tokens, all tensors on the CPU.

        records int64 [experts]: their addresses; x bfloat16 [T, hidden]; index int64 [T, k], the
        number of experts standing for one that is computed elsewhere; weights float32 [T, k]; out
        float32 [T, hidden].  They are kept for as long as the crew is.
        """
        sizes = sizes_of(layout)
        number = self.library.crew.desk(
            self._handle, sizes.data_ptr(), records.data_ptr(), len(records), x.data_ptr(),
            index.data_ptr(), weights.data_ptr(), *index.shape, out.data_ptr(), self.library.kind,
        )  # fmt: skip
        if number < 0:
            raise ResourceError("no memory for the desks of the CPU's experts")
        self._held += [records, x, index, weights, out]
        return number

    def hold(self, experts: Tensor) -> None:
        """Keep memory that its threads read: it goes after them, whatever a step still computes."""
        self._held.append(experts)

    def begin(self, calls: int) -> None:
        """A step that calls so often is about to be queued: wake the threads."""
        self.library.crew.begin(self._handle, calls)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While steps run whose calls are not known; nothing is queued at its end."""
        self.begin(_ALWAYS)
        try:
            yield
        finally:  # also calls that an exception left queued are answered
            self._rest()

    def _rest(self) -> None:
        """Wait for what is queued; then none is due."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.begin(-1)

    @property
    def served(self) -> int:
        """Calls so far."""
        return self.library.crew.served(self._handle)

    def check(self) -> None:
        """Whether all calls went well since this was asked last; waits for nothing if so.

        IndexError for an expert that there is not, ResourceError for an answer that came too late,
        when what is queued by then is waited for.
        """
        failed = self.library.crew.failed(self._handle)
        if failed == NO_EXPERT:
            raise IndexError("the router chose an expert that there is not")
        if failed:
            raise RuntimeError(f"the device called experts that the CPU does not know ({failed})")
        if int(self._late):
            self._rest()
            self._late.zero_()
            self.patience.fill_(_PATIENCE)
            raise ResourceError(
                "the CPU did not compute its experts in time: too much else runs on it, or this "
                "process was stopped for a while; free it, or use placement zero-copy"
            )


def room_for_calls(nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes] of host memory that device and threads write; ResourceError where it cannot be
    pinned."""
    try:
        return host_memory(nbytes, pin=device.type == "cuda")
    except RuntimeError as error:
        raise ResourceError("no memory can be pinned for calls of the CPU's threads") from error


def crew_of(model: nn.Module) -> Crew | None:
    """The crew that a model's decode steps call, if they call one."""
    handovers: list[Any] = [getattr(module, "handover", None) for module in model.modules()]
    return next((its.crew for its in handovers if its is not None), None)


def _close(
    library: Library, handle: int, held: list[Tensor], device: torch.device, process: int
) -> None:
    if os.getpid() == process:  # a forked child has no threads to end
        if device.type == "cuda":
            with suppress(RuntimeError):  # a device that fails has said so where it did
                torch.cuda.synchronize(device)
        library.crew.close(handle)
    held.clear()
