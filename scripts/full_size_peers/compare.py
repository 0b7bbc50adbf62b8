"""One layer of true geometry beside llm-compressor: same weights, tokens, machine and run.

    export PYTHONPATH=.:scripts
    python -m full_size_peers.compare --work /dev/shm/peers
    python -m full_size_peers.compare --work /tmp/peers --experts 16 --samples 2 --length 256 \
        --held-out 2 --peer-python .env-llm-compressor/bin/python

(`scripts/quality/make_env.sh llm-compressor` makes that environment.)  A synthetic NF4 source of
one layer is made, and written as dense BF16 too, which llm-compressor starts from.  Each side
runs in a process of its own, ours three times: the first pays for the compilation of kernels, the
second has the default recipe as well, the third weighs all outputs alike, as llm-compressor does.
Then all results are decoded and judged on text that neither has seen: of every expert the squared
error of its output beside the output's square, on the tokens that the source's router sends to it.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_full_size
import torch
from layer_clock import HostPeak
from make_synthetic_checkpoint import write_checkpoint
from quality.compressed_tensors import PARTS, decode
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic_geometries import MODELS
from torch import Tensor

from pipeline.calibration import calibration_sequences, load_tokenizer, read_text, tokenize
from pipeline.checkpoint.reader import Checkpoint
from pipeline.evaluate.windows import sliding_windows
from pipeline.models.skeleton import architecture_of
from pipeline.quantize.precision import full_float32
from pipeline.recipe import parse_recipe
from pipeline.run import run
from pipeline.stages.experts import TileSource, decode_tile
from pipeline.stages.routing import sort_by_expert
from pipeline.stages.stream import LayerStream
from pipeline.stages.tiling import tiles

SCRIPTS = Path(__file__).parents[1]
GROUP = 128
RUNS: dict[str, dict[str, Any]] = {
    "first": {},
    "again": {},
    "outputs alike": {"output_weighting": False},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Decode = Callable[[range], tuple[Tensor, Tensor]]
"""A tile's experts -> gate_up [E, 2 * inner, hidden] and down [E, hidden, inner]."""


def prepare(args: argparse.Namespace) -> None:
    """The source in NF4 and in BF16, and the tokens."""
    work: Path = args.work
    model = MODELS["qwen3-next-80b"].cut(1, args.experts)
    threads = os.cpu_count() or 1
    write_checkpoint(model, work / "source", seed=0, headers_only=False, threads=threads)
    checkpoint = Checkpoint.open(work / "source")
    dense = work / "dense"
    dense.mkdir()
    tensors = {n: checkpoint.load(n, DEVICE, torch.bfloat16).cpu() for n in checkpoint.weights}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (dense / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(work / "source")
    texts = SCRIPTS.parent / "calibration"
    calibration = calibration_sequences(
        tokenizer,
        [str(texts / "docs-calib.txt")],
        samples=args.samples,
        length=args.length,
        seed=0,
    )
    unseen = tokenize(tokenizer, read_text(str(texts / "docs-eval.txt")))
    windows = sliding_windows(unseen, args.length, args.length, args.held_out)
    tokens = {"calibration": calibration, "held_out": windows.token_ids}
    save_file(tokens, work / "tokens.safetensors")
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tokens.items())
    print(f"source of {args.experts} experts, tokens: {shapes}", flush=True)


