"""A layer's tiles: read and decoded ahead, solved by one worker or several, given back in order.

A worker is a GPU, or a thread of the CPU.  Tile i belongs to worker i modulo their number.  Each
tile's result is a function of its job and the layer's inputs alone, and results are used in the
order of the tiles: how many tiles are in flight, and how many workers there are, changes no byte.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.checkpoint.pieces import PackedTile, pack_tile
from pipeline.quantize.tensor import QuantizedTensor
from pipeline.stages.experts import (
    DenseTile,
    LayerStatistics,
    TileJob,
    TileOutput,
    decode_tile,
    solve_tile,
    tile_output,
)
from pipeline.stages.home import Home
from pipeline.stages.placement import Placement
from pipeline.stages.routing import Routed
from pipeline.threads import use_inside

SWITCH_INTERVAL = 3e-4
"""Seconds after which a thread that launches one GPU's kernels lets another's go on, where that one
waits.  With Python's own 5 ms GPUs wait for work: two H200 took 1.35 s for a layer's tiles, so 1.26
(2026-11-26, docs/performance.md)."""

Pack = Callable[[QuantizedTensor], dict[str, Tensor]]

PutOutput = Callable[[int, TileOutput], None]
"""Takes a tile's outputs for a stream: 0 the calibration's, from 1 on the source's."""


@dataclass(frozen=True)
class LayerInputs:
    """What the tiles of a layer work on."""

    calibration: Routed
    source: tuple[Routed, ...]
    """Streams that go through the source's own experts."""
    statistics: LayerStatistics

    def to(self, device: torch.device, home: Home) -> LayerInputs:
        """The same for another device; `home`: where the streams live."""
        source = tuple(routed.to(device, home) for routed in self.source)
        statistics = self.statistics.to(device, home)
        return LayerInputs(self.calibration.to(device, home), source, statistics)


@dataclass(frozen=True)
class TileResult:
    """A tile, done."""

    job: TileJob
    packed: PackedTile
    gate_up_loss: list[float]
    down_loss: list[float]
    effective_rank: list[float]
    raised_damping: int
    smallest_scales: int


@dataclass(frozen=True)
class _Waiting:
    """A tile in flight, and what its experts have put out so far."""

    future: Future[TileResult]
    outputs: list[tuple[int, TileOutput]]

    def added_to(self, totals: Sequence[Tensor]) -> TileResult:
        """Its result, once it is done and its outputs are added."""
        result = self.future.result()
        for number, output in self.outputs:
            output.add_to(totals[number])
        return result


class TileReader:
    """Reads and decodes the tiles of one worker ahead of their use, in a thread of its own."""

    def __init__(
        self, jobs: Iterator[TileJob], device: torch.device, ahead: int, threads: int | None
    ) -> None:
        """`jobs`: all tiles that will be taken, in order; `ahead`: how many to have ready;
        `threads`: torch's own in the reader's."""
        self._jobs = jobs
        self._ahead = ahead
        self._pool = _pool(f"reader-{device}", threads)
        self._ready: deque[tuple[TileJob, Future[DenseTile]]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._events: dict[int, torch.cuda.Event] = {}

    def take(self, job: TileJob) -> DenseTile:
        """The next tile, which must be `job`'s."""
        self._fill()
        found, future = self._ready.popleft()
        assert (found.layer, found.experts) == (job.layer, job.experts), "tiles come in order"
        self._fill()
        tile = future.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(job.device)
            current.wait_event(self._events.pop(id(tile)))
            tile.gate_up.record_stream(current)
            tile.down.record_stream(current)
        return tile

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)
        self._ready.clear()

    def _fill(self) -> None:
        while len(self._ready) < self._ahead:
            job = next(self._jobs, None)
            if job is None:
                return
            self._ready.append((job, self._pool.submit(self._load, job)))

    def _load(self, job: TileJob) -> DenseTile:
        if self._stream is None:
            return decode_tile(job)
        # A stream of its own: what decoding waits for is its own bytes, not the solver's work.
        with torch.cuda.stream(self._stream):
            tile = decode_tile(job)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._events[id(tile)] = event
        return tile


