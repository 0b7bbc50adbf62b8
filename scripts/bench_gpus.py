"""The same conversion on one GPU and on several of its kind: bytes compared, solving timed.

    python scripts/bench_gpus.py                  # 4 layers of Qwen3-Next-80B-A3B's geometry
    python scripts/bench_gpus.py --layers 2 --experts 64

Each conversion has a process of its own that sees so many GPUs.  "Solving" is the time from a
layer's routed tokens to its last expert's output: Hessians, correction, quantiser, outputs and
packing.  The dense parts before it run on one GPU always.  The first layer compiles kernels and is
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_full_size
import torch
from make_synthetic_checkpoint import write_checkpoint
from synthetic_geometries import MODELS

from pipeline.recipe import parse_recipe
from pipeline.run import run


def child(args: argparse.Namespace) -> None:
    """One conversion on all GPUs that are seen; figures to a file."""
    stage = sys.modules["pipeline.stages.requantize"].Requantize
    original = stage._experts
    solving: list[float] = []

    def timed(self: Any, *given: Any) -> Any:  # noqa: ANN401
        _settle()
        started = time.perf_counter()
        result = original(self, *given)
        _settle()
        solving.append(time.perf_counter() - started)
        return result

    stage._experts = timed
    settings = ["--samples", str(args.samples), "--windows", "1", "--length", str(args.length)]
    numbers = bench_full_size.arguments(settings)
    output = args.work / args.child
    data = bench_full_size.recipe_of(numbers, args.work / "source", output)
    started = time.perf_counter()
    run(parse_recipe(data, args.child), json.dumps(data), until="shard", quiet=True)
    lines = (output / "SHA256SUMS").read_text().splitlines()
    figures = {
        "gpus": torch.cuda.device_count(),
        "seconds": time.perf_counter() - started,
        "solving": solving,
        "sums": [line for line in lines if line.endswith(".safetensors")],
    }
    (args.work / f"{args.child}.json").write_text(json.dumps(figures))
    shutil.rmtree(output)


def _settle() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, convert on one and on all, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/requant-gpus"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args)
        return
    args.work.mkdir(parents=True)  # not one that is there: it is deleted in the end
    model = MODELS["qwen3-next-80b"].cut(args.layers, args.experts)
    threads = os.cpu_count() or 1
    write_checkpoint(model, args.work / "source", seed=0, headers_only=False, threads=threads)
    found: list[dict[str, Any]] = []
    for count in args.gpus:
        seen = ",".join(map(str, range(count)))
        given = list(sys.argv[1:] if argv is None else argv)
        name = f"on-{count}"
        subprocess.run(
            [sys.executable, __file__, *given, "--child", name],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": seen},
            check=True,
        )
        figures = json.loads((args.work / f"{name}.json").read_text())
        solving = ", ".join(f"{seconds:.2f}" for seconds in figures["solving"])
        print(
            f"{figures['gpus']} GPUs: {figures['seconds']:.1f} s, solving {solving} s", flush=True
        )
        found.append(figures)
    first = found[0]
    for other in found[1:]:
        ratio = _later(first) / _later(other)
        same = "the same bytes" if other["sums"] == first["sums"] else "OTHER BYTES"
        print(f"{other['gpus']} GPUs beside {first['gpus']}: {ratio:.2f} times, {same}")
    shutil.rmtree(args.work)


def _later(figures: dict[str, Any]) -> float:
    return statistics.fmean(figures["solving"][1:] or figures["solving"])


if __name__ == "__main__":
    main()
