"""A night as a table, JSON, JUnit XML and Markdown; page.py makes its page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline.checkpoint.writer import write_bytes, write_json
from pipeline.nightly.history import Record
from pipeline.progress import duration, size

if TYPE_CHECKING:
    from pipeline.nightly.night import Night

COLUMNS = (
    ("perplexity ratio", "perplexity_ratio", "{:.4f}"),
    ("KL", "kl_divergence", "{:.5f}"),
    ("decode, tok/s", "decode_tokens_per_second", "{:.1f}"),
    ("prefill, tok/s", "prefill_tokens_per_second", "{:.0f}"),
)
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, escaped or not."""


def line(record: Record) -> str:
    """One job's night in one line."""
    words = [f"{record['job']}: {verdict(record)}", *record["reasons"], *record["watched"]]
    return "; ".join(words)


def verdict(record: Record) -> str:
    """Outcome and what is special about it: `regression (new)`."""
    outcome, state = record["outcome"], record["state"]
    return str(outcome) if state == outcome else f"{outcome} ({state})"


def headline(night: Night) -> str:
    """All jobs in one line: `5 jobs: 2 ok, 2 regression, 1 broken`."""
    counts = Counter(record["outcome"] for record in night.records)
    parts = [f"{counts[o]} {o}" for o in ("ok", "regression", "broken") if counts[o]]
    jobs = "1 job" if len(night.records) == 1 else f"{len(night.records)} jobs"
    return f"{jobs}: {', '.join(parts)}"


def cells(record: Record) -> list[str]:
    """A job's row, without its name and verdict: figures, load time, memory, time taken."""
    figures = {name: v for name, v in record["figures"].items() if v is not None}
    found = [fmt.format(figures[n]) if n in figures else "" for _, n, fmt in COLUMNS]
    found.append(duration(figures["load_seconds"]) if "load_seconds" in figures else "")
    found.append(size(figures["peak_host_bytes"]) if "peak_host_bytes" in figures else "")
    return [*found, duration(record["seconds"])]


HEAD = ("job", "result", *(title for title, _, _ in COLUMNS), "load", "memory", "took")


def night_table(night: Night) -> Table:
    """For the terminal; reasons are below it, see `details`."""
    table = Table(title=f"night of {night.started}")
    for number, title in enumerate(HEAD):
        table.add_column(title, justify="left" if number < 2 else "right")
    for record in night.records:
        table.add_row(*(escape(c) for c in (record["job"], verdict(record), *cells(record))))
    return table


def details(night: Night) -> list[str]:
    """Lines that say why, for every job that is not simply well."""
    found = []
    for record in night.records:
        if record["state"] == "ok":
            continue
        found.append(line(record))
        if record["errors"] and record["outcome"] != "broken":
            found.append(f"  the other run: {record['errors'][0]}")
        if record["changed"]:
            found.append(f"  since the last good night: {'; '.join(record['changed'])}")
    return found


def message(night: Night) -> str:
    """For a chat of Slack's kind, which makes links and calls of what stands in angle brackets."""
    text = "\n".join([f"requant nightly, {headline(night)}", *details(night)])
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(night: Night) -> str:
    """For GitHub's step summary."""

    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(map(_text, values)) + " |"

    lines = [f"## {headline(night)}", "", row(HEAD), row(["---"] * len(HEAD))]
    lines += [row([r["job"], verdict(r), *cells(r)]) for r in night.records]
    lines += ["", *(f"- {_text(text.strip())}" for text in details(night)), ""]
    return "\n".join(lines)


def _text(value: str) -> str:
    """Text that Markdown takes for nothing else; names with underscores stay readable."""
    return re.sub(r"([\\`*\[\]<>&|~!])", r"\\\1", value)


def as_dict(night: Night) -> dict[str, Any]:
    """For machines."""
    return {
        "schema": 1,
        "started": night.started,
        "exit_code": night.code,
        "summary": headline(night),
        "notes": list(night.notes),
        "jobs": list(night.records),
    }


def junit(night: Night) -> bytes:
    """JUnit XML as most readers take it: regressions are failures, broken jobs errors."""
    counts = Counter(record["outcome"] for record in night.records)
    suite = ET.Element(
        "testsuite",
        name="requant nightly",
        tests=str(len(night.records)),
        failures=str(counts["regression"]),
        errors=str(counts["broken"]),
        skipped="0",
        time=f"{sum(r['seconds'] for r in night.records):.3f}",
        timestamp=night.started.removesuffix("Z"),
    )
    for record in night.records:
        case = ET.SubElement(
            suite,
            "testcase",
            classname="requant.nightly",
            name=record["job"],
            time=f"{record['seconds']:.3f}",
        )
        properties = ET.SubElement(case, "properties")
        for name, value in record["figures"].items():
            ET.SubElement(properties, "property", name=name, value=str(value))
        if record["outcome"] != "ok":
            kind = "error" if record["outcome"] == "broken" else "failure"
            text = _NOT_XML.sub("?", "\n".join(record["reasons"]))
            ET.SubElement(case, kind, message=text.split("\n")[0], type=record["state"]).text = text
        elif record["state"] != "ok":
            ET.SubElement(case, "system-out").text = _NOT_XML.sub("?", line(record))
    suites = ET.Element("testsuites", name="requant nightly")
    suites.append(suite)
    ET.indent(suites)
    return bytes(ET.tostring(suites, encoding="utf-8", xml_declaration=True))


def write(night: Night) -> None:
    """summary.json, junit.xml and summary.md into the night's folder."""
    write_json(night.folder / "summary.json", as_dict(night))
    write_bytes(night.folder / "junit.xml", junit(night))
    write_bytes(night.folder / "summary.md", markdown(night).encode())
