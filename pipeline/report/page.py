"""HTML pages that open from a disk: one file, no script, nothing loaded from anywhere.

`templates/base.html.j2` is the frame of every page and `parts.html.j2` what pages are made of.
Everything that is put into a template is escaped, unless it is `Markup` that this package made;
a content security policy in the frame makes browsers refuse whatever would still slip through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import __version__
from pipeline.report.figures import Picture


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row, columns from `numbers` on align right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, what to read from it, and pictures (with their numbers) and tables below."""

    id: str
    title: str
    lead: str
    pictures: Sequence[tuple[Picture, Table | None]] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[tuple[str, str | Table]] = ()
    """Long texts and tables, each under its name."""
    columns: bool = False
    """Whether pictures and tables are small enough to stand side by side."""


def render(template: str, **values: object) -> str:
    """A page from a template of this package, which extends base.html.j2."""
    return _environment().get_template(template).render(version=__version__, **values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
