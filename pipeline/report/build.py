"""report.json: the figures of one validation, with the keys that others rely on.

A report carries a digest of its own, since it is no part of what SHA256SUMS seals: a model can be
validated again, on another machine, without becoming another model.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from typing import Any

from pipeline.evaluate.metrics import Comparison
from pipeline.evaluate.speed import Speed


def measured(comparison: Comparison, speed: Speed, load_seconds: float) -> dict[str, Any]:
    """The figures of a comparison and a speed measurement."""
    interval = comparison.ratio_interval()
    return {
        "source": {"perplexity": comparison.source_perplexity},
        "quantized": {"perplexity": comparison.quantized_perplexity},
        "perplexity_ratio": comparison.perplexity_ratio,
        "perplexity_ratio_interval": [interval.low, interval.high],
        "kl_divergence": comparison.kl_divergence,
        "top1_agreement": comparison.top1_agreement,
        "scored_tokens": int(comparison.windows.count.sum()),
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "load_seconds": load_seconds,
        "peak_host_bytes": speed.peak_host_bytes,
        "peak_device_bytes": speed.peak_device_bytes,
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
        "tokens_min": min(counts),
        "tokens_median": statistics.median(counts),
        "without_tokens": sum(1 for count in counts if count == 0),
    }


def judge(report: Mapping[str, Any], thresholds: Mapping[str, float | None]) -> list[str]:
    """What misses its threshold, in words; empty when the result passes."""
    failures = []
    upper = ("perplexity_ratio", "kl_divergence")
    for name, bound in thresholds.items():
        if bound is None:
            continue
        value = report[name]
        passes = value <= bound if name in upper else value >= bound  # false for NaN
        if not passes:
            side = "above" if name in upper else "below"
            failures.append(f"{name} {value:.4g} is {side} {bound:g}")
    return failures


def with_digest(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with the sha256 of its own canonical JSON under `digest`."""
    plain = {k: v for k, v in report.items() if k != "digest"}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    return {**plain, "digest": hashlib.sha256(canonical).hexdigest()}
