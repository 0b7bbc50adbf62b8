"""Reading routed experts: each layer's go to their roads, several layers at a time.

What a layer costs is reading, unpacking and laying out anew, all of it memory traffic that one
thread cannot bring up; so some threads read a layer each.  At no time are second copies of more
experts in memory than these threads hold.  Beside a GPU, memory for experts is pinned, which takes
longer than all else; so other threads make it ahead, from the moment that places are known.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
from torch import nn

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.files import Memory, fresh
from pipeline.errors import CheckpointError, ResourceError, UserError
from pipeline.hybrid.backends import BACKENDS
from pipeline.hybrid.host import pin_fresh
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.native.library import find
from pipeline.hybrid.placing import ROADS, Road, Table
from pipeline.hybrid.records import Layout, Records, empty, layout_of, pack
from pipeline.hybrid.stored import pair_rows, to_matrices
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

if TYPE_CHECKING:
    from pipeline.hybrid.split import SplitExperts

K = TypeVar("K")
T = TypeVar("T")

_AT_ONCE = 16
"""Experts that are laid out anew at a time on a device."""
_LAYERS_AT_ONCE = 8
"""Layers that are read side by side, at most."""
_ROOMS_AT_ONCE = 2
"""Layers that memory is made for side by side: one is faulted in while another one is pinned."""
_COPIES = 4
"""Bytes that laying out a byte of experts for the CPU takes meanwhile, all steps together."""
_DEVICE_COPIES = 6
"""The same on a GPU."""
_DEVICE_ROOM = 1 << 30
"""Bytes of a GPU that laying out may take: less than prompts take later, which are counted."""


class PinningError(ResourceError):
    """No more RAM can be pinned."""


class LayoutError(UserError):
    """The GPU's kernels cannot compute these experts."""


@dataclass(frozen=True)
class Filled:
    """A layer's experts module, and what is to be reported of it."""

    layer: int
    module: HybridExperts | NativeExperts | SplitExperts
    by_road: Mapping[str, int]
    """Road -> bytes."""
    backends: Counter[str]
    rounded: Sequence[str]
    """Names of what had its scales rounded to bfloat16."""


