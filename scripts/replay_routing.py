"""Which cache of experts suits a model's routing: records it on text, replays it through policies.

    python scripts/replay_routing.py out/demo calibration/docs-eval.txt --tokens 4096

The model reads the text once in windows; every layer's chosen experts are replayed token by token,
as decoding would meet them, through caches of several sizes.  A hit is a chosen expert that the
cache holds when its token comes.  static: the experts most used in the first half, never changed,
counted on the second half, as are all others; recency: the least recently used goes; frequency:
counts that fade by `--decay` a token, and the least used goes, which may be the one that just came.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import hybrid
from pipeline.calibration import load_tokenizer
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native.experts import NativeExperts

Trace = Sequence[Sequence[int]]
"""One layer: the experts of each token."""


def record(path: Path, text: Path, tokens: int, window: int) -> list[list[list[int]]]:
    """Routing of the text's first `tokens` tokens, by layer and token."""
    ids = torch.tensor([load_tokenizer(path).ids(text.read_text(encoding="utf-8"), special=True)])
    model = hybrid.load(path, device="cpu")
    layers: list[list[list[int]]] = []

    def noting(trace: list[list[int]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: trace.extend(inputs[1].tolist())

    for module in model.modules():
        if isinstance(module, HybridExperts | NativeExperts):
            layers.append([])
            module.register_forward_pre_hook(noting(layers[-1]))
    with torch.inference_mode():
        for piece in ids[0, :tokens].split(window):
            model(input_ids=piece.unsqueeze(0), use_cache=False, logits_to_keep=1)
    return layers


def static(trace: Trace, size: int) -> float:
    """Hit rate on the second half with the most used experts of the first."""
    half = len(trace) // 2
    uses = torch.tensor(trace[:half]).flatten().bincount()
    kept = set(uses.argsort(descending=True)[:size].tolist())
    return _rate([sum(e in kept for e in chosen) for chosen in trace[half:]], trace)


def recency(trace: Trace, size: int) -> float:
    """Hit rate on the second half; every miss comes in, the least recently used goes."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for chosen in trace:
        hits.append(sum(e in cache for e in chosen))
        for expert in chosen:
            cache[expert] = None
            cache.move_to_end(expert)
        while len(cache) > size:
            cache.popitem(last=False)
    return _rate(hits[len(trace) // 2 :], trace)


def frequency(trace: Trace, size: int, decay: float) -> float:
    """Hit rate on the second half; the cache holds the largest fading counts."""
    counts: dict[int, float] = {}
    cache: set[int] = set()
    hits = []
    worth = 1.0  # of a use now: it grows instead of all others fading
    for chosen in trace:
        hits.append(sum(e in cache for e in chosen))
        worth /= decay
        for expert in chosen:
            counts[expert] = counts.get(expert, 0.0) + worth
            cache.add(expert)
        while len(cache) > size:
            cache.remove(min(cache, key=counts.__getitem__))
        if worth > 1e200:
            counts = {expert: value / worth for expert, value in counts.items()}
            worth = 1.0
    return _rate(hits[len(trace) // 2 :], trace)


def _rate(hits: Sequence[int], trace: Trace) -> float:
    return sum(hits) / (len(hits) * len(trace[0]))


def main() -> None:
    """Print one table: part of experts held against each policy's mean hit rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--decay", type=float, nargs="+", default=[0.9, 0.99, 0.999])
    parser.add_argument("--held", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    arguments = parser.parse_args()
    layers = record(arguments.model, arguments.text, arguments.tokens, arguments.window)
    experts = 1 + max(e for trace in layers for chosen in trace for e in chosen)
    print(
        f"{len(layers)} layers, {experts} experts, {len(layers[0][0])} chosen, "
        f"{len(layers[0])} tokens, the second half counted"
    )
    names = ["static", "recency", *(f"frequency {decay}" for decay in arguments.decay)]
    print("held   " + "  ".join(f"{name:>15}" for name in names))
    for part in arguments.held:
        size = max(1, round(part * experts))
        rates = [
            [static(trace, size), recency(trace, size)]
            + [frequency(trace, size, decay) for decay in arguments.decay]
            for trace in layers
        ]
        means = torch.tensor(rates).mean(0).tolist()
        print(f"{size:4d}   " + "  ".join(f"{mean:15.3f}" for mean in means))


if __name__ == "__main__":
    main()
