"""How a decode step's calls come to the CPU and back without Python: two small kernels a layer.

`send` decides for every call which road takes it, and hands the CPU's part to the crew
(`native/crew.py`) through pinned memory; the device's kernels then read the other experts; `take`
waits for the crew's answer and adds its sum.  Both lie in one stream in between what was there
before, so a step stays one captured graph, and both roads run at the same time.

An expert that lies in pinned memory is read by both roads where it is, so the calls of each token
are divided anew in every step: however the router chooses, both end together.  Calls of experts
that have a copy on the device are the device's, calls of those that are not pinned the CPU's.
"""

# See matvec.py of kernels.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.hybrid.native.crew import Crew, room_for_calls
from pipeline.hybrid.placing import Division
from pipeline.hybrid.records import Layout

_BLOCK = 2048
"""Numbers that are moved at a time."""
_ALIGN = 64


@triton.jit(do_not_specialize=["desk"])
def _send_kernel(
    x,
    index,
    weights,
    table,
    pinned,
    shares,
    counter,
    addresses,
    sent: tl.int64,
    request: tl.int64,
    desk,
    index_at,
    weights_at,
    tokens,
    each,
    hidden,
    experts,
    PTX: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: `x`, the CPU's choices and weights to `sent`, the device's to `addresses`."""
    number = tl.load(counter) + 1
    lane = tl.arange(0, EACH)
    used = lane < each
    room = sent.to(tl.int64)  # Triton's interpreter takes an address for 32 bits where those do
    to_index = (room + index_at).to(tl.pointer_type(tl.int64))
    to_weights = (room + weights_at).to(tl.pointer_type(tl.float32))
    for token in range(tokens):
        pair = token * each + lane
        expert = tl.load(index + pair, mask=used, other=0)
        address = tl.load(table + expert, mask=used, other=0)
        home = tl.load(pinned + expert, mask=used, other=0)
        must = used & (address == 0)
        may = used & (address != 0) & (address == home)
        bound = tl.sum(must.to(tl.int32), 0)
        free = may.to(tl.int32)
        some = tl.load(shares + bound + tl.sum(free, 0)) - bound
        cpu = must | (may & (tl.cumsum(free, 0) <= some))
        tl.store(addresses + pair, tl.where(cpu, 0, address), mask=used)
        tl.store(to_index + pair, tl.where(cpu, expert, experts), mask=used)
        weight = tl.load(weights + pair, mask=used, other=0.0).to(tl.float32)
        tl.store(to_weights + pair, weight, mask=used)
    to_x = tl.multiple_of(room.to(tl.pointer_type(x.dtype.element_ty)), 16)
    for first in range(0, tokens * hidden, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < tokens * hidden
        tl.store(to_x + place, tl.load(x + place, mask=inside), mask=inside)
    tl.debug_barrier()  # everything is written, and the request behind it
    tl.store(counter, number)
    word = (desk.to(tl.int64) << 32) | (number & 0xFFFFFFFF)
    if PTX:  # Triton's only releases are atomics, which not every bus brings to host memory
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.sys.global.b64 [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,l",
            [request, word],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_xchg(
            request.to(tl.int64).to(tl.pointer_type(tl.int64)), word, sem="release", scope="sys"
        )


@triton.jit
def _take_kernel(
    received: tl.int64,
    counter,
    answer: tl.int64,
    late: tl.int64,
    out,
    patience,
    hidden,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: its row of `received`, once the answer is there, into or onto `out`."""
    wanted = tl.load(counter) & 0xFFFFFFFF
    where = answer.to(tl.int64).to(tl.pointer_type(tl.int64))
    looks = tl.load(patience)
    while (tl.load(where, volatile=True) != wanted) & (looks > 0):
        looks -= 1
    tl.debug_barrier()
    if looks == 0:
        tl.store(late.to(tl.int64).to(tl.pointer_type(tl.int64)), 1)
        tl.store(patience, 1)  # the calls behind it do not wait as long again
    row = tl.program_id(0).to(tl.int64) * hidden
    source = tl.multiple_of(received.to(tl.int64).to(tl.pointer_type(tl.float32)), 16) + row
    for first in range(0, hidden, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < hidden
        # past the device's caches, which may remember the last step's
        value = tl.load(source + place, mask=inside, other=0.0, volatile=True)
        if ADD:
            value += tl.load(out + row + place, mask=inside, other=0.0)
        tl.store(out + row + place, value, mask=inside)


@dataclass(frozen=True)
class _Desk:
    """What one number of tokens of one layer is written to; nothing of it ever moves."""

    number: int
    room: Tensor
    """uint8, pinned: hidden states, choices, weights, and the crew's sums."""
    offsets: tuple[int, ...]
    """Of those four, in bytes; the first is 0."""
    shares: Tensor
    """int32 [k + 1], on the device: the CPU's part of that many calls of a token."""
    addresses: Tensor
    """int64 [T, k], on the device: of each call's record; 0: the CPU's."""
    each: Tensor
    """int64 [T, k]: 0, 1, 2 ..., by which kernels find them."""


class Handover:
    """The crew's side of one layer's experts, as a device's step calls it."""

    def __init__(
        self, crew: Crew, layout: Layout, records: Tensor, pinned: Tensor, division: Division
    ) -> None:
        """records: int64 [experts], on the CPU: where each expert that it can compute lies, else 0.

        pinned: int64 [experts], on the device: the same of those that the device can read there.
        """
        self.crew = crew
        self.pinned = pinned
        self._layout = layout
        self._records = records
        self._division = division
        self._desks: dict[tuple[int, int], _Desk] = {}
        self._shares: dict[tuple[int, int], Tensor] = {}

    def takes(self, x: Tensor) -> bool:
        """Whether hidden states are of the dtype that the crew computes."""
        return x.dtype == torch.bfloat16

    def send(
        self, x: Tensor, index: Tensor, weights: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queue the CPU's part of x [T, hidden], index and weights [T, k], all contiguous.

        table: int64 [experts], see `SplitExperts`.  Returns an index [T, k] and a table of the
        calls that are left to the device, for the kernels of matvec.py.
        """
        desk = self._desk(x, index)
        room, (tokens, each) = desk.room.data_ptr(), index.shape
        _send_kernel[(1,)](
            x, index, weights, table, self.pinned, desk.shares, self.crew.counter,
            desk.addresses, room, self.crew.request, desk.number, *desk.offsets[1:3],
            tokens, each, x.shape[1], len(self._records), PTX=x.is_cuda and not torch.version.hip,
            EACH=triton.next_power_of_2(each), BLOCK=_BLOCK,
        )  # fmt: skip
        return desk.each, desk.addresses.flatten()

    def take(self, index: Tensor, out: Tensor, *, add: bool) -> None:
        """Queue the crew's sums of the call that was sent last: onto `out` or in its place.

        out: float32 [T, hidden], contiguous.
        """
        desk = self._desks[index.shape[0], index.shape[1]]
        crew = self.crew
        _take_kernel[(out.shape[0],)](
            desk.room.data_ptr() + desk.offsets[3], crew.counter, crew.answer, crew.late, out,
            crew.patience, out.shape[1], ADD=add, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip

    def on_cpu(self, index: Tensor, table: Tensor) -> Tensor:
        """bool [T, k], on the device: which of a step's calls `send` gives to the CPU."""
        address = table[index]
        must = address == 0
        may = ~must & (address == self.pinned[index])
        bound = must.sum(1)
        shares = self._shares_of(*index.shape)
        some = shares[bound + may.sum(1)] - bound
        return must | (may & (may.cumsum(1) <= some[:, None]))

    def _shares_of(self, tokens: int, each: int) -> Tensor:
        """Made once: while a graph is captured, nothing can be copied to the device."""
        if (tokens, each) not in self._shares:
            numbers = [self._division(calls, tokens) for calls in range(each + 1)]
            made = torch.tensor(numbers, dtype=torch.int32, device=self.pinned.device)
            self._shares[tokens, each] = made
        return self._shares[tokens, each]

    def _desk(self, x: Tensor, index: Tensor) -> _Desk:
        """Always the same for so many tokens, as captured graphs know it."""
        tokens, each = index.shape
        if (tokens, each) not in self._desks:
            self._desks[tokens, each] = self._new(x, tokens, each)
        return self._desks[tokens, each]

    def _new(self, x: Tensor, tokens: int, each: int) -> _Desk:
        shapes = (x.shape, (tokens, each), (tokens, each), x.shape)
        dtypes = (torch.bfloat16, torch.int64, torch.float32, torch.float32)
        offsets, end = [], 0
        for shape, dtype in zip(shapes, dtypes, strict=True):
            offsets.append(end)
            end += -(-shape[0] * shape[1] * dtype.itemsize // _ALIGN) * _ALIGN
        room = room_for_calls(end, x.device).zero_()
        hidden, choices, weights, out = (
            room[at : at + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)
            for at, shape, dtype in zip(offsets, shapes, dtypes, strict=True)
        )
        number = self.crew.desk(self._layout, self._records, hidden, choices, weights, out)
        calls = torch.arange(tokens * each, device=x.device).view(tokens, each)
        shares = self._shares_of(tokens, each)
        return _Desk(number, room, tuple(offsets), shares, torch.zeros_like(calls), calls)
