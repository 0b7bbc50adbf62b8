"""Ours on the smaller geometry that llama.cpp is compared on, and the same weights for it.

    PYTHONPATH=scripts .venv/bin/python -m hybrid_peers.small_model export DIR
    PYTHONPATH=scripts .venv/bin/python -m hybrid_peers.small_model 32 --threads 2

Qwen3-Next-80B's widths (experts of 2048 x 512, top-10) in 4 layers of 128 experts with a vocabulary
of 8,192; random weights, experts of 4 bits, everything else in bfloat16.  In groups of 32 these are
the codes and scales that `export` leaves as Q4_0; 128 is what our recipes make.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hybrid_model import build, random_records, without_experts
from synthetic_geometries import MODELS

from hybrid_peers.gguf_arrays import BLOCK, export
from hybrid_peers.timing import Plain, prompt, say, speeds
from pipeline.quantize.tensor import AffineScheme

LAYERS, EXPERTS, VOCABULARY = 4, 128, 8192
CPU = torch.device("cpu")
STEPS = 32


def write(folder: Path) -> None:
    """What `llama_side.py write` makes a GGUF file of."""
    geometry = MODELS["qwen3-next-80b"]
    block = random_records(EXPERTS, geometry.hidden, geometry.inner, AffineScheme(4, BLOCK, True))
    model = without_experts(LAYERS, EXPERTS, CPU, VOCABULARY)
    export(model, [block.unpack()] * LAYERS, folder)


def ours(group: int) -> None:
    """Time the CPU's road."""
    scheme = AffineScheme(4, group, True)
    model = build(LAYERS, EXPERTS, CPU, {"cpu": 1.0}, scheme=scheme, vocabulary=VOCABULARY)
    plain = Plain(model, CPU)  # what `load` gives there
    ids = prompt(VOCABULARY)
    speed = speeds(plain.read, plain.step, ids, STEPS, lambda: None)
    say(f"ours, groups of {group}", speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["export", "32", "128"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        if args.what == "export":
            write(args.folder)
        else:
            ours(int(args.what))


if __name__ == "__main__":
    main()
