"""report.html of a model, from the files that lie beside it."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.seal import sealed
from pipeline.checkpoint.writer import sweep, write_bytes
from pipeline.hub.cache import refuse_hub_cache
from pipeline.report import sections, verdict
from pipeline.report.build import PAGE_FILE
from pipeline.report.page import render
from pipeline.report.record import Record, read_record


def write_page(model: Path, to: Path | None = None) -> Path:
    """Write a model's page (to its report.html, or to the file `to`) and return where it lies.

    Raises CheckpointError when the directory holds no usable report, OutputError when the page
    cannot be written.
    """
    path = model / PAGE_FILE if to is None else to
    refuse_hub_cache(path)
    if to is None:
        sweep(model)
    write_bytes(path, sealed(model_page(read_record(model)) + "\n").encode())
    return path


def model_page(record: Record) -> str:
    """The page as HTML."""
    word, sentence = verdict.headline(record.report)
    found = [
        sections.quality(record),
        sections.damage(record),
        sections.experts(record),
        sections.resources(record),
        sections.placement(record),
        sections.environment(record),
        sections.recipe(record),
    ]
    return render(
        "report.html.j2",
        report=record.report,
        word=word,
        sentence=sentence,
        tiles=verdict.tiles(record.report),
        sections=[section for section in found if section is not None],
    )