class TileCrew:
    """The workers that solve a layer's tiles."""

    def __init__(
        self, devices: Sequence[torch.device], placement: Placement, home: Home, pack: Pack
    ) -> None:
        """`devices[0]` is where everything else is computed; `home`: where the streams live."""
        self._devices = tuple(devices) * placement.crew
        self._home = home
        self._ahead = placement.ahead
        self._pack = pack
        self._threads = placement.threads
        count = len(self._devices)
        alone = count == 1 and self._threads in (None, torch.get_num_threads())
        self._pools = [] if alone else [_pool(f"solver-{i}", self._threads) for i in range(count)]
        # Results that wait are memory; on a CPU one more than workers keeps all of them busy.
        self._in_flight = 2 * count
        if devices[0].type == "cpu":
            self._in_flight = count + 1
        elif home.beside:  # where there is least of it
            self._in_flight = count
        self._readers: list[TileReader] = []
        self._interval = sys.getswitchinterval()
        if devices[0].type == "cuda" and count > 1:
            sys.setswitchinterval(SWITCH_INTERVAL)

    def read(self, jobs: Callable[[], Iterator[TileJob]]) -> None:
        """Begin to read: `jobs()` gives all tiles to come, each worker takes its own."""
        count = len(self._devices)
        for number, device in enumerate(self._devices):
            own = _own_tiles(jobs(), number, count)
            self._readers.append(TileReader(own, device, self._ahead, self._threads))

    def device_of(self, number: int) -> torch.device:
        """Where tile `number` of a layer is solved."""
        return self._devices[number % len(self._devices)]

    def solve(
        self, jobs: Sequence[TileJob], inputs: LayerInputs, totals: Sequence[Tensor]
    ) -> Iterator[TileResult]:
        """The results of a layer's tiles, in their order.

        In that order, too, their experts' outputs are added to `totals`, float32 [tokens, hidden]
        at home: for the calibration's stream, then for each of the source's.
        """
        if not self._pools:
            for job in jobs:
                yield self._work(
                    self._readers[0], job, inputs, lambda i, output: output.add_to(totals[i])
                )
            return
        copies = [inputs.to(device, self._home) for device in self._devices]
        waiting: deque[_Waiting] = deque()
        for number, job in enumerate(jobs):
            at = number % len(self._devices)
            outputs: list[tuple[int, TileOutput]] = []
            put = partial(self._keep, outputs)
            future = self._pools[at].submit(self._work, self._readers[at], job, copies[at], put)
            waiting.append(_Waiting(future, outputs))
            if len(waiting) == self._in_flight:
                yield waiting.popleft().added_to(totals)
        while waiting:
            yield waiting.popleft().added_to(totals)

    def close(self) -> None:
        """Stop reading and solving."""
        sys.setswitchinterval(self._interval)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.close()
        self._readers.clear()

    def _keep(self, outputs: list[tuple[int, TileOutput]], number: int, output: TileOutput) -> None:
        """Outputs that wait for other workers' tiles: in host memory, if the streams are there."""
        outputs.append((number, output.to(torch.device("cpu")) if self._home.beside else output))

    def _work(
        self, reader: TileReader, job: TileJob, inputs: LayerInputs, put: PutOutput
    ) -> TileResult:
        """One tile, all of it, on its device."""
        with torch.inference_mode(), _on(job.device):
            dense = reader.take(job)
            for number, routed in enumerate(inputs.source, 1):
                put(number, tile_output(job, dense, routed))
            solved = solve_tile(job, dense, inputs.calibration, inputs.statistics)
            put(0, tile_output(job, solved.dense, inputs.calibration, solved.inner))
            a = job.architecture
            by_projection = {a.gate: solved.gate, a.up: solved.up, a.down: solved.down}
            packed = pack_tile({name: self._pack(q) for name, q in by_projection.items()})
        return TileResult(
            job=job,
            packed=packed,
            gate_up_loss=solved.gate_up_loss,
            down_loss=solved.down_loss,
            effective_rank=solved.effective_rank,
            raised_damping=solved.raised_damping,
            smallest_scales=solved.smallest_scales,
        )


def _pool(name: str, threads: int | None) -> ThreadPoolExecutor:
    """A thread for work in order; `threads`: torch's own inside it, None: as many as elsewhere."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    if threads is not None:
        everywhere = torch.get_num_threads()
        pool.submit(use_inside, threads).result()
        # What a thread sets holds for itself, and for all threads that begin after it.
        torch.set_num_threads(everywhere)
    return pool


def _own_tiles(jobs: Iterator[TileJob], number: int, count: int) -> Iterator[TileJob]:
    """Of all tiles, layer after layer, those of worker `number` of `count`."""
    layer, index = -1, 0
    for job in jobs:
        index = index + 1 if job.layer == layer else 0
        layer = job.layer
        if index % count == number:
            yield job


def _on(device: torch.device) -> torch.cuda.device:
    """The device as the current one; does nothing for a CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
