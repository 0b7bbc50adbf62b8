"""How fast NF4 experts are decoded: a whole stack at once against bitsandbytes matrix by matrix.

Both are measured in one run, in turns, and give the same bytes, which is checked.  `decode` starts
from packed tensors on the device, `load` from a checkpoint on disk (in the page cache, where a
fresh file is): reading, decoding and stacking.  GB/s count the decoded bytes.

    python scripts/bench_dequantize.py [--device cuda] [--experts 512]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.writer import write_safetensors

MARK = "quant_state.bitsandbytes__nf4"


def make_checkpoint(directory: Path, experts: int, rows: int, columns: int) -> list[str]:
    """One projection of a layer's experts, NF4 with double quantisation, as on disk."""
    tensors: dict[str, Tensor] = {}
    names = [f"model.layers.0.mlp.experts.{i}.gate_proj.weight" for i in range(experts)]
    for name in names:
        weight = torch.randn(rows, columns, dtype=torch.bfloat16)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        tensors[name] = packed
        tensors |= {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))
    return names


def one_by_one(
    stored: list[tuple[Tensor, bnb.QuantState]],
) -> Tensor:
    """bitsandbytes on each matrix, then one stack."""
    return torch.stack([bnb.dequantize_4bit(packed, state) for packed, state in stored])


def read_one_by_one(path: Path, names: list[str], device: str) -> Tensor:
    """What a loader without batches does: safetensors, a QuantState and a call a matrix."""
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", MARK)
    stored = []
    with safe_open(path, "pt") as file:
        for name in names:
            table = {part: file.get_tensor(f"{name}.{part}") for part in parts}
            state = bnb.QuantState.from_dict(table, torch.device(device))
            stored.append((file.get_tensor(name).to(device), state))
    return one_by_one(stored)


def timed(work: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds, and the result."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def compare(
    title: str, single: Callable[[], Tensor], batched: Callable[[], Tensor], device: str, turns: int
) -> None:
    """Run both in turns and print medians, throughput and their ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    nbytes = 0
    for turn in range(turns + 1):
        first, a = timed(single, device)
        second, b = timed(batched, device)
        if not torch.equal(a, b):
            raise SystemExit(f"{title}: the two results differ")
        nbytes = a.nbytes
        if turn:  # the first turn warms caches up
            seconds[0].append(first)
            seconds[1].append(second)
    alone, together = (statistics.median(values) for values in seconds)
    print(
        f"{title}: one by one {alone * 1e3:.1f} ms ({nbytes / alone / 1e9:.2f} GB/s), batched "
        f"{together * 1e3:.1f} ms ({nbytes / together / 1e9:.2f} GB/s), ratio "
        f"{alone / together:.2f}"
    )


def main() -> None:
    """Make a layer's projection on disk, then measure decoding and loading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place)
        names = make_checkpoint(path, args.experts, args.rows, args.columns)
        checkpoint = Checkpoint.open(path)
        weights = [checkpoint.weights[name] for name in names]
        parts = checkpoint.load_parts(names, args.device)
        stored = []
        for i, name in enumerate(names):
            table = {p: t[i].clone() for p, t in parts.items() if p != "weight"}
            table[MARK] = checkpoint.read(f"{name}.{MARK}")
            state = bnb.QuantState.from_dict(table, torch.device(args.device))
            stored.append((parts["weight"][i].clone(), state))
        layout = weights[0].state
        assert layout is not None
        print(
            f"{args.experts} x [{args.rows}, {args.columns}] NF4 double on {args.device}, "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads"
        )
        compare(
            "decode",
            lambda: one_by_one(stored),
            lambda: FORMATS["bnb4"].decode(weights, layout, parts),
            args.device,
            args.turns,
        )
        compare(
            "load",
            lambda: read_one_by_one(path / "model.safetensors", names, args.device),
            lambda: checkpoint.load_stack(names, args.device),
            args.device,
            args.turns,
        )


if __name__ == "__main__":
    main()
