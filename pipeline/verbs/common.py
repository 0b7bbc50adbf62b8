"""What verbs share: the application, arguments that mean the same everywhere, and how they end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import __version__
from pipeline.secrets import redacted

_RESUMED = {"run", "publish"}
"""Verbs that go on where they were stopped; the others begin anew."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM inside a verb; typer would end the program without a word."""

    def __init__(self, verb: str | None) -> None:
        super().__init__(
            "stopped; the same command goes on from here" if verb in _RESUMED else "stopped"
        )


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, with which systemd and GitHub stop things, end a verb as Ctrl-C does."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  (typer brings its own copy of click)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(ctx.invoked_subcommand) from None


app = typer.Typer(
    name="requant",
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Convert bitsandbytes 4-bit mixture-of-experts models to GPTQ or AWQ and run them hybrid.",
)


RecipeFile = Annotated[Path, typer.Argument(help="a recipe, such as recipes/demo.yaml")]
Model = Annotated[Path, typer.Argument(help="a model directory")]
HubModel = Annotated[
    str, typer.Argument(help="a model directory, or a Hub id: its headers are read, no weights")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override a recipe key: requantize.group_size=32")
]
Memory = Annotated[str, typer.Option(help="GPU memory that may be used, such as 10GiB")]
Placement = Annotated[
    str,
    typer.Option(
        help="auto, cpu, zero-copy, resident, fill, both, or parts: zero-copy:0.5,cpu:0.5"
    ),
]
Native = Annotated[
    bool,
    typer.Option(help="compute experts on the CPU by the compiled kernel, if there, or by torch"),
]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        typer.echo(f"requant {__version__}")
        raise typer.Exit


def announce(line: str) -> None:
    typer.echo(redacted(line), err=True)


def finish(
    report: dict[str, Any], as_json: bool, path: Path | None, page: Path | None = None
) -> None:
    from pipeline.report.optional import MISSING
    from pipeline.report.tables import coverage_table, result_table, show

    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(result_table(report))
        coverage = coverage_table(report)
        if coverage is not None:
            show(coverage)
        if path is not None:
            typer.echo(f"report: {path}")
        if page is not None and page.is_file():
            typer.echo(f"page: {page}")
        elif page is not None:
            announce(MISSING)
        for remark in report["placement"]["remarks"]:
            announce(remark)
        announce(
            "load it with pipeline.hybrid.load; transformers' own loading leaves experts random"
            " unless they are unfused first (docs/other-readers.md)"
        )
    raise typer.Exit(0 if report["passed"] else 1)
