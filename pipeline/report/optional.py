"""Pages where the libraries that draw them are installed (the extra `report`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import UserError

MISSING = (
    "no page was drawn, matplotlib is missing: pip install -e '.[report]' in requant's checkout"
)


def page_beside(model: Path) -> Path | None:
    """Write report.html into a model's directory; None where nothing can draw it.

    A conversion of hours does not fail for want of its pictures.
    """
    return write_page(model) if can_draw() else None


def can_draw() -> bool:
    """Whether the extra is installed."""
    return find_spec("matplotlib") is not None


def write_page(model: Path, to: Path | None = None) -> Path:
    """`pipeline.report.model_page.write_page`; UserError where nothing can draw it."""
    if not can_draw():
        raise UserError(MISSING)
    from pipeline.report.model_page import write_page as write  # noqa: PLC0415  (heavy, optional)

    return write(model, to)
