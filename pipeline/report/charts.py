"""The pictures of a model's report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from pipeline.progress import duration, size
from pipeline.report.figures import ACCENT, BAD, INK, LINE, SECOND, SOFT, Picture, picture
from pipeline.report.record import LayerRecord
from pipeline.report.words import percent

NONE_COLOUR = "#d0392b"
"""Experts without a token on a map; pictures made of pixels know no theme."""


def loss_by_layer(layers: Sequence[LayerRecord]) -> Picture:
    """Median loss of a layer's experts with the range of eight in ten of them."""
    numbers = [layer.layer for layer in layers]
    lines = {
        "gate and up": (ACCENT, "-", [sorted(layer.gate_up_loss) for layer in layers]),
        "down": (SECOND, "--", [sorted(layer.down_loss) for layer in layers]),
    }

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        for name, (colour, dash, losses) in lines.items():
            low, middle, high = (
                [float(np.quantile(found, part)) for found in losses] for part in (0.1, 0.5, 0.9)
            )
            ax.fill_between(numbers, low, high, color=colour, alpha=0.18, linewidth=0)
            marker = "o" if len(numbers) <= 12 else ""
            ax.plot(numbers, middle, dash, color=colour, label=name, marker=marker, markersize=3)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layer")
        ax.set_ylabel("energy lost")
        ax.yaxis.set_major_formatter(lambda value, _position: percent(value))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    worst = max(layers, key=lambda layer: statistics.median(layer.down_loss))
    alt = (
        f"Loss by layer over {len(layers)} layers; the median expert's down matrix loses most in"
        f" layer {worst.layer}: {percent(statistics.median(worst.down_loss))}."
    )
    return picture("Loss by layer: median expert, and the range of eight in ten", alt, draw)


def loss_by_class(losses: Mapping[str, Sequence[float]]) -> Picture:
    """Median loss of each class of modules, whiskers to the tenth lowest and highest."""
    names = list(losses)
    middle = [statistics.median(losses[name]) for name in names]
    ends = [[float(np.quantile(losses[name], part)) for name in names] for part in (0.1, 0.9)]

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        ax.grid(False)
        ax.barh(names, middle, height=0.55, color=ACCENT)
        for row, (low, high) in enumerate(zip(*ends, strict=True)):
            ax.plot([low, high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=6)
            ax.annotate(
                percent(middle[row]), (high, row), (6, 0), textcoords="offset points", va="center"
            )
        ax.margins(x=0.2)
        ax.invert_yaxis()
        _names_only(ax)

    alt = "; ".join(f"{name}: {percent(value)}" for name, value in zip(names, middle, strict=True))
    height = 0.6 + 0.36 * len(names)
    return picture("Loss by class: median, and eight in ten", alt, draw, height=height, wide=False)


def token_histogram(counts: Sequence[int]) -> Picture:
    """How many experts saw how many tokens; those without any stand apart."""
    seen = [count for count in counts if count]
    none = len(counts) - len(seen)

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        if seen:
            first, last = min(seen), max(seen)
            if last > 10 * first:
                bins = np.geomspace(first, last, 25)
                ax.set_xscale("log")
                _log_ticks(ax.xaxis, first, last)
            else:
                bins = np.linspace(first, max(last, first + 1), 25)
                ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
                ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            ax.hist(seen, bins.tolist(), histtype="stepfilled", color=ACCENT)
            ax.margins(y=0.2)
            middle = max(statistics.median(counts), first)  # a log axis has no zero
            ax.axvline(middle, color=SECOND, linestyle="--", linewidth=1.2)
            ax.annotate(
                f"median {statistics.median(counts):,.0f}",
                (middle, 1),
                (4, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                color=SECOND,
            )
        ax.set_xlabel("tokens of calibration text")
        ax.set_ylabel("experts")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))

    alt = f"{len(counts):,} experts by tokens seen, {none} without any."
    return picture("Experts by the tokens they saw", alt, draw, height=2.3)


def token_map(layers: Sequence[LayerRecord]) -> Picture:
    """Layers by experts, coloured by tokens seen."""
    width = max(len(layer.tokens) for layer in layers)
    grid = np.full((len(layers), width), np.nan)
    for row, layer in enumerate(layers):
        grid[row, : len(layer.tokens)] = layer.tokens
    most = max(float(np.nanmax(grid)), 2.0)
    seen = np.ma.masked_less(np.ma.masked_invalid(grid), 1)  # none seen: drawn in its own colour
    least = min(float(seen.min()) if seen.count() else 1.0, most / 2)

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        ax.grid(False)
        colours = colormaps["cividis"].with_extremes(bad=NONE_COLOUR)
        image = ax.imshow(
            seen, cmap=colours, norm=LogNorm(least, most), aspect="auto", interpolation="none"
        )
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        rows = sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(len(layers), 7))})
        ax.set_yticks(rows, [str(layers[row].layer) for row in rows])
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
        assert bar.solids is not None
        bar.solids.set_rasterized(True)  # else 256 paths
        _log_ticks(bar.ax.yaxis, least, most)
        bar.outline.set_visible(False)
        bar.set_label("tokens")

    alt = f"A map of {len(layers)} layers by {width} experts, coloured by tokens seen."
    title = "Tokens by layer and expert"
    if np.any(grid == 0):
        title += " (red: none)"
    return picture(title, alt, draw, height=min(1.4 + 0.16 * len(layers), 4.2))


