"""Figures, verdicts and tables."""

import json
import random
import re

import pytest

from pipeline.checkpoint.seal import with_digest
from pipeline.report.build import expert_figures, judge
from pipeline.report.tables import coverage_table, result_table, show

FIGURES = {
    "perplexity_ratio": 1.02,
    "kl_divergence": 0.03,
    "top1_agreement": 0.93,
    "decode_tokens_per_second": 11.0,
}


@pytest.mark.parametrize(
    ("bounds", "failures"),
    [
        ({}, []),
        ({"perplexity_ratio": None, "kl_divergence": None}, []),
        ({"perplexity_ratio": 1.02, "top1_agreement": 0.93}, []),  # the bound itself passes
        ({"perplexity_ratio": 1.01}, ["perplexity_ratio 1.02 is above 1.01"]),
        ({"kl_divergence": 0.02}, ["kl_divergence 0.03 is above 0.02"]),
        ({"top1_agreement": 0.95}, ["top1_agreement 0.93 is below 0.95"]),
        ({"decode_tokens_per_second": 12}, ["decode_tokens_per_second 11 is below 12"]),
    ],
)
def test_verdicts(bounds, failures):
    assert judge(FIGURES, bounds) == failures


def test_not_a_number_never_passes():
    for name in FIGURES:
        assert judge({**FIGURES, name: float("nan")}, {name: 1.0})


def test_experts():
    counts = [[random.randint(0, 50) for _ in range(4)] for _ in range(3)]
    layers = [{"layer": i, "tokens": tokens} for i, tokens in enumerate(counts)]
    flat = sorted(n for tokens in counts for n in tokens)
    found = expert_figures({"method": "gptq", "layers": [*layers, {"layer": 3}]})
    coverage = found.pop("coverage")
    assert [layer["tokens"] for layer in coverage] == counts
    for layer, tokens in zip(coverage, counts, strict=True):
        total = max(sum(tokens), 1)
        assert layer["share"] == pytest.approx([n / total for n in tokens], abs=1e-6)
    assert found == {
        "count": 4,
        "fallback": 0,
        "raised_damping": 0,
        "smallest_scales": 0,
        "tokens_min": flat[0],
        "tokens_median": (flat[5] + flat[6]) / 2,
        "without_tokens": flat.count(0),
    }
    assert expert_figures({"method": "rtn", "layers": layers})["fallback"] == 36
    assert expert_figures({}) == expert_figures({"layers": []}) == {}


def test_digest_notices_any_change():
    report = with_digest({"b": [1, {"c": 2.5}], "a": "\u00fc"})
    assert with_digest(report) == report
    assert with_digest(json.loads(json.dumps(report))) == report
    assert with_digest({**report, "a": "u"})["digest"] != report["digest"]


def test_table_of_a_failed_result(finished, capsys):
    report = finished.report() | {"passed": False, "failures": ["kl_divergence 2 is above 1"]}
    show(result_table(report))
    out = capsys.readouterr().out
    assert "FAILED: kl_divergence 2 is above 1" in out
    assert f"{report['source']['perplexity']:.4f}" in out and "tokens per expert" in out
    report["experts"] = {}  # a model that others made
    show(result_table(report))
    assert "tokens per expert" not in capsys.readouterr().out


def test_coverage_as_a_histogram(capsys):
    """Every expert is in one row, between the bounds that the row names."""
    counts = [[random.choice([0, 1, 5, 70, 900]) for _ in range(8)] for _ in range(3)]
    ranks = [[float(n.bit_length()) for n in tokens] for tokens in counts]
    layers = [
        {"layer": i, "tokens": tokens, "effective_rank": rank}
        for i, (tokens, rank) in enumerate(zip(counts, ranks, strict=True))
    ]
    report = {"experts": expert_figures({"method": "gptq", "layers": layers})}
    show(coverage_table(report))
    flat = [n for tokens in counts for n in tokens]
    rows = [r for r in re.split(r"\n", capsys.readouterr().out) if re.match(r"\W+\d", r)]
    found = 0
    for row in rows:
        low, high, number = re.match(r"\W+([\d,]+)(?: to ([\d,]+))?\W+(\d+)", row).groups()
        first = int(low.replace(",", ""))
        last = int((high or low).replace(",", ""))
        inside = [n for n in flat if first <= n <= last]
        assert int(number) == len(inside) and bool(inside) == ("#" in row)
        if inside:
            assert f" {float(last.bit_length()):.1f} " in row
        found += len(inside)
    assert found == len(flat)
    assert coverage_table({}) is None
