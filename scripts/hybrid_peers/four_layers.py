"""Four layers of Qwen3-Next-80B's true geometry: transformers' dense model beside ours.

    PYTHONPATH=scripts .venv/bin/python -m hybrid_peers.four_layers SIDE DIR --threads 2

SIDE is `dense`: transformers' own model in bfloat16, all on the CPU, as people run it who hide
their GPU; `ours`: experts in int4 on the CPU, the rest on it too; or, where there is a GPU,
`accelerate`: the dense model, its experts where `device_map` says "cpu", the rest on the GPU, and
`hybrid`: ours with experts zero-copy, both held to `--device-memory`.  All sides have the same
weights: the dense one holds the values that ours has codes of.  Whoever comes second also prints
how far its logits behind the prompt are from the first one's, which DIR keeps.  These are one
token's, behind four routers that decide near-ties by a bit: rounding to bfloat16 elsewhere moves
them by 0.02 to 0.3, another model by 1.  `same_layers.py` tells whether the layers are the same.

The head of 151,936 rows is left out of the four layers (it is cut to 1,024) and timed by itself, so
that a step of 48 layers is 12 times the four and one head; that figure is labelled as scaled.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from bench_hybrid import limit_memory
from hybrid_model import SCHEME, build, random_records, without_experts
from synthetic_geometries import MODELS
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybrid_peers.timing import Plain, prompt, say, speeds
from pipeline.hybrid.decode import Decoder
from pipeline.hybrid.runtime import connect
from pipeline.models.skeleton import build_skeleton
from pipeline.sizes import parse_size

LAYERS, FULL, VOCABULARY = 4, 48, 1024
STEPS = 16
GEOMETRY = MODELS["qwen3-next-80b"]
STACKS = 2
"""Stacks of experts of the dense model on the CPU, 3.2 GB each: layers 0 and 2 share one, 1 and 3
the other.  Between two uses of one lie 126 MB of other experts' weights, which no cache holds, so
that this takes as long as four would, in 7 GB of RAM."""
CHUNK = 32
"""Experts dequantised at once."""


def dense(experts: int, own: int, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The dense model on the CPU; `own`: stacks of experts, which the layers take in turns."""
    model = without_experts(LAYERS, experts, torch.device("cpu"), VOCABULARY)
    for parameter in model.parameters():  # buffers stay what they are
        parameter.data = parameter.data.to(dtype)
    first = _dequantised(experts, dtype)
    stacks = [first, *([stack.clone() for stack in first] for _ in range(own - 1))]
    bare = build_skeleton(model.config, dtype)
    for number, (layer, meta) in enumerate(zip(model.model.layers, bare.model.layers, strict=True)):
        module = meta.mlp.experts
        mine = stacks[number % own]
        for name, stack in zip(("gate_up_proj", "down_proj"), mine, strict=True):
            setattr(module, name, nn.Parameter(stack, requires_grad=False))
        layer.mlp.experts = module
    model.config = bare.config
    return model


def _dequantised(experts: int, dtype: torch.dtype) -> list[Tensor]:
    """A layer's experts as transformers stacks them, some at a time."""
    quantized = random_records(experts, GEOMETRY.hidden, GEOMETRY.inner).unpack()
    stacks = [torch.empty(q.shape, dtype=dtype) for q in quantized]
    for stack, part in zip(stacks, quantized, strict=True):
        for first in range(0, experts, CHUNK):
            some = slice(first, first + CHUNK)
            stack[some] = part[some].dequantize(dtype)
    return stacks


def spread(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """accelerate's hooks: experts stay in RAM and travel at every call, the rest is on `device`."""
    return dispatch_model(model, places(model, device), main_device=str(device))


def places(model: PreTrainedModel, device: torch.device) -> dict[str, str]:
    """The device map, module by module: one that names a whole layer would take its experts too."""
    found = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"))
    for number, layer in enumerate(model.model.layers):
        stem = f"model.layers.{number}."
        found |= dict.fromkeys(stem + name for name, _ in layer.named_children() if name != "mlp")
        found |= dict.fromkeys(f"{stem}mlp.{name}" for name, _ in layer.mlp.named_children())
    return {name: "cpu" if name.endswith("mlp.experts") else str(device) for name in found}


def head_seconds(device: torch.device) -> float:
    """One token through a head of the true size."""
    weight = torch.empty((GEOMETRY.vocabulary, GEOMETRY.hidden), dtype=torch.bfloat16,
                         device=device).normal_(std=0.02)  # fmt: skip
    x = torch.ones((1, GEOMETRY.hidden), dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        (x @ weight.T).max().item()
        best = min(best, time.perf_counter() - started)
    return best


def run(side: str, folder: Path, args: argparse.Namespace) -> None:
    """Build the side, time it, compare."""
    on_gpu = side in ("accelerate", "hybrid")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(f"{side} takes a GPU; dense and ours run without")
    if on_gpu:
        limit_memory(device, parse_size(args.device_memory))
    head = head_seconds(device)
    read: Any
    step: Any
    if side in ("dense", "accelerate"):
        model = dense(args.experts, LAYERS if on_gpu else STACKS)
        plain = Plain(spread(model, device) if on_gpu else model, device)
        read, step = plain.read, plain.step
        how = f"experts by transformers' {model.config._experts_implementation}"
    else:
        model = build(LAYERS, args.experts, device, {"zero-copy" if on_gpu else "cpu": 1.0},
                      vocabulary=VOCABULARY)  # fmt: skip
        if on_gpu:
            connect(model)
            decoder = Decoder(model, 1, 1024)
            read, step = decoder.prefill, decoder.step
        else:  # what `load` gives there
            plain = Plain(model, device)
            read, step = plain.read, plain.step
        how = f"int4, groups of {SCHEME.group_size}"
    ids = prompt(VOCABULARY).to(device)
    wait = torch.cuda.synchronize if on_gpu else _nothing
    speed = speeds(read, step, ids, STEPS, wait)
    full = 1 / (FULL / LAYERS / speed.decode + head)
    note = (
        f"scaled to {FULL} layers: decode {full:.3f}, prefill {speed.prefill * LAYERS / FULL:.1f}; "
        f"head {head * 1e3:.0f} ms; {how}" + _apart(side, read(ids).float().cpu(), folder)
    )
    say(f"{LAYERS} layers, {side}", speed, note)


def _apart(side: str, logits: Tensor, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "logits.pt"
    if not file.is_file():
        torch.save({"side": side, "logits": logits}, file)
        return ""
    known = torch.load(file, weights_only=True)
    apart = float((logits - known["logits"]).norm() / known["logits"].norm())
    return f"; one token's logits {apart:.4f} from {known['side']}'s"


def _nothing() -> None:
    """What there is to wait for on a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["dense", "ours", "accelerate", "hybrid"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=GEOMETRY.experts, help="fewer for a trial")
    parser.add_argument("--device-memory", default="10GiB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        run(args.side, args.folder, args)


if __name__ == "__main__":
    main()
