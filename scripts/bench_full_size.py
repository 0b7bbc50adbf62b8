"""Converts a synthetic checkpoint of true geometry and says what it took: time, memory, parts.

    python scripts/bench_full_size.py --layers 2 --profile         # where a layer's time goes
    python scripts/bench_full_size.py --layers 4 --trace           # kernels, by torch.profiler
    python scripts/bench_full_size.py                              # all 48 layers
    python scripts/bench_full_size.py --method rtn
    python scripts/bench_full_size.py --layers 1 --samples 8 --threads 2

The source is generated into a memory file system first (--source keeps and reuses a directory); the
result goes to disk and is verified and deleted.  End to end means: from a source whose headers have
not been read to a verified output directory.  One process makes one conversion, so that peaks are
its own.  Every layer is told of as it ends, so that a run that is cut off has told what it can; the
last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# As the command line does; before torch starts.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from layer_clock import HostPeak, LayerClock
from make_synthetic_checkpoint import write_checkpoint
from synthetic_geometries import MODELS

from pipeline.checkpoint.reader import Checkpoint
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme
from pipeline.recipe import parse_recipe
from pipeline.run import run
from pipeline.stages.context import Context
from pipeline.stages.verify import verify_model

ROOT = Path(__file__).parents[1]
PLACES = {
    "pipeline.run:prepare": "open and check the recipe",
    "pipeline.stages.dequantize:Dequantize.run": "check and checksum of the source",
    "pipeline.stages.requantize:LayerStream.load_dense": "dense tensors: read, decode",
    "pipeline.stages.requantize:LayerStream.record": "forward of a stream's dense parts",
    "pipeline.stages.requantize:LayerStream.build_layer": "layer's module",
    "pipeline.stages.requantize:sort_by_expert": "sort by expert",
    "pipeline.stages.requantize:Requantize._layer_statistics": "layer's statistics",
    "pipeline.stages.requantize:Requantize._layer": "layer: all else",
    "pipeline.stages.requantize:Requantize._record_reference": "reference",
    "pipeline.stages.requantize:check_finite": "look for NaN and Inf",
    "pipeline.stages.requantize:Streams.snapshot": "streams to the host",
    "pipeline.stages.tiles:decode_tile": "experts: read, decode",
    "pipeline.checkpoint.files:TensorFiles.gather": "read",
    "pipeline.stages.tiles:TileReader.take": "waiting for the reader",
    "pipeline.stages.tiles:tile_output": "experts' outputs",
    "pipeline.stages.tiles:solve_tile": "solve: all else",
    "pipeline.stages.tiles:pack_tile": "pack, copy to host",
    "pipeline.stages.experts:TileOutput.add_to": "adding outputs",
    "pipeline.stages.experts:routed_hessians": "solve: Hessians",
    "pipeline.stages.experts:routed_drift": "solve: drift",
    "pipeline.stages.experts:corrected": "solve: correction",
    "pipeline.stages.experts:_quantize": "solve: quantiser",
    "pipeline.quantize.methods.gptq:sweep": "solve: sweep",
    "pipeline.quantize.methods.gptq:descend": "solve: descent",
    "pipeline.quantize.methods.gptq:refit_scales": "solve: refitted scales",
    "pipeline.stages.output:LayerOutput.put": "waiting for the disk",
    "pipeline.stages.output:OutputWriter.begin": "waiting for the writer",
    "pipeline.stages.output:OutputWriter._write": "write: waiting for tiles",
    "pipeline.checkpoint.writer:_Digest.write": "write: checksum, file",
    "pipeline.stages.shard:Shard.run": "shard",
}


def recipe_of(args: argparse.Namespace, source: Path, output: Path) -> dict[str, Any]:
    """The 80B recipe with the numbers of the command line."""
    return {
        "source": {"model": str(source)},
        "output": {"path": str(output)},
        "requantize": {"method": args.method, "error_correction": not args.no_correction},
        "calibration": {
            "sources": [str(ROOT / "calibration" / "docs-calib.txt")],
            "samples": args.samples,
            "sequence_length": args.length,
        },
        "validate": {
            "text": str(ROOT / "calibration" / "docs-eval.txt"),
            "window": args.length,
            "stride": args.length // 2,
            "max_windows": args.windows,
        },
        "limits": {
            "device_memory": args.device_memory,
            "host_memory": args.host_memory,
            "threads": args.threads,
        },
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=list(MODELS), default="qwen3-next-80b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--no-correction", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--source", type=Path, help="reused if it is there, kept afterwards")
    parser.add_argument("--source-root", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--output-root", type=Path, default=ROOT / "out")
    parser.add_argument("--device-memory", default="24GiB")
    parser.add_argument("--host-memory", default="24GiB")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", action="store_true", help="split time over named functions")
    parser.add_argument("--trace", action="store_true", help="kernels of the second layer")
    parser.add_argument("--keep", action="store_true", help="keep the result")
    parser.add_argument("--no-verify", action="store_true")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace, source: Path, output: Path) -> dict[str, Any]:
    """Convert and verify; returns the figures."""
    data = recipe_of(args, source, output)
    recipe = parse_recipe(data, "the benchmark's recipe")
    figures: dict[str, Any] = {}
    with HostPeak() as host:
        started = time.perf_counter()
        times, peaks = time_layers(host, started)
        context = run(recipe, json.dumps(data), until="shard", quiet=False)
        figures["convert_seconds"] = time.perf_counter() - started
        print(f"converted after {figures['convert_seconds']:.1f} s", flush=True)
        if not args.no_verify:
            problems = verify_model(output)
            for problem in problems[:10]:
                print(problem)
            figures["verified"] = not problems
        figures["end_to_end_seconds"] = time.perf_counter() - started
        print(f"verified after {figures['end_to_end_seconds']:.1f} s", flush=True)
    conversion = json.loads((output / "conversion.json").read_text())
    figures["stages"] = conversion["stages"]
    figures["layer_seconds"] = times
    figures["host_anonymous_gib"] = host.anonymous / 2**30
    figures["host_pinned_gib"] = host.pinned / 2**30
    figures["least_free_host_gib"] = host.free_at_least / 2**30
    if torch.cuda.is_available():
        figures |= {name: nbytes / 2**30 for name, nbytes in peaks.items()}
    written = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    figures["output_gb"] = written / 1e9
    figures |= sampled_errors(context, output)
    return figures


def sampled_errors(context: Context, output: Path) -> dict[str, float]:
    """Relative error of one expert matrix a layer against the source, and of rounding the same.

    A wrong scale, nibble or name would make it 1 or more.  GPTQ's is somewhat larger than
    rounding's; error correction moves weights the further, the more was lost before, and on random
    weights that may be much: hence each layer's error is told.
    """
    architecture, recipe = context.architecture, context.recipe.requantize
    scheme = AffineScheme(recipe.bits, recipe.group_size, recipe.symmetric)
    result = Checkpoint.open(output)
    found: list[float] = []
    rounded: list[float] = []
    for number, layer in enumerate(context.geometry.moe_layers):
        projection = (architecture.gate, architecture.up, architecture.down)[number % 3]
        expert = (37 * number + 5) % context.geometry.experts
        name = f"{architecture.expert_module(layer, expert, projection)}.weight"
        source = context.checkpoint.load(name).float()
        nearest = QUANTIZERS["rtn"].quantize(source, None, scheme, SolverOptions())
        for errors, other in (
            (found, result.load(name).float()),
            (rounded, nearest.quantized.dequantize()),
        ):
            errors.append(float((other - source).norm() / source.norm()))
    result.close()
    print("relative errors of sampled tensors by layer:", *(f"{error:.2f}" for error in found))
    return {
        "sampled": len(found),
        "sampled_error_mean": statistics.fmean(found),
        "sampled_error_max": max(found),
        "sampled_rounding_mean": statistics.fmean(rounded),
        "sampled_ratio_max": max(a / b for a, b in zip(found, rounded, strict=True)),
    }


def time_layers(host: HostPeak, begun: float) -> tuple[list[float], dict[str, int]]:
    """The list gets the seconds of each unit of requantize: the layers, then the reference.

    The other table gets the most GPU memory of all units, in bytes: in use, and reserved by torch.
    Both count from the start of the stage.
    """
    stage = sys.modules["pipeline.stages.requantize"].Requantize
    original = stage.run
    times: list[float] = []
    peaks: dict[str, int] = {}

    def timed(self: Any, job: Any) -> None:  # noqa: ANN401
        started = time.perf_counter()
        original(self, job)
        now = time.perf_counter()
        times.append(round(now - started, 2))
        if torch.cuda.is_available():
            peaks["device_gib"] = torch.cuda.max_memory_allocated()
            peaks["device_reserved_gib"] = torch.cuda.max_memory_reserved()
        gpu = peaks.get("device_reserved_gib", 0) / 2**30
        # Short, as a whole run has 49 of them.
        print(
            f"{job.unit} {times[-1]:.2f} s, {now - begun:.0f} s in all,"
            f" GPU {gpu:.1f}, host {(host.anonymous + host.pinned) / 2**30:.1f} GiB",
            flush=True,
        )

    stage.run = timed
    return times, peaks


def trace_second_layer() -> list[Any]:
    """Profile the second layer with torch.profiler; the list gets the profile once it is done."""
    stage = sys.modules["pipeline.stages.requantize"].Requantize
    original = stage._layer
    found: list[Any] = []

    def traced(self: Any, layer: int, *rest: Any) -> Any:  # noqa: ANN401
        if layer != 1:
            return original(self, layer, *rest)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            result = original(self, layer, *rest)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        found.append(profile)
        return result

    stage._layer = traced
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, convert, verify, print."""
    args = arguments(argv)
    model = MODELS[args.geometry].cut(args.layers, args.experts)
    name = f"{model.name}-{model.layers}x{model.experts}"
    source = args.source or args.source_root / f"requant-bench-{name}"
    output = args.output_root / f"bench-{name}-{args.method}"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
    figures: dict[str, Any] = {"layers": model.layers, "experts": model.experts}
    figures |= {"method": args.method, "tokens": args.samples * args.length}
    if not source.exists():  # before anything touches the GPU: the makers are forked
        started = time.perf_counter()
        threads = os.cpu_count() or 1
        total = write_checkpoint(model, source, seed=0, headers_only=False, threads=threads)
        seconds = time.perf_counter() - started
        figures |= {"generate_seconds": seconds, "generate_gb_per_second": total / seconds / 1e9}
        print(f"{total / 1e9:.1f} GB of source made in {seconds:.1f} s", flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M}Z commit {_commit()}, {gpu}")
    print(f"python {platform.python_version()}")
    print(", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "bitsandbytes")))
    clock = LayerClock(PLACES) if args.profile else None
    profiles = trace_second_layer() if args.trace else []
    try:
        figures |= convert(args, source, output)
    finally:
        if clock is not None:
            print(f"seconds a layer, mean of {model.layers}; each without the parts below it")
            print(clock.table(model.layers))
        for profile in profiles:
            averages = profile.key_averages()
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            print(averages.table(sort_by=by, row_limit=28, max_name_column_width=60))
            print(averages.table(sort_by="self_cpu_time_total", row_limit=14))
        if not args.keep:
            shutil.rmtree(output, ignore_errors=True)
        if args.source is None:
            shutil.rmtree(source, ignore_errors=True)
    for key, value in figures.items():
        if isinstance(value, float):
            print(f"{key:24} {value:10.3f}")
    print("seconds of each layer, then of the reference:", *figures["layer_seconds"])
    print(json.dumps(figures))


def _commit() -> str:
    if given := os.environ.get("REQUANT_COMMIT"):  # a copy without its history
        return given
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