@contextmanager
def made_ahead(orders: Mapping[K, Callable[[], T]]) -> Iterator[dict[K, Future[T]]]:
    """Futures of what `orders` make, in their order, by two threads; at the end, what is not begun
    is not made, and what is not taken out is gone."""
    cores = torch.get_num_threads()
    share = max(1, cores // _ROOMS_AT_ONCE)
    with ThreadPoolExecutor(
        _ROOMS_AT_ONCE, "rooms", initializer=torch.set_num_threads, initargs=(share,)
    ) as pool:
        made: dict[K, Future[T]] = {}
        try:
            made.update((key, pool.submit(make)) for key, make in orders.items())
            yield made
        finally:
            pool.shutdown(cancel_futures=True)
            made.clear()
            torch.set_num_threads(cores)  # what threads to come begin with


class RoutedExperts:
    """Reads the routed experts of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        geometry: Geometry,
        device: torch.device,
        dtype: torch.dtype,
        memory: Memory,
        *,
        native: bool,
    ) -> None:
        """device: where all but experts is; dtype: of activations; memory: where bytes are read
        into that go to a GPU; native: see `hybrid.load`."""
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._geometry = geometry
        self._device = device
        self._dtype = dtype
        self._memory = memory
        self._native = native and architecture.activation is nn.functional.silu
        self._layouts: dict[int, Layout] = {}
        self._visiting = self._pinning = False
        self._rooms: dict[tuple[int, str], Future[Records]] = {}
        self._held = 0

    @contextmanager
    def rooms(self, homes: Table, *, visiting: bool, pinning: bool) -> Iterator[None]:
        """While this lasts, memory is made for what `fill` will read, beside a GPU by threads.

        homes: the road that keeps each expert; visiting: the CPU's experts may come to the device
        for prompts; pinning: their memory is to be pinned, as far as it can be.
        """
        self._visiting, self._pinning = visiting, pinning
        if self._device.type != "cuda":
            yield
            return
        ahead: Sequence[Road] = ("zero-copy", "cpu") if visiting else ("zero-copy",)
        orders: dict[tuple[int, str], Callable[[], Records]] = {
            (layer, road): partial(self._room, self.layout(layer), road, roads.count(road))
            for layer, roads in homes.items()
            for road in ahead
            if road in roads
        }
        with made_ahead(orders) as self._rooms:
            yield

    def fill(self, homes: Table) -> Iterator[Filled]:
        """Every layer's module, in order, within `rooms`.

        Raises CheckpointError for experts that are damaged, ResourceError where there is no room.
        """
        threads = self._threads()
        if threads == 1:
            yield from map(self._layer, homes, homes.values())
            return
        list(BACKENDS)  # imports them: threads must not do that side by side
        cores = torch.get_num_threads()
        share = max(1, cores // threads)  # of each thread's own operations
        with ThreadPoolExecutor(
            threads, "experts", initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            try:
                yield from pool.map(self._layer, homes, homes.values())
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(cores)  # what threads to come begin with

    def nbytes(self, layer: int) -> int:
        """Stored bytes of one expert of a layer; CheckpointError where it is missing or dense."""
        architecture = self._architecture
        size = 0
        for projection in (architecture.gate, architecture.up, architecture.down):
            name = architecture.expert_module(layer, 0, projection) + ".weight"
            self._check_expert(name)
            size += self._checkpoint.weights[name].nbytes
        return size

    def native(self, layer: int) -> bool:
        """Whether the CPU computes a layer's experts as records."""
        return self._native and kernel_for(*self._read(layer, [0], "cpu"), self._dtype) is not None

    def layout(self, layer: int) -> Layout:
        """The record of a layer's experts on a device; LayoutError where kernels have none."""
        if layer in self._layouts:
            return self._layouts[layer]
        some = (
            self._as_configured(quantized, layer) for quantized in self._read(layer, [0], "cpu")
        )
        try:
            return self._layouts.setdefault(layer, layout_of(*some))
        except ValueError as error:
            raise LayoutError(
                f"{self._checkpoint.path}: the GPU's kernels cannot compute its experts ({error}): "
                "use placement cpu"
            ) from error

    def _threads(self) -> int:
        """As many as torch may use, and as their copies have room for."""
        most = min(torch.get_num_threads(), _LAYERS_AT_ONCE)
        each = [self.nbytes(layer) for layer in self._geometry.moe_layers]
        experts = self._geometry.experts
        if self._device.type == "cuda":
            piece = _DEVICE_COPIES * min(experts, _AT_ONCE) * max(each, default=0)
            return max(1, min(most, _DEVICE_ROOM // max(1, piece)))
        records = self._native and self._dtype == torch.bfloat16 and not isinstance(find(), str)
        at_once = min(experts, _AT_ONCE) if records else experts
        spare = psutil.virtual_memory().available - sum(each) * experts
        return max(1, min(most, spare // max(1, _COPIES * at_once * max(each, default=0))))

    @torch.no_grad()
    def _layer(self, layer: int, roads: Sequence[Road]) -> Filled:
        """Read a layer's experts and give each into one road's keeping."""
        members = {road: [i for i, its in enumerate(roads) if its == road] for road in ROADS}
        backends: Counter[str] = Counter()
        rounded: list[str] = []
        cpu = None
        if mine := members["cpu"]:
            cpu = mine, self._on_cpu(layer, mine, backends, rounded)
        visiting = self._visiting and cpu is not None and isinstance(cpu[1], NativeExperts)
        if cpu is not None and len(mine) == len(roads) and not visiting:
            return Filled(layer, cpu[1], {"cpu": cpu[1].nbytes}, backends, rounded)
        split = importlib.import_module("pipeline.hybrid.split")  # imports Triton
        on_device = {}
        for road in ("resident", "zero-copy"):
            if members[road]:
                records = self._records(layer, members[road], road)
                on_device[road] = split.DeviceRoad(members[road], records)
                backends["triton"] += 2
        mixed: SplitExperts = split.SplitExperts(
            on_device, cpu, len(roads), self._architecture.activation, self._device
        )
        return Filled(layer, mixed, mixed.bytes_by_road(), backends, rounded)

    def _on_cpu(
        self, layer: int, mine: list[int], backends: Counter[str], rounded: list[str]
    ) -> HybridExperts | NativeExperts:
        """Some of a layer's experts for the CPU, as records or else for torch's products."""
        if self._native:
            kernel = kernel_for(*self._read(layer, mine[:1], "cpu"), self._dtype)
            if kernel is not None:
                backends[kernel.name] += 2
                return NativeExperts(kernel, self._records(layer, mine, "cpu"))
        packed = [to_matrices(q, self._dtype) for q in self._read(layer, mine, "cpu")]
        backends.update(name for name, _ in packed)
        wide, narrow = (matrices for _, matrices in packed)
        rounded += [self._name(layer)] * (wide.rounded_scales + narrow.rounded_scales)
        experts = HybridExperts(wide, narrow, len(mine), self._architecture.activation)
        self._held += experts.nbytes
        return experts

    def _read(
        self, layer: int, experts: Sequence[int], device: torch.device | str
    ) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Gate and up as one, and down, of some of a layer's experts, each as one batch."""
        architecture, geometry = self._architecture, self._geometry
        memory = fresh if torch.device(device).type == "cpu" else self._memory

        def read(projections: Sequence[str], shape: tuple[int, int]) -> QuantizedTensor:
            names = [
                f"{architecture.expert_module(layer, expert, projection)}.weight"
                for expert in experts
                for projection in projections
            ]
            for name in names[: len(projections)]:
                self._check_expert(name)
                self._check_shape(name, shape)
            return self._checkpoint.load_quantized(names, device, memory)

        wide, narrow = (geometry.inner, geometry.hidden), (geometry.hidden, geometry.inner)
        gate_up = pair_rows(read((architecture.gate, architecture.up), wide))
        return gate_up, read((architecture.down,), narrow)

    def _records(self, layer: int, experts: list[int], road: str) -> Records:
        """Some of a layer's experts where `road` wants them, laid out anew on the device, which is
        quick there, some at a time, which takes little of its memory."""
        records: Records | None = None
        for first in range(0, len(experts), _AT_ONCE):
            try:
                read = self._read(layer, experts[first : first + _AT_ONCE], self._device)
                some = pack(*(self._as_configured(quantized, layer) for quantized in read))
            except torch.OutOfMemoryError as error:  # a GPU's
                raise self._no_memory("resident") from error
            if records is None:
                room = self._rooms.pop((layer, road), None)
                records = room.result() if room else self._room(some.layout, road, len(experts))
            records.data[first : first + some.count].copy_(some.data)
        assert records is not None, "a road without experts has no records"
        return records

    def _room(self, layout: Layout, road: str, count: int) -> Records:
        """Memory for so many experts where `road` wants them."""
        where = self._device if road == "resident" else torch.device("cpu")
        try:
            records = empty(layout, count, where)
        except RuntimeError as error:
            raise self._no_memory("cpu" if where.type == "cpu" else road) from error
        if road != "resident":
            self._pin(records, road)
        self._held += records.nbytes
        return records

    def _pin(self, records: Records, road: str) -> None:
        """Zero-copy experts must be pinned for a GPU; the CPU's do without once it is refused."""
        if self._device.type != "cuda" or (road == "cpu" and not self._pinning):
            return
        try:
            pin_fresh(records.data.view(-1), self._device)
        except RuntimeError as error:
            if road != "cpu":
                raise self._no_memory(road) from error
            self._pinning = False

    def _as_configured(self, quantized: QuantizedTensor, layer: int) -> QuantizedTensor:
        """Symmetric where config.json says so, and only there, so that all records are alike."""
        scheme = quantized.scheme
        configured = (self._checkpoint.config.get("quantization_config") or {}).get("sym") is True
        if configured and not scheme.symmetric:
            raise CheckpointError(
                f"{self._checkpoint.path}: zeros of experts of layer {layer} are not all in the "
                "middle, config.json says sym: true"
            )
        same = AffineScheme(scheme.bits, scheme.group_size, configured)
        return QuantizedTensor(same, quantized.arrays)

    def _no_memory(self, road: str) -> ResourceError:
        held = f"{self._held / 2**30:.2f} GiB of experts"
        if road == "resident":
            where = f"{self._checkpoint.path}: no room on {self._device}"
            return ResourceError(f"{where} behind {held}: make fewer resident")
        if road == "cpu":
            return ResourceError(f"{self._checkpoint.path}: no more RAM behind {held}: free some")
        return PinningError(
            f"{self._checkpoint.path}: no more RAM can be pinned behind {held}: "
            "raise the limit of locked memory (ulimit -l), or use placement cpu"
        )

    def _check_expert(self, name: str) -> None:
        weight = self._checkpoint.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{self._checkpoint.path}: has no tensor {name}")
        if not self._checkpoint.is_packed(name):
            raise CheckpointError(
                f"{self._checkpoint.path}: experts are stored as {weight.format}, "
                "which the hybrid runtime cannot multiply by: requantise the model first"
            )

    def _check_shape(self, name: str, shape: tuple[int, int]) -> None:
        found = self._checkpoint.weights[name].shape
        if found != shape:
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} is {list(found or ())}, "
                f"config.json asks for {list(shape)}"
            )

    def _name(self, layer: int) -> str:
        return self._architecture.layer_prefix(layer) + self._architecture.experts
