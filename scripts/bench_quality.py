"""What quantisation costs on the shipped model: one table from one source and one set of texts.

    python scripts/bench_quality.py [--groups 128,32] [--output DIR] [--json FILE]

Every row is a full conversion by `pipeline.run`.  Source and results go through one evaluator, the
streaming pass in float32 over dequantised weights, so that only the weights differ: in bf16 the
noise of the arithmetic is as large as the effect on this model.  "recovered" is the part of
rounding's loss that GPTQ wins back, rounding having the same scale search; intervals are paired
bootstraps over windows of text.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from pipeline.calibration import load_tokenizer, read_text, tokenize
from pipeline.checkpoint.reader import Checkpoint
from pipeline.evaluate.metrics import Comparer, Comparison, Interval, paired_bootstrap
from pipeline.evaluate.reference import Reference
from pipeline.evaluate.windows import sliding_windows
from pipeline.models.skeleton import architecture_of
from pipeline.recipe import parse_recipe
from pipeline.run import run
from pipeline.stages.source import record_source, stream_logits

RECIPE = Path("recipes/demo.yaml")
TEXTS = {"in": "calibration/docs-eval.txt", "out": "calibration/ood-eval.txt"}
WINDOW, STRIDE, WINDOWS = 512, 256, 192
METHODS = {
    "rounding, min/max": {"method": "rtn", "scale_search": False},
    "rounding": {"method": "rtn"},
    "gptq, as published": {"method": "gptq", "error_correction": False, "refinement_passes": 0},
    "gptq, corrected": {"method": "gptq", "refinement_passes": 0},
    "gptq": {"method": "gptq"},
}


@dataclass(frozen=True)
class Row:
    """One conversion, measured on every text."""

    method: str
    group: int
    seconds: float
    comparisons: dict[str, Comparison]


def references(source: Path) -> dict[str, Reference]:
    """The source's own predictions on every text, streamed."""
    checkpoint = Checkpoint.open(source)
    architecture = architecture_of(checkpoint.config, str(source))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(source)
    recorded = {}
    for name, path in TEXTS.items():
        windows = sliding_windows(tokenize(tokenizer, read_text(path)), WINDOW, STRIDE, WINDOWS)
        labels = {"text": path}
        recorded[name] = record_source(
            checkpoint, architecture, windows, labels, device, torch.float32
        )
    return recorded


def measure(
    method: str, group: int, output: Path, texts: dict[str, Reference], recipe: dict[str, Any]
) -> Row:
    """Convert by one method and compare on every text."""
    wanted = recipe | {
        "output": {"path": str(output)},
        "requantize": recipe["requantize"] | METHODS[method] | {"group_size": group},
    }
    parsed = parse_recipe(wanted, str(RECIPE))
    started = time.perf_counter()
    run(parsed, yaml.safe_dump(wanted), until="shard", quiet=True)
    seconds = time.perf_counter() - started
    return Row(method, group, seconds, {n: evaluate(output, r) for n, r in texts.items()})


def evaluate(model: Path, reference: Reference) -> Comparison:
    """A directory's dequantised weights in float32 against the record."""
    checkpoint = Checkpoint.open(model)
    architecture = architecture_of(checkpoint.config, str(model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparer = Comparer(reference)
    for first, logits in stream_logits(
        checkpoint, architecture, reference.windows, device, torch.float32
    ):
        comparer.add(first, logits)
    return comparer.build()


def recovered(row: Row, rounding: Row, text: str) -> float:
    """Share of rounding's perplexity increase that this row has not."""
    ours, theirs = row.comparisons[text], rounding.comparisons[text]
    loss = theirs.quantized_perplexity - theirs.source_perplexity
    return (theirs.quantized_perplexity - ours.quantized_perplexity) / loss


def kl_gain(row: Row, rounding: Row, text: str) -> Interval:
    """KL of rounding less KL of this row, nats per token, with its interval."""
    a, b = rounding.comparisons[text].windows, row.comparisons[text].windows
    return paired_bootstrap(a.kl, b.kl, a.count)


def show(rows: list[Row]) -> list[dict[str, Any]]:
    """Print the table; returns it as plain data."""
    table = []
    print(
        "| group | method | text | ppl | ratio | KL | top-1 | recovered"
        " | KL won back [95 %] | s |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        rounding = next(r for r in rows if r.group == row.group and r.method == "rounding")
        for text, comparison in row.comparisons.items():
            gain = kl_gain(row, rounding, text)
            entry = {
                "group": row.group,
                "method": row.method,
                "text": text,
                "perplexity": comparison.quantized_perplexity,
                "source_perplexity": comparison.source_perplexity,
                "ratio": comparison.perplexity_ratio,
                "kl": comparison.kl_divergence,
                "top1": comparison.top1_agreement,
                "recovered": recovered(row, rounding, text),
                "kl_won_back": [gain.estimate, gain.low, gain.high],
                "seconds": row.seconds,
            }
            table.append(entry)
            print(
                f"| {row.group} | {row.method} | {text} | {entry['perplexity']:.4f}"
                f" | {entry['ratio']:.4f} | {entry['kl']:.5f} | {entry['top1']:.4f}"
                f" | {entry['recovered']:.0%} | {gain.estimate:+.5f} [{gain.low:+.5f},"
                f" {gain.high:+.5f}] | {row.seconds:.0f} |"
            )
    return table


def main() -> None:
    """Parse arguments, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", default="128,32", help="group sizes, comma separated")
    parser.add_argument("--output", type=Path, help="keep the converted models here")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--samples", type=int, help="calibration sequences")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    if arguments.samples:
        recipe["calibration"]["samples"] = arguments.samples
    source = Path(recipe["source"]["model"])
    cuda = torch.cuda.is_available()
    print(
        f"{time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name() if cuda else 'CPU'},"
        f" torch {torch.__version__}, transformers {transformers.__version__}"
    )
    texts = references(source)
    for name, reference in texts.items():
        print(f"source, {name}: perplexity {reference.perplexity:.4f}, {TEXTS[name]}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        rows = [
            measure(
                method, int(group), folder / f"{method.split(',')[0]}-{i}-g{group}", texts, recipe
            )
            for group in arguments.groups.split(",")
            for i, method in enumerate(METHODS)
        ]
    table = show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    assert all(math.isfinite(entry["perplexity"]) for entry in table)


if __name__ == "__main__":
    main()
