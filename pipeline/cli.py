"""The command line: its entry point, and how errors end it.

Exit codes: 0 done, 1 the result misses its thresholds or is damaged, 2 the user's mistake, 130
stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from pipeline.errors import UserError
from pipeline.secrets import redact_tracebacks, redacted
from pipeline.system_errors import system_errors
from pipeline.verbs import convert, measure, share  # noqa: F401  (each adds its verbs, in this order)
from pipeline.verbs.common import Interrupted, app, stopped_by_sigterm

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script: user errors become one line and exit code 2."""
    # Libraries' own advice (optional kernels that are not installed) says nothing a user can use.
    # transformers sets its loggers' levels anew when it is imported; this switch it leaves alone.
    logging.disable(logging.WARNING)
    redact_tracebacks()
    # Tiles differ in size: without this, much of a GPU's memory is lost between blocks.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        with system_errors(), stopped_by_sigterm():
            app()
    except UserError as error:
        typer.echo(redacted(f"requant: {error}"), err=True)
        sys.exit(2)
    except Interrupted as stopped:
        typer.echo(f"requant: {stopped}", err=True)
        sys.exit(130)
    except KeyboardInterrupt:  # before a verb has begun
        typer.echo("requant: stopped", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
