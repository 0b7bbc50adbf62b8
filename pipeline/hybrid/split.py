"""One layer's experts on several roads: GPU memory, pinned host memory, and the CPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.hybrid.grouped import Groups, grouped
from pipeline.hybrid.handover import Handover
from pipeline.hybrid.matvec import down, gate_up
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native.crew import Crew
from pipeline.hybrid.native.experts import NativeExperts
from pipeline.hybrid.native.library import takes
from pipeline.hybrid.placing import ROADS, Division, Road
from pipeline.hybrid.records import Records
from pipeline.hybrid.stream import BOTH, NEAR, Stream

Pieces = Generator[Callable[[], None], None, Tensor]
"""Device work cut where the CPU has to do something, which is what is yielded."""

_FEW_TOKENS = 8
"""Up to here each pair reads its expert by itself; above, pairs that share one are put together."""


@dataclass(frozen=True)
class DeviceRoad:
    """Experts that the device's kernels compute, in the order of their records."""

    experts: Sequence[int]
    records: Records


class SplitExperts(nn.Module):
    """See `HybridExperts`, whose place this takes where a layer's experts are spread.

    The CPU's part is computed while the device's kernels run; without one, nothing is waited for.
    """

    def __init__(
        self,
        roads: Mapping[Road, DeviceRoad],
        cpu: tuple[Sequence[int], HybridExperts | NativeExperts] | None,
        experts: int,
        activation: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """cpu: the experts it computes, and the module that does, which has records where no other
        road has any; device: of activations.

        ValueError for an activation other than silu, the one that the kernels know.
        """
        super().__init__()
        if activation is not nn.functional.silu:
            raise ValueError("the kernels know no activation of experts but silu")
        self.num_experts = experts
        self.device_roads = dict(roads)
        table = torch.zeros(experts, dtype=torch.int64)
        self._roads = torch.full((experts,), ROADS.index("cpu"))
        for road, held in self.device_roads.items():
            members = list(held.experts)
            table[members] = held.records.addresses()
            self._roads[members] = ROADS.index(road)
        self._roads = self._roads.to(device)
        self._homes = table.to(device)
        self.table = self._homes.clone()
        """int64 [experts], on the device: the address of each expert's record, 0: the CPU's."""
        self.uses: Tensor | None = None
        """float32 [experts], on the device: where decoding counts calls, if anybody asks."""
        self._still = torch.zeros_like(table)
        if "resident" in self.device_roads:
            members = list(self.device_roads["resident"].experts)
            self._still[members] = table[members]
        self._still = self._still.to(device)
        self._stream: tuple[Stream, int] | None = None
        self.all_from: int | None = None
        """Tokens from which the CPU's experts come to the device; None: never."""
        self.handover: Handover | None = None
        """By which decode steps reach the CPU without Python, if they can."""
        self.host: HostRoad | None = None
        self._in_ram = {road: its for road, its in self.device_roads.items() if road in BOTH}
        if cpu is not None:
            self.host = HostRoad(cpu[1], _places(cpu[0], experts))
            if isinstance(cpu[1], NativeExperts):
                self._in_ram["cpu"] = DeviceRoad(cpu[0], cpu[1].records)
        self.layout = next(iter({**self.device_roads, **self._in_ram}.values())).records.layout

    def bytes_by_road(self) -> dict[str, int]:
        """Road -> bytes of its experts."""
        sizes = {str(road): held.records.nbytes for road, held in self.device_roads.items()}
        return sizes if self.host is None else {**sizes, "cpu": self.host.experts.nbytes}

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(self.bytes_by_road().values())

    def roads(self, device: torch.device) -> Tensor:
        """See `HybridExperts.roads`; an expert with a copy on the device is resident."""
        roads = torch.where(self.table == self._homes, self._roads, ROADS.index("resident"))
        return roads.to(device)

    def roads_of(self, index: Tensor) -> Tensor:
        """int64 [T, k]: which road takes each of a decode step's calls."""
        roads = self.roads(index.device)[index]
        if self.handover is None:
            return roads
        return torch.where(self.handover.on_cpu(index, self.table), ROADS.index("cpu"), roads)

    def hand_over(self, crew: Crew, division: Division) -> None:
        """Let the crew compute the CPU's part of decode steps, and a part of what the device reads
        in pinned memory, where its kernel can."""
        if not (takes(self.layout.gate_up) and takes(self.layout.down)):
            return
        if self.host is not None and "cpu" not in self._in_ram:
            return  # torch's products compute those
        records, pinned = torch.zeros((2, self.num_experts), dtype=torch.int64)
        for road, held in self._in_ram.items():
            records[list(held.experts)] = held.records.addresses()
            crew.hold(held.records.data)
            if road == "zero-copy":
                pinned[list(held.experts)] = held.records.addresses()
        self.handover = Handover(crew, self.layout, records, pinned.to(self.table.device), division)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `HybridExperts.forward`."""
        host: tuple[Tensor, Tensor, Tensor] | None = None
        x = hidden_states.contiguous()
        every = self.all_from is not None and x.shape[0] >= self.all_from
        if self.host is not None and not every:
            # before the kernels are queued, or the copy would wait for them
            host = hidden_states.to("cpu"), top_k_index.to("cpu"), top_k_weights.to("cpu")
        if not self.device_roads and not every:
            output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        elif x.shape[0] <= _FEW_TOKENS:
            output = self.few(x, top_k_index, top_k_weights)
        else:
            output = self._many(x, top_k_index, top_k_weights, every)
        if self.host is not None and host is not None:
            output = output + self.host(*host).to(output.device, torch.float32)
        return output.to(hidden_states.dtype)

    def few(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The device's part for a few tokens [T, hidden], float32; nothing is waited for."""
        self._count(index)
        return self._products(x, index, weights, self.table)

    def _count(self, index: Tensor) -> None:
        if self.uses is not None:
            flat = index.flatten()
            self.uses.scatter_add_(0, flat, self.uses.new_ones(flat.shape))

    def _products(self, x: Tensor, index: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        part = self.layout.gate_up
        inner = torch.empty((index.numel(), part.rows // 2), dtype=x.dtype, device=x.device)
        output = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        gate_up(x, index, table, part, inner)
        down(inner, index, table, weights, self.layout.down, output)
        return output

    def pieces(self, x: Tensor, index: Tensor, weights: Tensor) -> Pieces:
        """What `forward` computes for a few tokens, float32, as pieces of device work."""
        if self.handover is not None and self.handover.takes(x):
            return self._handed_over(self.handover, x, index, weights)
        if self.host is None:
            return self.few(x, index, weights)
        if not self.device_roads:
            return (yield from self.host.pieces(x, index, weights))
        desk = self.host.desk(x, index, weights)
        desk.bring(x, index, weights)
        yield desk.note
        output = self.few(x, index, weights)
        yield desk.compute
        return output + desk.take()

    def _handed_over(self, handover: Handover, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        calls, table = handover.send(x, index, weights, self.table)
        self._count(index)
        if self.device_roads:
            output = self._products(x, calls, weights, table)
        else:
            output = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        handover.take(index, output, add=bool(self.device_roads))
        return output

    @property
    def in_ram(self) -> dict[Road, Records]:
        """What a prompt may bring from there."""
        return {road: its.records for road, its in self._in_ram.items()}

    def stream_from(self, stream: Stream, number: int, all_from: int | None = None) -> None:
        """Where long prompts' zero-copy experts come from, and this layer's number there.

        all_from: tokens, more than a few, from which the CPU's experts come as well and nothing is
        left to the CPU; None: never.
        """
        members = [
            expert for road in BOTH if road in self._in_ram for expert in self._in_ram[road].experts
        ]
        self._slots = _places(members, self.num_experts).to(self.table.device)
        self._stream = stream, number
        self.all_from = None if all_from is None else max(all_from, _FEW_TOKENS + 1)

    def _many(self, x: Tensor, index: Tensor, weights: Tensor, every: bool) -> Tensor:
        chosen = index.flatten()
        groups = Groups(chosen, self.num_experts)
        # zeros: pairs of the CPU's experts are in it too
        inner = x.new_zeros((chosen.numel(), self.layout.gate_up.rows // 2))
        result = x.new_zeros((chosen.numel(), x.shape[1]))
        for table in self._tables(chosen.numel(), every):
            grouped(x, groups, table, self.layout.gate_up, inner, gated=True)
            grouped(inner, groups, table, self.layout.down, result, gated=False)
        scaled = torch.bmm(weights.to(x.dtype).unsqueeze(1), result.view(*index.shape, -1))
        return scaled.squeeze(1)

    def _tables(self, pairs: int, every: bool) -> Iterator[Tensor]:
        """Tables that together name every expert of the device's once, in place when yielded;
        every: the CPU's too."""
        few = 2 * pairs < self.num_experts  # most would come in vain
        if self._stream is None or (not every and (few or "zero-copy" not in self._in_ram)):
            yield self.table
            return
        stream, number = self._stream
        still: Tensor | int = self._still
        for part in stream.parts(number, BOTH if every else NEAR):
            place = self._slots - part.first
            here = (place >= 0) & (place < part.count)
            yield torch.where(here, place * self.layout.nbytes + part.address, still)
            still = 0

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"experts={self.num_experts}, bytes={self.bytes_by_road()}"


class HostRoad(nn.Module):
    """The experts of a layer that the CPU computes."""

    def __init__(
        self,
        experts: HybridExperts | NativeExperts,
        places: Tensor,
        handover: Handover | None = None,
    ) -> None:
        """places: int64 [experts of the layer], each one's number in `experts` or its count.

        handover: by which decode steps reach all experts of the layer without Python, if they can.
        """
        super().__init__()
        self.experts = experts
        self._places = places
        self._handover = handover
        self._desks: dict[torch.Size, Desk] = {}

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The CPU's part of the sum, all tensors on the CPU."""
        result: Tensor = self.experts(x, self._places[index], weights)
        return result

    def pieces(self, x: Tensor, index: Tensor, weights: Tensor) -> Pieces:
        """See `SplitExperts.pieces`, where no expert is the device's."""
        if self._handover is not None and self._handover.takes(x):
            self._handover.send(x, index, weights, self._handover.pinned)
            output = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            self._handover.take(index, output, add=False)
            return output
        desk = self.desk(x, index, weights)
        desk.bring(x, index, weights)
        yield desk.note_and_compute
        return desk.take().float()

    def desk(self, x: Tensor, index: Tensor, weights: Tensor) -> Desk:
        """The buffers for so many tokens; always the same, as captured graphs know them."""
        if x.shape not in self._desks:
            self._desks[x.shape] = Desk(self, x, index, weights)
        return self._desks[x.shape]


class Desk:
    """Buffers on the way of a few tokens from the device to the CPU's experts and back."""

    def __init__(self, road: HostRoad, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """x [T, hidden], index and weights [T, k]: tensors such as will be brought."""
        cuda = x.device.type == "cuda"
        self._road = road
        self._there = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=cuda) for t in (x, index, weights)
        ]
        self._result = torch.empty(x.shape, dtype=x.dtype, pin_memory=cuda)
        self._back = torch.empty_like(x)
        self._arrived = torch.cuda.Event() if cuda else None

    def bring(self, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """Queue the copies to the CPU."""
        for buffer, tensor in zip(self._there, (x, index, weights), strict=True):
            buffer.copy_(tensor, non_blocking=True)

    def note(self) -> None:
        """To be called when the copies are queued, and nothing behind them yet."""
        if self._arrived is not None:
            self._arrived.record()

    def note_and_compute(self) -> None:
        """Both, where nothing is queued in between."""
        self.note()
        self.compute()

    def compute(self) -> None:
        """Wait for the tokens and compute; kernels that were queued since run meanwhile."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self._result.copy_(self._road(*self._there))

    def take(self) -> Tensor:
        """Queue the way back; [T, hidden] on the device."""
        return self._back.copy_(self._result, non_blocking=True)


def _places(members: Sequence[int], experts: int) -> Tensor:
    places = torch.full((experts,), len(members), dtype=torch.int64)
    places[list(members)] = torch.arange(len(members))
    return places
