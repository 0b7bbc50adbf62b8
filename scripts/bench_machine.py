"""What the machine allows: the rates that bound a conversion, each measured alone.

    python scripts/bench_machine.py [--disk DIR] [--memory DIR] [--small]

Host: checksums, memory file system, disk.  Device: copies, products of several precisions,
factorisations and the ways to solve with them, grouped products, the kernels of the solver.  Shapes
are those of one tile (32 experts) of Qwen3-Next-80B-A3B; a layer has 16 tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.quantize.hessian import routed_hessians
from pipeline.quantize.precision import full_float32

CHUNK = 16 << 20


def timed(call: Callable[[], object], repeat: int = 3) -> float:
    """Median seconds, after one call that warms up."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = []
    for _ in range(repeat + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def show(what: str, call: Callable[[], float], unit: str = "") -> None:
    """One line; what fails is said and the next goes on, since a machine may lack some of it."""
    try:
        print(f"{what:58} {call():10.3f} {unit}", flush=True)
    except (RuntimeError, OSError, TypeError, AttributeError) as error:
        print(f"{what:58} failed: {str(error).splitlines()[0][:120]}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def host(disk: Path, memory: Path, nbytes: int) -> None:
    """Checksums and files."""
    data = os.urandom(CHUNK) * (nbytes // CHUNK)

    def sha(threads: int) -> float:
        def one(_: int) -> None:
            digest = hashlib.sha256()
            for start in range(0, len(data), CHUNK):
                digest.update(memoryview(data)[start : start + CHUNK])

        with ThreadPoolExecutor(threads) as pool:
            seconds = timed(lambda: list(pool.map(one, range(threads))), 1)
        return threads * len(data) / seconds / 1e9

    def write(folder: Path, threads: int) -> float:
        def one(index: int) -> None:
            path = folder / f"bench-{index}.tmp"
            with path.open("wb", buffering=0) as stream:
                for start in range(0, len(data), CHUNK):
                    stream.write(memoryview(data)[start : start + CHUNK])
                os.fsync(stream.fileno())

        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(one, range(threads)))
            return threads * len(data) / (time.perf_counter() - start) / 1e9

    def read(folder: Path, threads: int, size: int) -> float:
        def one(index: int) -> None:
            buffer = bytearray(size)
            descriptor = os.open(folder / f"bench-{index}.tmp", os.O_RDONLY)
            for start in range(0, len(data) - size + 1, size):
                os.preadv(descriptor, [buffer], start)
            os.close(descriptor)

        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(one, range(threads)))
            return threads * len(data) / (time.perf_counter() - start) / 1e9

    for threads in (1, 4, 12):
        show(f"sha256, {threads} threads", lambda n=threads: sha(n), "GB/s")  # type: ignore[misc]
    for folder in (memory, disk):
        for threads in (1, 4):
            name = f"{threads} threads, {folder}"
            show(f"write with fsync, {name}", lambda f=folder, n=threads: write(f, n), "GB/s")  # type: ignore[misc]
            show(f"read by 16 MiB, {name}", lambda f=folder, n=threads: read(f, n, CHUNK), "GB/s")  # type: ignore[misc]
        show("read by 512 KiB, 1 thread", lambda f=folder: read(f, 1, 1 << 19), "GB/s")  # type: ignore[misc]
        for path in folder.glob("bench-*.tmp"):
            path.unlink()


@dataclass(frozen=True)
class Tile:
    """One tile's tensors, on the device."""

    experts: int
    hidden: int
    inner: int
    tokens: int
    device: torch.device

    def noise(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard Gaussian values."""
        return torch.randn(shape, device=self.device, dtype=dtype)


def copies(tile: Tile) -> None:
    """Between host and device."""
    if tile.device.type != "cuda":
        return
    block = torch.empty(1 << 30, dtype=torch.uint8, device=tile.device)
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    plain = torch.empty(1 << 30, dtype=torch.uint8)
    show("to device, pinned", lambda: 1.074 / timed(lambda: block.copy_(pinned)), "GB/s")
    show("to device, plain", lambda: 1.074 / timed(lambda: block.copy_(plain)), "GB/s")
    show("to host, pinned", lambda: 1.074 / timed(lambda: pinned.copy_(block)), "GB/s")
    show("to host, plain (new)", lambda: 1.074 / timed(block.cpu), "GB/s")


def products(tile: Tile) -> None:
    """Of the weights of gate and up with a matrix of Hessian size."""
    wide = 2 * tile.inner
    weight, square = tile.noise(tile.experts, wide, tile.hidden), _square(tile)
    flops = 2.0 * tile.experts * wide * tile.hidden**2 / 1e12

    def rate(kind: str) -> float:
        matmul: Any = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, kind
        try:
            return flops / timed(lambda: weight @ square)
        finally:
            matmul.fp32_precision = before

    show("batched product, ieee", lambda: rate("ieee"), "TFLOP/s")
    show("batched product, tf32", lambda: rate("tf32"), "TFLOP/s")
    a, b = weight.bfloat16(), square.bfloat16()
    show("batched product, bf16", lambda: flops / timed(lambda: a @ b), "TFLOP/s")


def drift(tile: Tile) -> None:
    """Second moments of a tile's tokens, with themselves and with those of another stream."""
    x = tile.noise(tile.experts, tile.tokens, tile.hidden, dtype=torch.bfloat16)
    target = x + 0.01 * tile.noise(*x.shape, dtype=torch.bfloat16)
    offsets = torch.arange(tile.experts + 1, device=tile.device) * tile.tokens
    flat = x.view(-1, tile.hidden)
    out = torch.empty(tile.experts, tile.hidden, tile.hidden, device=tile.device)

    def exact() -> None:
        with full_float32():
            for e in range(tile.experts):
                torch.mm((target[e].float() - x[e].float()).T, x[e].float(), out=out[e])

    def halves() -> None:
        for e in range(tile.experts):
            torch.mm(target[e].T, x[e], out=out[e], out_dtype=torch.float32)

    show("Hessians", lambda: timed(lambda: routed_hessians(flat, offsets)), "s")
    show("drift, float32 product per expert", lambda: timed(exact), "s")
    show("cross product, bf16 with float32 sums", lambda: timed(halves), "s")


def solving(tile: Tile) -> None:
    """Factorisations, and the ways to solve with them."""
    square = _square(tile)
    spd = square @ square.mT / tile.hidden + 0.1 * torch.eye(tile.hidden, device=tile.device)
    factor = torch.linalg.cholesky(spd)
    rhs = tile.noise(tile.experts, tile.hidden, 2 * tile.inner)
    eye = torch.eye(tile.hidden, device=tile.device).expand_as(spd)
    steps = tile.hidden // 128
    blocks = factor.reshape(tile.experts, steps, 128, steps, 128).diagonal(dim1=1, dim2=3)
    diagonal = blocks.permute(0, 3, 1, 2).reshape(-1, 128, 128)
    unit = torch.eye(128, device=tile.device).expand_as(diagonal)
    pairs = list(zip(rhs, factor, strict=True))
    solve = torch.linalg.solve_triangular
    calls: dict[str, Callable[[], object]] = {
        "Cholesky, batch": lambda: torch.linalg.cholesky_ex(spd),
        "Cholesky, one by one": lambda: [torch.linalg.cholesky_ex(m) for m in spd],
        "cholesky_solve, batch": lambda: torch.cholesky_solve(rhs, factor),
        "cholesky_solve, one by one": lambda: [torch.cholesky_solve(r, f) for r, f in pairs],
        "one triangular solve, batch": lambda: solve(factor, rhs, upper=False),
        "triangular inverse, batch": lambda: solve(factor, eye, upper=False),
        "inverses of all 128 x 128 diagonal blocks": lambda: solve(diagonal, unit, upper=False),
        "product of factor and right-hand sides": lambda: factor @ rhs,
    }
    with full_float32():
        for what, call in calls.items():
            show(what, lambda call=call: timed(call), "s")  # type: ignore[misc]


def grouped(tile: Tile) -> None:
    """Products of each expert's tokens with its weights, all at once."""
    x = tile.noise(tile.experts * tile.tokens, tile.hidden, dtype=torch.bfloat16)
    weight = tile.noise(tile.experts, 2 * tile.inner, tile.hidden, dtype=torch.bfloat16).mT
    stack = x.view(tile.experts, tile.tokens, tile.hidden)
    product: Any = torch._grouped_mm
    ends = (torch.arange(tile.experts, device=tile.device) + 1) * tile.tokens
    ends = ends.to(torch.int32)
    show("grouped product", lambda: timed(lambda: product(x, weight, offs=ends)), "s")
    loop = range(tile.experts)
    show("one by one", lambda: timed(lambda: [stack[e] @ weight[e] for e in loop]), "s")
    uneven = torch.sort(torch.randint(0, len(x), (tile.experts,), device=tile.device)).values
    uneven[-1] = len(x)
    uneven = uneven.to(torch.int32)
    first = product(x, weight, offs=uneven)
    same = all(torch.equal(first, product(x, weight, offs=uneven)) for _ in range(5))
    print("grouped product of uneven groups, repeats are equal:", same)
    start, stop = int(uneven[0]), int(uneven[1])
    alone = product(x[start:stop], weight[1:2], offs=uneven[1:2] - uneven[0])
    print("one group alone gives the same bytes:", torch.equal(alone, first[start:stop]))
    plain = x[start:stop] @ weight[1]
    print("a plain product gives the same bytes:", torch.equal(plain, first[start:stop]))


def sums(tile: Tile) -> None:
    """Adding outputs to the rows of the tokens they belong to."""
    total = tile.noise(4 * tile.tokens, tile.hidden)
    rows = torch.randperm(len(total), device=tile.device)[: 2 * tile.tokens]
    values = tile.noise(len(rows), tile.hidden)
    show("index_add of unique rows", lambda: timed(lambda: total.index_add_(0, rows, values)), "s")
    show("gather of rows", lambda: timed(lambda: total[rows]), "s")


def _square(tile: Tile) -> Tensor:
    return tile.noise(tile.experts, tile.hidden, tile.hidden)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line a rate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--disk", type=Path, default=Path())
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    args = parser.parse_args(argv)
    args.disk.mkdir(parents=True, exist_ok=True)
    host(args.disk, args.memory, CHUNK if args.small else 1 << 30)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tile = Tile(2, 256, 64, 300, device) if args.small else Tile(32, 2048, 512, 5120, device)
    for part in (copies, products, drift, solving, grouped, sums):
        print(f"-- {part.__doc__}")
        try:
            part(tile)
        except (RuntimeError, AttributeError) as error:
            print(f"{part.__name__} failed: {str(error).splitlines()[0][:150]}")


if __name__ == "__main__":
    main()
