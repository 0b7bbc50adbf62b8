"""What a report says first: the verdict, and the figures that people ask for."""

from __future__ import annotations

from pipeline.progress import duration, size
from pipeline.report.record import Report
from pipeline.report.words import percent

WORDS = {
    "perplexity_ratio": "perplexity ratio",
    "kl_divergence": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "decode_tokens_per_second": "decode speed",
}


def headline(report: Report) -> tuple[str, str]:
    """The verdict in a word and in a sentence."""
    change = report.perplexity_ratio - 1
    low, high = (bound - 1 for bound in report.perplexity_ratio_interval)
    measured = (
        f"Perplexity is {percent(abs(change))} {'above' if change >= 0 else 'below'} that of"
        f" {report.baseline} (95 % interval {percent(low, sign=True)} to"
        f" {percent(high, sign=True)}), and the likeliest next token is the same at"
        f" {percent(report.top1_agreement, 1)} of {report.scored_tokens:,} positions."
    )
    if not report.passed:
        missed = "; ".join(map(_in_words, report.failures))
        return "Failed", f"{missed[:1].upper()}{missed[1:]}. {measured}"
    judged = any(bound is not None for bound in report.thresholds.values())
    return ("Passed" if judged else "Measured, not judged"), measured


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures that people ask for first: value, name, a word on it."""
    on_gpu = report.machine.get("device", "cpu") != "cpu"
    where = f"on {report.machine['device']}" if on_gpu else "on the CPU"
    memory = f"loaded in {duration(report.load_seconds)}"
    if report.peak_device_bytes:
        memory = f"and {size(report.peak_device_bytes)} on the GPU"
    low, high = report.perplexity_ratio_interval
    return [
        (f"{report.perplexity_ratio:.4f}", "perplexity ratio", f"{low:.4f} to {high:.4f}"),
        (f"{report.kl_divergence:.4f}", "KL divergence", "nats per token"),
        (percent(report.top1_agreement, 1), "top-1 agreement", "with the source"),
        (f"{report.decode_tokens_per_second:,.1f}", "tokens/s, decoding", where),
        (f"{report.prefill_tokens_per_second:,.0f}", "tokens/s, reading", where),
        (size(report.peak_host_bytes), "host memory, peak", memory),
    ]


def _in_words(failure: str) -> str:
    """A failure without its figure's key; other texts as they are."""
    key, space, rest = failure.partition(" ")
    return f"{WORDS.get(key, key)}{space}{rest}"
