"""report.json: the figures of one validation, with the keys that others rely on.

A report carries a digest of its own, since it is no part of what SHA256SUMS seals: a model can be
validated again, on another machine, without becoming another model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.seal import with_digest
from pipeline.checkpoint.untrusted import parse_table
from pipeline.errors import CheckpointError
from pipeline.evaluate.metrics import Comparison, paired_bootstrap
from pipeline.evaluate.speed import Speed

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

UPPER = (
    "perplexity_ratio",
    "kl_divergence",
    "load_seconds",
    "peak_host_bytes",
    "peak_device_bytes",
)
"""Figures of which less is better; a threshold bounds them from above, all others from below."""


def measured(comparison: Comparison, speed: Speed, load_seconds: float) -> dict[str, Any]:
    """The figures of a comparison and a speed measurement."""
    windows = comparison.windows
    nothing = torch.zeros_like(windows.kl)

    def interval(sums: Tensor, against: Tensor, exponent: bool = False) -> list[float]:
        found = paired_bootstrap(sums, against, windows.count)
        ends = [found.low, found.high]
        return [math.exp(end) for end in ends] if exponent else ends

    source, quantized = windows.source_nll, windows.quantized_nll
    return {
        "source": {
            "perplexity": comparison.source_perplexity,
            "interval": interval(source, nothing, exponent=True),
        },
        "quantized": {
            "perplexity": comparison.quantized_perplexity,
            "interval": interval(quantized, nothing, exponent=True),
        },
        "perplexity_ratio": comparison.perplexity_ratio,
        "perplexity_ratio_interval": interval(quantized, source, exponent=True),
        "kl_divergence": comparison.kl_divergence,
        "kl_divergence_interval": interval(windows.kl, nothing),
        "top1_agreement": comparison.top1_agreement,
        "top1_agreement_interval": interval(windows.agreed, nothing),
        "scored_tokens": int(comparison.windows.count.sum()),
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "load_seconds": load_seconds,
        "peak_host_bytes": speed.peak_host_bytes,
        "peak_device_bytes": speed.peak_device_bytes,
    }


def reference_figures(
    name: str | None, comparison: Comparison, others: Sequence[Comparison]
) -> dict[str, Any] | None:
    """The result against the original that the source was made from; None where it was not given.

    `others`: at most one comparison, on the windows of `comparison`, the one with the source.
    """
    if not others:
        return None
    other = others[0]
    interval = other.ratio_interval()
    return {
        "name": name,
        "perplexity": other.source_perplexity,
        "source_perplexity_ratio": comparison.source_perplexity / other.source_perplexity,
        "perplexity_ratio": other.perplexity_ratio,
        "perplexity_ratio_interval": [interval.low, interval.high],
        "kl_divergence": other.kl_divergence,
        "top1_agreement": other.top1_agreement,
    }


def expert_figures(conversion: Mapping[str, Any]) -> dict[str, Any]:
    """Token counts per expert over all layers, and matrices that plain rounding solved."""
    layers = [layer for layer in conversion.get("layers", []) if "tokens" in layer]
    counts = [count for layer in layers for count in layer["tokens"]]
    if not counts:
        return {}
    rounded = conversion.get("method") == "rtn"
    return {
        "count": len(layers[0]["tokens"]),
        "fallback": 3 * len(counts) if rounded else 0,
        "raised_damping": sum(layer.get("raised_damping", 0) for layer in layers),
        "smallest_scales": sum(layer.get("smallest_scales", 0) for layer in layers),
        "tokens_min": min(counts),
        "tokens_median": statistics.median(counts),
        "without_tokens": sum(1 for count in counts if count == 0),
        "coverage": [_coverage(layer) for layer in layers],
    }


def _coverage(layer: Mapping[str, Any]) -> dict[str, Any]:
    """What each expert of a layer saw, in the experts' order: tokens, their share of the layer's
    (token, expert) pairs, and the effective rank of its inputs (`quantize.hessian`)."""
    pairs = max(sum(layer["tokens"]), 1)
    return {
        "layer": layer["layer"],
        "tokens": layer["tokens"],
        "share": [round(count / pairs, 6) for count in layer["tokens"]],
        "effective_rank": layer.get("effective_rank", []),
    }


def judge(report: Mapping[str, Any], thresholds: Mapping[str, float | None]) -> list[str]:
    """What misses its threshold, in words; empty when the result passes."""
    failures = []
    for name, bound in thresholds.items():
        if bound is None:
            continue
        value = report[name]
        passes = value <= bound if name in UPPER else value >= bound  # false for NaN
        if not passes:
            side = "above" if name in UPPER else "below"
            failures.append(f"{name} {value:.4g} is {side} {bound:g}")
    return failures


def existing_report(model: Path) -> dict[str, Any] | None:
    """The report beside a model, if there is one with a digest that fits."""
    path = model / REPORT_FILE
    try:
        report = parse_table(path.read_bytes(), REPORT_FILE)
        return report if with_digest(report) == report else None
    except (OSError, CheckpointError):
        return None