def ours(args: argparse.Namespace) -> None:
    """Convert several times, in one process; the times to a file."""
    settings = ["--samples", str(args.samples), "--length", str(args.length), "--windows", "1"]
    if args.threads:
        settings += ["--threads", str(args.threads)]
    numbers = bench_full_size.arguments(settings)
    found = {}
    with HostPeak() as host:
        times, _ = bench_full_size.time_layers(host, time.perf_counter())
        for name, changed in RUNS.items():
            data = bench_full_size.recipe_of(numbers, args.work / "source", args.work / name)
            data["requantize"] |= changed | {"group_size": GROUP}
            started = time.perf_counter()
            run(parse_recipe(data, name), json.dumps(data), until="shard", quiet=True)
            whole = time.perf_counter() - started
            found[name] = {"seconds": whole, "layer_seconds": times[-2]}
    (args.work / "ours.json").write_text(json.dumps(found))


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """llm-compressor, in its own process and environment."""
    work: Path = args.work
    command = [args.peer_python, "-m", "full_size_peers.peer"]
    command += [str(work / "dense"), str(work / "tokens.safetensors"), str(work / "peer")]
    paths = [*args.peer_path, str(SCRIPTS), str(SCRIPTS.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (work / "peer.log").open("w") as log:
        done = subprocess.run(
            [*command, str(GROUP)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=args.peer_seconds,
            check=False,
        )
    lines = (work / "peer.log").read_text().splitlines()
    if done.returncode:
        print(*lines[-25:], sep="\n")
        raise SystemExit(f"llm-compressor failed ({done.returncode})")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def judge(args: argparse.Namespace) -> None:
    """Mean over experts of the relative output error on held-out tokens, of every result."""
    work: Path = args.work
    source = Checkpoint.open(work / "source")
    architecture = architecture_of(source.config, str(work))
    stream = LayerStream(source, architecture, DEVICE)
    hidden = stream.embed(load_file(work / "tokens.safetensors")["held_out"])
    recorded = stream.record(stream.build_layer(0, stream.load_dense(0)), hidden)
    routed = sort_by_expert(recorded, stream.geometry.experts)

    def of_directory(checkpoint: Checkpoint) -> Decode:
        def found(experts: range) -> tuple[Tensor, Tensor]:
            tile = TileSource(checkpoint, architecture, 0, experts, DEVICE)
            dense = decode_tile(tile, torch.float32)
            return dense.gate_up, dense.down

        return found

    exact = of_directory(source)
    results = {name: of_directory(Checkpoint.open(work / name)) for name in RUNS}
    if (work / "peer").is_dir():
        results["llm-compressor"] = _packed(work / "peer")
    errors: dict[str, list[float]] = {name: [] for name in results}
    with full_float32(), torch.inference_mode():
        for experts in tiles(stream.geometry.experts):
            right = exact(experts)
            made = {name: result(experts) for name, result in results.items()}
            for place, expert in enumerate(experts):
                pairs = slice(routed.offsets[expert], routed.offsets[expert + 1])
                x = routed.inputs[routed.tokens[pairs]].float()
                if not len(x):
                    continue
                wanted = _output(architecture.activation, x, right[0][place], right[1][place])
                for name, (gate_up, down) in made.items():
                    given = _output(architecture.activation, x, gate_up[place], down[place])
                    lost = (given - wanted).square().sum() / wanted.square().sum()
                    errors[name].append(float(lost))
    for name, values in errors.items():
        print(f"output error on held-out tokens, {name:15} {statistics.fmean(values):.6f}")
    print(f"(mean of {len(errors['first'])} experts)")


def _output(
    activation: Callable[[Tensor], Tensor], x: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (activation(gate) * up) @ down.T


def _packed(folder: Path) -> Decode:
    """Experts of a compressed-tensors directory."""
    places: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt", device=str(DEVICE))
        places |= dict.fromkeys(file.keys(), file)

    def matrix(module: str) -> Tensor:
        names = {part: f"{module}.{part}" for part in PARTS}
        return decode({p: places[n].get_tensor(n) for p, n in names.items() if n in places})

    def found(experts: range) -> tuple[Tensor, Tensor]:
        modules = [f"model.layers.0.mlp.experts.{e}" for e in experts]
        gate_up = [torch.cat([matrix(f"{m}.gate_proj"), matrix(f"{m}.up_proj")]) for m in modules]
        return torch.stack(gate_up), torch.stack([matrix(f"{m}.down_proj") for m in modules])

    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory that is not there")
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=16, help="windows to judge on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-path", nargs="*", default=[], help="where llm-compressor lies")
    parser.add_argument("--peer-seconds", type=float, default=150)
    parser.add_argument("--ours-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """All steps; ours in a child, so that the GPU is free for the other side."""
    args = arguments(argv)
    if args.ours_only:
        ours(args)
        return
    args.work.mkdir(parents=True)  # not one that is there: it is deleted in the end
    prepare(args)
    given = list(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "full_size_peers.compare", *given, "--ours-only"]
    subprocess.run(command, check=True)
    timed = json.loads((args.work / "ours.json").read_text())
    for name, seconds in timed.items():
        print(f"ours, {name:15} {seconds['seconds']:.2f} s, the layer {seconds['layer_seconds']}")
    sys.stdout.flush()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    try:
        figures = peer(args)
        print("llm-compressor", json.dumps({k: figures[k] for k in sorted(figures)}))
        again = timed["again"]
        spent = figures["solve_seconds"] + figures["save_seconds"]
        for what in ("seconds", "layer_seconds"):
            times = f"{spent:.1f} s against {again[what]:.2f} s ({what})"
            print(f"weights to files: {times}: {spent / again[what]:.1f} times", flush=True)
    except subprocess.TimeoutExpired:
        print(f"llm-compressor took more than {args.peer_seconds} s", flush=True)
    judge(args)
    shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