def rank_by_layer(layers: Sequence[LayerRecord]) -> Picture:
    """Median effective rank of a layer's experts, the range of eight in ten, and the lowest."""
    numbers = [layer.layer for layer in layers]
    ranks = [layer.effective_rank for layer in layers]

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        low, middle, high = (
            [float(np.quantile(found, part)) for found in ranks] for part in (0.1, 0.5, 0.9)
        )
        ax.fill_between(numbers, low, high, color=ACCENT, alpha=0.18, linewidth=0)
        marker = "o" if len(numbers) <= 12 else ""
        ax.plot(numbers, middle, color=ACCENT, label="median", marker=marker, markersize=3)
        ax.plot(numbers, [min(found) for found in ranks], "v", color=SECOND, label="lowest")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layer")
        ax.set_ylabel("effective rank")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    least = min(layers, key=lambda layer: min(layer.effective_rank))
    alt = (
        f"Effective rank of the experts' inputs over {len(layers)} layers; the lowest is"
        f" {min(least.effective_rank):.1f}, in layer {least.layer}."
    )
    return picture("Effective rank by layer: median, and eight in ten", alt, draw, height=2.3)


def stage_times(seconds: Mapping[str, float], planned: Mapping[str, float]) -> Picture:
    """Seconds of every stage, and what the plan said."""
    names = list(seconds)

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        ax.grid(False)
        thick = 0.38 if planned else 0.55
        for row, name in enumerate(names):
            bars = [(seconds[name], ACCENT, row - (thick / 2 if planned else 0))]
            if name in planned:
                bars.append((planned[name], LINE, row + thick / 2))
            for value, colour, at in bars:
                ax.barh(at, value, height=thick * 0.9, color=colour)
                ax.annotate(
                    duration(value),
                    (value, at),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    color=INK if colour == ACCENT else SOFT,
                    fontsize=8,
                )
        ax.set_yticks(range(len(names)), names)
        ax.margins(x=0.22)
        ax.invert_yaxis()
        _names_only(ax)

    alt = "; ".join(
        f"{name} took {duration(seconds[name])}"
        + (f", planned {duration(planned[name])}" if name in planned else "")
        for name in names
    )
    title = "Time by stage" + (" (grey: planned)" if planned else "")
    return picture(title, alt, draw, height=0.5 + 0.5 * len(names), wide=False)


def placement(ram: Mapping[str, int], gpu: Mapping[str, int], limit: int | None) -> Picture:
    """What lies in RAM and on the GPU, with the GPU's limit."""
    bars = {"RAM": ram} | ({"GPU": gpu} if gpu else {})
    colours = {"experts": ACCENT, "everything else": SECOND, "quantised linear layers": SOFT}

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        ax.grid(False)
        used = set()
        for row, parts in enumerate(bars.values()):
            start = 0
            for name, count in parts.items():
                if count:
                    label = name if name not in used else None
                    ax.barh(row, count, left=start, height=0.5, color=colours[name], label=label)
                    used.add(name)
                    start += count
            ax.annotate(size(start), (start, row), (5, 0), textcoords="offset points", va="center")
        if gpu and limit:
            ax.plot([limit, limit], [0.6, 1.4], color=BAD, linewidth=1.5)
            ax.annotate("limit", (limit, 1), (4, 0), textcoords="offset points", color=BAD)
        ax.set_yticks(range(len(bars)), list(bars))
        ax.margins(x=0.2)
        ax.invert_yaxis()
        _names_only(ax)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    alt = "; ".join(
        f"{place}: " + ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
        for place, parts in bars.items()
    )
    height = 0.9 + 0.45 * len(bars)
    return picture("Where the loaded model lies", alt, draw, height=height, wide=False)


def _log_ticks(axis: Axis, least: float, most: float) -> None:
    """At most five round numbers on a logarithmic axis; its ends where there are none between."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10**power for power in range(12) for step in steps]
        ticks = [tick for tick in ticks if least <= tick <= most]
        if len(ticks) <= 5:
            break
    if len(ticks) < 2:
        ticks = sorted({round(least), round(most)})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def _names_only(ax: Axes) -> None:
    """Bars that bear their numbers need no scale."""
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
