"""Draws time and memory against layers and experts from what bench_full_size.py printed.

    python scripts/plot_full_size.py LOG... --output docs/full-size.svg

Takes the lines of JSON out of one log or several; conversions with the same layers, experts and
method count once, the last.  The lines that a run prints layer by layer are drawn too: seconds
since its start, and the most memory so far.  Needs the extra `report` (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = {
    "conversion": "convert_seconds",
    "end to end": "end_to_end_seconds",
}
LAYER = re.compile(
    r"requantize-layer-(\d+) [\d.]+ s, (\d+) s in all, GPU ([\d.]+), host ([\d.]+) GiB"
)
MEMORY = {
    "GPU, reserved": "device_reserved_gib",
    "GPU, in use": "device_gib",
    "host, anonymous": "host_anonymous_gib",
}


def runs_of(logs: Sequence[Path]) -> list[dict[str, Any]]:
    """The figures of each run."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith('{"layers"'):
                run = json.loads(line)
                found[run["layers"], run["experts"], run["method"]] = run
    return list(found.values())


def progress_of(logs: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    """Of the longest run of each method, what it printed after every layer."""
    longest: dict[str, list[dict[str, float]]] = {}
    for log in logs:
        lines: list[dict[str, float]] = []
        for line in log.read_text(encoding="utf-8").splitlines():
            if match := LAYER.match(line):
                numbers = zip(("layers", "seconds", "GPU", "host"), match.groups(), strict=True)
                lines.append({name: float(number) for name, number in numbers})
                lines[-1]["layers"] += 1
            elif line.startswith('{"layers"'):
                method = json.loads(line)["method"]
                longest[method] = max(longest.get(method, []), lines, key=len)
                lines = []
    return longest


def draw(axes: Axes, runs: list[dict[str, Any]], by: str, keys: dict[str, str]) -> None:
    """Figures of runs against their layers or experts."""
    ordered = sorted(runs, key=lambda run: run[by])
    for label, key in keys.items():
        points = [(run[by], run[key]) for run in ordered if key in run]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xlabel(by)
    axes.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> None:
    """Four panels, or two where only layers were varied."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    runs = runs_of(args.logs)
    if not runs:
        parser.error("no figures in these logs")
    mpl.rcParams["svg.hashsalt"] = "requant"  # equal figures, equal bytes
    most = max(run["experts"] for run in runs)
    by_layers = [run for run in runs if run["experts"] == most and run["method"] == "gptq"]
    rounded = [run for run in runs if run["experts"] == most and run["method"] == "rtn"]
    sizes = {run["layers"] for run in runs if run["experts"] != most}
    by_experts = [run for run in runs if run["layers"] in sizes and run["method"] == "gptq"]
    figure = Figure(figsize=(12, 6.4 if by_experts else 3.4), layout="constrained")
    panels = figure.subplots(2 if by_experts else 1, 2, squeeze=False)
    for row, (by, some) in enumerate((("layers", by_layers), ("experts", by_experts))):
        if some:
            draw(panels[row][0], some, by, SERIES)
            draw(panels[row][1], some, by, MEMORY)
            panels[row][0].set_ylabel("seconds")
            panels[row][1].set_ylabel("GiB")
    for method, lines in progress_of(args.logs).items():
        layers = [line["layers"] for line in lines]
        name = {"rtn": "rounding"}.get(method, method)
        panels[0][0].plot(layers, [x["seconds"] for x in lines], label=f"so far, {name}")
        for what, label in (("GPU", "GPU"), ("host", "host with pinned")):
            panels[0][1].plot(layers, [x[what] for x in lines], label=f"{label} so far, {name}")
    if rounded:
        draw(panels[0][0], rounded, "layers", {"end to end, rounding": "end_to_end_seconds"})
    for panel in panels.flat:
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.set_xlim(left=0)
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
