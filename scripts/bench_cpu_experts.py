"""How fast this CPU computes experts of 80B geometry, beside what its memory gives.

One token, ten experts drawn at random among more than 4 GB of them, so that no cache holds any:
bytes of experts a second by the compiled kernel, in every variant that this processor has, by
torch's int4 product, and by a plain sum over the same memory.  Then many tokens to the same ten
experts: by the kernel, by torch's product, and as dense bfloat16 matrices, dequantised each time.

    python scripts/bench_cpu_experts.py --threads 2

On a machine with other work, `--threads 1 --own-time` counts the thread's own processor time.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.hybrid.backends import BACKENDS
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.native.library import KINDS, Library, find
from pipeline.hybrid.records import empty, pack
from pipeline.hybrid.stored import to_matrices
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

HIDDEN, INNER, TOP_K = 2048, 512, 10
SEED_EXPERTS = 64
"""Random ones; the others are copies of their bytes at addresses of their own."""

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.own_time else time.perf_counter
    if args.own_time and args.threads > 1:
        raise SystemExit("--own-time is of one thread: say --threads 1")
    load = os.getloadavg()[0]
    print(time.strftime("%Y-%m-%d %H:%MZ", time.gmtime()), f"torch {torch.__version__},", _cpu())
    print(f"{args.threads} threads, load {load:.1f},", clock.__name__)
    library = find()
    if isinstance(library, str):
        raise SystemExit(f"no native kernel: {library}")
    wide = _random(SEED_EXPERTS, 2 * INNER, HIDDEN, args.group)
    narrow = _random(SEED_EXPERTS, HIDDEN, INNER, args.group)
    _decode(args, wide, narrow, library, clock)
    if args.tokens:
        _many(args, wide, narrow, library, clock)


def _decode(
    args: argparse.Namespace,
    wide: QuantizedTensor,
    narrow: QuantizedTensor,
    library: Library,
    clock: Callable[[], float],
) -> None:
    """One token at a time."""
    seed = pack(wide, narrow)
    records = empty(seed.layout, args.experts, torch.device("cpu"))
    for first in range(0, args.experts, SEED_EXPERTS):
        part = records.data[first : first + SEED_EXPERTS]
        part.copy_(seed.data[: len(part)])
    size = seed.layout.nbytes
    words = records.data.flatten().view(torch.int64)
    seconds = _times(words.sum, 5, clock)
    best = records.nbytes / min(seconds) / 1e9
    print(f"plain read of {records.nbytes / 1e9:.1f} GB: {best:.1f} GB/s at best,", end=" ")
    print(f"{records.nbytes / statistics.median(seconds) / 1e9:.1f} in the median")
    for kind in reversed(range(library.kind + 1)):
        module = NativeExperts(replace(library, kind=kind), records)
        rate = _rate(module, args.experts, size, args.calls, clock)
        print(f"kernel, {KINDS[kind]}: {_told(rate, size, best)}", flush=True)
    del records, words, module
    group = wide.scheme.group(HIDDEN)
    if group in (32, 64, 128, 256):
        one = _by_torch(wide, narrow)
        modules = [copy.deepcopy(one) for _ in range(args.experts // SEED_EXPERTS)]
        taken = iter(range(10**9))

        def any_of(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            output: Tensor = modules[next(taken) % len(modules)](x, index, weights)
            return output

        rate = _rate(any_of, SEED_EXPERTS, size, args.calls, clock)
        print(f"torch's int4 product: {_told(rate, size, best)}", flush=True)


def _many(
    args: argparse.Namespace,
    wide: QuantizedTensor,
    narrow: QuantizedTensor,
    library: Library,
    clock: Callable[[], float],
) -> None:
    """Many tokens, all to the same experts."""
    kernel = kernel_for(wide, narrow, torch.bfloat16)
    assert kernel is not None, "the group was accepted"
    dense = BACKENDS["dequantize"]
    gate_up, down = (dense.pack(q, torch.bfloat16) for q in (wide, narrow))
    sides: dict[str, Call] = {
        "kernel": NativeExperts(kernel, pack(wide, narrow)),
        "torch int4": _by_torch(wide, narrow),
        "dequantised": HybridExperts(gate_up, down, SEED_EXPERTS, nn.functional.silu),
    }
    print("tokens an expert, milliseconds of ten experts:", ", ".join(sides))
    index = torch.arange(TOP_K)
    for tokens in args.tokens:
        x = torch.randn(tokens, HIDDEN).bfloat16()
        inputs = x, index.expand(tokens, -1).contiguous(), torch.rand(tokens, TOP_K)
        best = [min(_times(lambda: side(*inputs), 3, clock)) for side in sides.values()]  # noqa: B023
        print(f"{tokens:5d}", *(f"{1e3 * seconds:9.1f}" for seconds in best), flush=True)


def _rate(
    call: Call, experts: int, size: int, calls: int, clock: Callable[[], float]
) -> Sequence[float]:
    """Seconds of each call for one token."""
    x, weights = torch.randn(1, HIDDEN).bfloat16(), torch.rand(1, TOP_K)
    seconds = []
    chosen = torch.randperm(experts)
    for number in range(calls):
        at = number * TOP_K % (experts - TOP_K + 1)
        index = chosen[at : at + TOP_K].unsqueeze(0)
        started = clock()
        call(x, index, weights)
        seconds.append(clock() - started)
    return seconds[1:]


def _told(seconds: Sequence[float], size: int, roofline: float) -> str:
    median = TOP_K * size / statistics.median(seconds) / 1e9
    best = TOP_K * size / min(seconds) / 1e9
    return (
        f"{1e6 * statistics.median(seconds):.0f} us a token, {median:.1f} GB/s in the median "
        f"({median / roofline:.0%} of the plain read), {best:.1f} at best"
    )


def _times(work: Callable[[], object], times: int, clock: Callable[[], float]) -> list[float]:
    seconds = []
    for _ in range(times):
        started = clock()
        work()
        seconds.append(clock() - started)
    return seconds


def _by_torch(wide: QuantizedTensor, narrow: QuantizedTensor) -> HybridExperts:
    gate_up, down = (to_matrices(q, torch.bfloat16)[1] for q in (wide, narrow))
    return HybridExperts(gate_up, down, SEED_EXPERTS, nn.functional.silu)


def _random(count: int, rows: int, columns: int, group: int) -> QuantizedTensor:
    scheme = AffineScheme(4, group, True)
    groups = columns // scheme.group(columns)
    arrays = {
        "codes": torch.randint(0, 16, (count, rows, columns), dtype=torch.uint8),
        "scales": (torch.rand(count, rows, groups) * 0.01 + 0.01).bfloat16().half(),
        "zeros": torch.full((count, rows, groups), 8, dtype=torch.uint8),
    }
    return QuantizedTensor(scheme, arrays)


def _cpu() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--experts", type=int, default=2688, help="of 1.6 MB each")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    parser.add_argument("--own-time", action="store_true", help="processor time of one thread")
    return parser.parse_args()


if __name__ == "__main__":
    main()
