"""The table and the comparisons with the best peer, from rows as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pipeline.evaluate.metrics import Interval, paired_bootstrap

Row = dict[str, Any]
ROUNDING = "rounding"
ROUNDING_OF = dict.fromkeys(("awq", "asymmetric", "mended"), "rounding asymmetric")
"""Rounding of the same kind of numbers, by family; elsewhere it is `ROUNDING`."""
COMPARED = {
    "ours gptq": ("gptq", "awq", "autoround"),
    "ours awq": ("awq",),
    "ours awq+gptq": ("gptq", "awq", "autoround"),
}
"""Our rows, and the families of peers of which the best must not be better."""
MEASURES = {"kl": "KL, nats per token", "nll": "log perplexity"}


def table(rows: Iterable[Row], source: Row) -> str:
    """One line a row and text, in Markdown."""
    lines = [
        "| group | method | text | perplexity | ratio | KL | top-1 | recovered | MB | s | CPU s"
        " | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| | source | {text} | {found['perplexity']:.4f} | 1 | 0 | 1 | | {_mb(source)} | | | |"
        for text, found in source["texts"].items()
    ]
    rows = list(rows)
    for row in rows:
        if row["error"] is not None:
            lines.append(f"| {row['group']} | {row['method']} | | failed: {row['error']} |")
            continue
        rounding = _find(rows, ROUNDING, row["group"])
        for text, found in row["texts"].items():
            back = recovered(row, rounding, text)
            lines.append(
                f"| {row['group']} | {row['method']} | {text} | {found['perplexity']:.4f}"
                f" | {found['perplexity'] / found['source_perplexity']:.4f} | {found['kl']:.5f}"
                f" | {found['top1']:.4f} | {'' if back is None else f'{back:.0%}'} | {_mb(row)}"
                f" | {row['seconds']:.0f} | {row['cpu_seconds']:.0f}"
                f" | {row['peak_bytes'] / 2**30:.2f} |"
            )
    return "\n".join(lines)


def recovered(row: Row, rounding: Row | None, text: str) -> float | None:
    """Share of rounding's perplexity increase that this row has not; None without rounding."""
    if rounding is None or rounding["error"] is not None:
        return None
    theirs = rounding["texts"][text]
    loss = theirs["perplexity"] - theirs["source_perplexity"]
    return float((theirs["perplexity"] - row["texts"][text]["perplexity"]) / loss)


def against_rounding(rows: Iterable[Row], source: Row) -> str:
    """What every row wins back of the losses of rounding to numbers of the same kind: Markdown."""
    rows = [row for row in rows if row["error"] is None]
    lines = [
        "| group | method | text | rounding | KL, nats per token, less rounding's [95 %]"
        " | perplexity's increase won back [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = ROUNDING_OF.get(row["family"], ROUNDING)
        rounding = _find(rows, name, row["group"])
        if rounding is None or row["family"] == "rounding":
            continue
        kind = name.removeprefix(ROUNDING).strip() or "symmetric"
        for text in row["texts"]:
            gap = difference(row, rounding, text, "kl")
            low, high = recovered_interval(row, rounding, source, text)
            lines.append(
                f"| {row['group']} | {row['method']} | {text} | {kind}"
                f" | {gap.estimate:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]"
                f" | {recovered(row, rounding, text):.0%} [{low:.0%}, {high:.0%}] |"
            )
    return "\n".join(lines)


def recovered_interval(row: Row, rounding: Row, source: Row, text: str) -> tuple[float, float]:
    """Ends of the 95 % interval of `recovered`: windows drawn with replacement, as elsewhere.

    Where rounding's own loss is not far from 0 beside its noise, the quotient has no useful ends.
    """
    count, ours = (
        torch.tensor(row["texts"][text]["windows"][k]).double() for k in ("count", "nll")
    )
    theirs, dense = (
        torch.tensor(r["texts"][text]["windows"]["nll"]).double() for r in (rounding, source)
    )
    drawn = torch.randint(
        len(count), (2000, len(count)), generator=torch.Generator().manual_seed(0)
    )
    perplexities = [
        (sums[drawn].sum(1) / count[drawn].sum(1)).exp() for sums in (ours, theirs, dense)
    ]
    shares = (perplexities[1] - perplexities[0]) / (perplexities[1] - perplexities[2])
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def difference(ours: Row, theirs: Row, text: str, measure: str) -> Interval:
    """Ours minus theirs per token, with its 95 % interval: paired bootstrap over windows."""
    a, b = (torch.tensor(r["texts"][text]["windows"][measure]) for r in (ours, theirs))
    count = torch.tensor(ours["texts"][text]["windows"]["count"])
    return paired_bootstrap(a, b, count)


def comparisons(rows: Iterable[Row]) -> str:
    """Ours minus the best peer, for every one of our rows, text and measure, in Markdown."""
    rows = [row for row in rows if row["error"] is None]
    lines = ["| group | ours | text | measure | best peer | ours minus it [95 %] | verdict |"]
    lines.append("|---|---|---|---|---|---|---|")
    for ours in (row for row in rows if row["method"] in COMPARED):
        families = COMPARED[ours["method"]]
        peers = [
            r for r in rows if r["peer"] and r["group"] == ours["group"] and r["family"] in families
        ]
        for text in ours["texts"]:
            for measure, said in MEASURES.items():
                if not peers:
                    continue
                best = min(peers, key=_by(text, measure))
                gap = difference(ours, best, text, measure)
                lines.append(
                    f"| {ours['group']} | {ours['method']} | {text} | {said} | {best['method']}"
                    f" | {gap.estimate:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]"
                    f" | {verdict(gap)} |"
                )
    return "\n".join(lines)


def verdict(gap: Interval) -> str:
    """In words: below 0 is better."""
    if gap.high < 0:
        return "better"
    if gap.low > 0:
        return "**worse**"
    return "no difference seen"


def versions(rows: Iterable[Row]) -> str:
    """Who made the rows, where, and on which days."""
    days: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        where = f"{row['machine']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        days.setdefault((row["version"], where), set()).add(row["date"])
    return "\n".join(
        f"- {version}: {' and '.join(sorted(found))}, {where}"
        for (version, where), found in days.items()
    )


def _by(text: str, measure: str) -> Callable[[Row], float]:
    return lambda row: math.fsum(row["texts"][text]["windows"][measure])


def _find(rows: Iterable[Row], method: str, group: int) -> Row | None:
    return next((r for r in rows if r["method"] == method and r["group"] == group), None)


def _mb(row: Row) -> str:
    return f"{row['bytes'] / 1e6:.1f}"
