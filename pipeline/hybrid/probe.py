"""How fast this machine's roads read experts, measured in some tenths of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from pipeline.errors import ResourceError
from pipeline.hybrid.cache import PREFILL_CHUNK
from pipeline.hybrid.host import host_memory
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.placing import Rates
from pipeline.hybrid.records import Records, layout_of
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

_HIDDEN, _INNER, _GROUP = 2048, 512, 128
"""Experts of Qwen3-Next-80B."""

_TOP_K = 10

_FEWEST = 16
"""Tokens of a prompt that may be worth bringing all experts for."""

_BESIDE = 0.2
"""Seconds of copies that run while the CPU is measured, over and over."""


@cache
def probe(device: torch.device, native: bool = True, threads: int | None = None) -> Rates:
    """Measure copies from pinned memory, then, side by side, such copies and the CPU's products.

    Both read the same memory, so each has what the other leaves.  native: see `load`; threads: that
    compute, all by default.  ResourceError where no memory can be pinned for it.
    """
    everywhere = torch.get_num_threads()
    torch.set_num_threads(threads or everywhere)
    try:
        return _side_by_side(device, native, 1 << 27)
    finally:
        torch.set_num_threads(everywhere)


def _side_by_side(device: torch.device, native: bool, nbytes: int) -> Rates:
    try:
        pinned = host_memory(nbytes, pin=True)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise ResourceError(
            "no memory is left to measure PCIe and CPU with: free some, or use placement zero-copy"
        ) from error
    work, read = _products(nbytes, native)
    work()
    seconds = _copying(pinned, target)
    copies = round(_BESIDE / seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(copies):
        target.copy_(pinned, non_blocking=True)
    end.record()
    started, times = time.perf_counter(), 0
    while not end.query() or not times:
        work()
        times += 1
    cpu = times * read / (time.perf_counter() - started)
    torch.cuda.synchronize(device)
    beside = copies * nbytes / (begin.elapsed_time(end) / 1e3)
    return Rates(pcie=beside, cpu=cpu, alone=nbytes / seconds)


def link_rate(device: torch.device, *, staged: bool, nbytes: int = 1 << 27) -> float:
    """Bytes per second from pinned memory to a device; staged: from other memory, by way of pinned
    buffers, where the slower of the two copies counts."""
    pinned = host_memory(nbytes, pin=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    seconds = _copying(pinned, target)
    if staged:
        plain = torch.ones(nbytes, dtype=torch.uint8)
        seconds = max(seconds, _best(lambda: pinned.copy_(plain)))
    return nbytes / seconds


def tokens_worth(experts: NativeExperts, of: int, top_k: int, seconds: float) -> int | None:
    """Tokens of a prompt from which on the CPU takes longer than so many seconds with its experts
    of one layer, between powers of two by a straight line; None: with no chunk of a prompt.

    of: experts of the layer, calls of the others being another road's; top_k: calls of a token.
    """
    hidden = experts.records.layout.gate_up.columns
    generator = torch.Generator().manual_seed(0)
    tokens, before = _FEWEST, seconds
    while tokens <= PREFILL_CHUNK:
        x = torch.ones((tokens, hidden), dtype=torch.bfloat16)
        index = torch.rand((tokens, of), generator=generator).topk(top_k).indices
        index = index.clamp(max=experts.num_experts)
        weights = torch.ones(index.shape)
        took = _best(partial(experts, x, index, weights))
        if took > seconds:
            above = (took - seconds) / (took - before)
            return max(_FEWEST, round(tokens * (1 - above / 2)))
        tokens, before = 2 * tokens, took
    return None


def _copying(pinned: Tensor, target: Tensor) -> float:
    def copy() -> None:
        target.copy_(pinned, non_blocking=True)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)

    return min(_best(copy), _best(copy))


def cpu_rate(nbytes: int, native: bool = True) -> float:
    """Bytes per second at which the CPU's products read experts of `nbytes` in all."""
    work, read = _products(nbytes, native)
    return read / _best(work)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _products(nbytes: int, native: bool) -> tuple[Callable[[], None], int]:
    """One token's products with experts that no cache holds, and the bytes they read: by the
    kernel that will run, which is torch's, matrix by matrix, where there is none of our own."""
    gate_up, down = _expert(2 * _INNER, _HIDDEN), _expert(_HIDDEN, _INNER)
    library = kernel_for(gate_up, down, torch.bfloat16) if native else None
    x = torch.ones((1, _HIDDEN), dtype=torch.bfloat16)
    if library is None:
        packed = torch.randint(0, 256, (max(1, nbytes >> 19), _INNER, _HIDDEN // 2)).byte()
        pairs = torch.ones((_HIDDEN // _GROUP, _INNER, 2), dtype=torch.bfloat16)

        def by_torch() -> None:
            for matrix in packed:
                torch.ops.aten._weight_int4pack_mm_for_cpu(x, matrix, _GROUP, pairs)

        return by_torch, packed.nbytes
    layout = layout_of(gate_up, down)
    count = -(-nbytes // layout.nbytes // _TOP_K) * _TOP_K
    experts = NativeExperts(library, Records(layout, torch.ones(count, layout.nbytes).byte()))
    weights = torch.ones((1, _TOP_K))
    chosen: list[Tensor] = list(torch.randperm(count).view(-1, 1, _TOP_K))

    def by_kernel() -> None:
        for index in chosen:
            experts(x, index, weights)

    return by_kernel, experts.nbytes


def _expert(rows: int, columns: int) -> QuantizedTensor:
    """Shapes of one, in four bits."""
    groups = torch.ones((1, rows, columns // _GROUP))
    arrays = {"codes": torch.ones((1, rows, columns)).byte(), "scales": groups.half()}
    return QuantizedTensor(AffineScheme(4, _GROUP, True), {**arrays, "zeros": groups.byte()})
