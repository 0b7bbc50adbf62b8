"""index.html of a night: verdict, table, and for each job its trends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.ticker import MaxNLocator

from pipeline.nightly.history import Record
from pipeline.nightly.outputs import HEAD, cells, headline, line, verdict
from pipeline.nightly.rules import FIGURES, Figure
from pipeline.progress import duration
from pipeline.report.build import UPPER
from pipeline.report.figures import ACCENT, BAD, SOFT, Picture, picture
from pipeline.report.page import Section, Table, render

if TYPE_CHECKING:
    from pipeline.nightly.night import Night

SHOWN_NIGHTS = 60
SCALES = {"peak_host_bytes": 2.0**20, "peak_device_bytes": 2.0**20}
"""Bytes are drawn in MiB."""
WORDS = {
    "ok": "All well",
    "regression": "Regression",
    "broken": "Broken",
}


def night_page(night: Night, history: Mapping[str, Sequence[Record]]) -> str:
    """The page as HTML; `history` holds each job's records, tonight's last."""
    badness = list(WORDS).index
    ordered = sorted(night.records, key=lambda record: -badness(record["outcome"]))
    worst = ordered[0]["outcome"]
    counts = Counter(record["state"] for record in night.records)
    special = [f"{counts[state]} {state}" for state in sorted(counts) if state != "ok"]
    sentence = f"{headline(night)}{' (' + ', '.join(special) + ')' if special else ''}."
    sections = [_overview(night)]
    sections += [
        _job(number, record, history[record["job"]][-SHOWN_NIGHTS:])
        for number, record in enumerate(ordered, 1)  # what is bad comes first
    ]
    return render(
        "nightly.html.j2",
        started=night.started.replace("T", " ").replace("Z", " UTC"),
        passed=worst == "ok",
        word=WORDS[worst],
        sentence=" ".join([sentence, *night.notes]),
        tiles=_tiles(night, history),
        sections=sections,
        machine=next(
            (r["machine"]["key"] for r in night.records if r["machine"]["device"]),
            night.records[0]["machine"]["cpu"],
        ),
    )


def _tiles(night: Night, history: Mapping[str, Sequence[Record]]) -> list[tuple[str, str, str]]:
    counts = Counter(record["outcome"] for record in night.records)
    nights = {record["night"] for records in history.values() for record in records}
    commit = night.records[0]["commit"]
    return [
        (f"{counts['ok']} of {len(night.records)}", "jobs well", ""),
        (duration(sum(record["seconds"] for record in night.records)), "taken", ""),
        (str(len(nights)), "nights in the history", ""),
        (night.records[0]["versions"]["requant"], "requant", commit[:12] if commit else ""),
    ]


def _overview(night: Night) -> Section:
    rows = [[record["job"], verdict(record), *cells(record)] for record in night.records]
    return Section(
        "jobs",
        "Jobs",
        "Bad jobs were run twice; figures are those of the last run.  In the trends below, the"
        " dashed line is the median that tonight was compared with, and a cross marks a figure"
        " that made its job fail.",
        tables=[Table("Tonight's jobs", HEAD, rows, numbers=2)],
    )


def _job(number: int, record: Record, past: Sequence[Record]) -> Section:
    found = [trend for figure in FIGURES if (trend := _trend(figure, past)) is not None]
    words = [record["model"] or "", *record["reasons"], *record["watched"]]
    if record["changed"]:
        words.append(f"since the last good night: {', '.join(record['changed'])}")
    facts = [
        ["machine", record["machine"]["key"]],
        ["host", record["machine"]["host"]],
        ["commit", record["commit"] or "none"],
        ["revision", record["revision"] or "none"],
        ["SHA-256 of SHA256SUMS", record["sums"] or "none"],
        ["seed", str(record["seed"])],
        *([name, version] for name, version in record["versions"].items()),
    ]
    return Section(
        f"job-{number}",
        f"{record['job']}: {verdict(record)}",
        "; ".join(word for word in words if word),
        pictures=found,
        folded=[
            ("Environment", Table("What it ran on", ("", "value"), facts, numbers=2)),
            ("Nights", _nights(past)),
        ],
        columns=True,
    )


def _nights(past: Sequence[Record]) -> Table:
    rows = [[r["night"][:16].replace("T", " "), line(r), *cells(r)] for r in reversed(past)]
    return Table("Last nights, newest first", ("night", *HEAD[1:]), rows, numbers=2)


def _trend(figure: Figure, past: Sequence[Record]) -> tuple[Picture, None] | None:
    """One figure's nights on tonight's machine, its median, and where it was a reason to fail."""
    key = past[-1]["machine"]["key"]
    seen = [
        record
        for record in past
        if record["machine"]["key"] == key and record["figures"].get(figure.name) is not None
    ]
    scale = SCALES.get(figure.name, 1.0)
    values = [record["figures"][figure.name] / scale for record in seen]
    if not any(values):
        return None
    # matplotlib's own type of a date: a float, days since 1970
    days = [float(date2num(datetime.fromisoformat(record["night"]))) for record in seen]
    bad = [any(figure.name in reason for reason in record["reasons"]) for record in seen]
    base = past[-1]["baseline"].get(figure.name)
    median = base["median"] / scale if base else None

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        if median is not None:
            ax.axhline(median, color=SOFT, linewidth=1, linestyle="--")
        ax.plot(days, values, color=ACCENT, linewidth=1, marker="o", markersize=3)
        ax.plot(
            [day for day, is_bad in zip(days, bad, strict=True) if is_bad],
            [value for value, is_bad in zip(values, bad, strict=True) if is_bad],
            color=BAD,
            linestyle="",
            marker="X",
            markersize=8,
        )
        low, high = min([*values, median or values[0]]), max([*values, median or values[0]])
        margin = max(0.15 * (high - low), 0.02 * abs(high))
        ax.set_ylim(low - margin, high + margin)
        locator = AutoDateLocator(minticks=2, maxticks=6)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        ax.yaxis.set_major_locator(MaxNLocator(4))

    unit = ", MiB" if figure.name in SCALES else ""
    better = "less" if figure.name in UPPER else "more"
    title = f"{figure.title}{unit} ({better} is better)"
    against = f"; the median before tonight was {median:.5g}" if median is not None else ""
    alt = (
        f"{figure.title}{unit} over {len(seen)} nights, from {min(values):.5g} to"
        f" {max(values):.5g}; tonight {values[-1]:.5g}{against}."
    )
    return picture(title, alt, draw, height=1.9, wide=False), None
