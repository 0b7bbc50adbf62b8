"""Figures as SVG inside a page: text stays text, and colours follow the page's light or dark theme.

Matplotlib writes colours as numbers.  Each role of the theme has a number of its own here, which
becomes the name of a CSS variable when the figure is written (templates/style.css gives them their
values).  Every figure is drawn twice, for phones and for wide screens; the style sheet shows one.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
ACCENT, SECOND, GOOD, BAD = "#050505", "#060606", "#070707", "#080808"

_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    PAPER: "--paper",
    ACCENT: "--accent",
    SECOND: "--second",
    GOOD: "--good",
    BAD: "--bad",
}

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "requant",  # the same figures give the same page
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.color": ACCENT,
    "patch.facecolor": ACCENT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": "cividis",  # reads the same to people who see few colours
}

NARROW, WIDE = 4.2, 9.0
"""Widths in inches: a phone's and a wide screen's, at a letter size that suits both."""

Draw = Callable[[Sequence[Axes]], None]
"""Draws into the axes of a figure, one below the other."""


@dataclass(frozen=True)
class Picture:
    """A figure with its words: `alt` tells what it shows to whoever cannot see it."""

    title: str
    alt: str
    narrow: Markup
    wide: Markup | None
    """None: the narrow one serves wide screens too."""


def picture(
    title: str, alt: str, draw: Draw, *, height: float = 2.5, rows: int = 1, wide: bool = True
) -> Picture:
    """Draw a figure of `rows` axes, `height` inches in all; `wide`: it is to fill a wide page."""
    narrow = _svg(draw, (NARROW, height), rows, alt)
    return Picture(title, alt, narrow, _svg(draw, (WIDE, height), rows, alt) if wide else None)


def _svg(draw: Draw, size: tuple[float, float], rows: int, alt: str) -> Markup:
    with rc_context(_SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False)
        draw([line[0] for line in axes])
        out = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _themed(out.getvalue(), alt)


def _themed(svg: str, alt: str) -> Markup:
    """Matplotlib's file as an element of a page that may hold many."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    box = svg.partition('viewBox="')[2].partition('"')[0]
    body = svg[svg.index(">") + 1 :]
    own = "f" + hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", body)
    for number, variable in _VARIABLES.items():
        body = body.replace(number, f"var({variable})")
    opening = Markup('<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{}"')
    return opening.format(alt) + Markup(f' viewBox="{box}">{body}')
