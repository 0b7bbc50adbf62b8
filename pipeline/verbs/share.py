"""Verbs for models that others use: putting them on the Hub, and watching them every night."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from pipeline.verbs.common import Json, Model, announce, app


@app.command()
def publish(
    model: Model,
    repo: Annotated[str, typer.Option(help="ORG/NAME on the Hub")],
    private: Annotated[
        bool, typer.Option("--private", help="a repository that is made is private")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="branch; made where missing")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="as the Hub spells it; else the source's")
    ] = None,
    unvalidated: Annotated[
        bool,
        typer.Option(
            "--unvalidated", help="also without a validation that passed; the card says so"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and write the card only")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put a finished, validated model on the Hub, all at once.  Goes on where it was stopped.

    The token comes from HF_TOKEN or from `hf auth login`.

    \b
    Examples:
      requant publish out/demo --repo acme/demo-gptq --license apache-2.0 --dry-run
      requant publish out/demo --repo acme/demo-gptq --license apache-2.0 --private
      requant publish out/demo --repo acme/demo-gptq --license apache-2.0 --revision g128
    """
    from pipeline.recipe import Publish
    from pipeline.stages.publish import publish_model

    wanted = Publish(repo=repo, private=private, revision=revision, license=licence)
    done = publish_model(model, wanted, announce, unvalidated=unvalidated, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(done, indent=2))
    elif dry_run:
        typer.echo(f"card: {model / 'README.md'}")
    else:
        typer.echo(f"{done['url']} at {done['commit']}" + ("" if done["new"] else ", as it was"))


@app.command()
def nightly(
    targets: Annotated[
        list[str],
        typer.Argument(help="recipes, directories of recipes, model directories, Hub ids"),
    ],
    state: Annotated[
        Path, typer.Option(help="directory of the history, the pages and the logs")
    ] = Path("out/nightly"),
    root: Annotated[
        list[Path] | None,
        typer.Option(help="directory that recipes may name paths in, beside the current one"),
    ] = None,
    accept: Annotated[
        list[str] | None, typer.Option(help="job whose figures of tonight are the new normal")
    ] = None,
    keep_nights: Annotated[int, typer.Option(min=1, help="nights whose pages are kept")] = 30,
    keep_rows: Annotated[int, typer.Option(min=1, help="history rows kept for each job")] = 400,
    as_json: Json = False,
) -> None:
    """Validate models again and compare with their history.

    Exit code 0: all well, 1: a regression, 2: something could not be validated.

    \b
    Examples:
      requant nightly recipes/nightly
      requant nightly out/demo --json
    """
    if any(find_spec(name) is None for name in ("trackio", "matplotlib")):
        raise UserError(
            "nights need trackio and matplotlib: pip install -e '.[nightly]' in requant's checkout"
        )
    from pipeline.nightly.night import run_night
    from pipeline.nightly.outputs import as_dict, details, night_table
    from pipeline.report.tables import show

    night = run_night(
        targets,
        state,
        roots=[Path.cwd(), *(root or [])],
        accept=accept or [],
        keep_nights=keep_nights,
        keep_rows=keep_rows,
        announce=announce,
    )
    if as_json:
        typer.echo(json.dumps(as_dict(night), indent=2))
    else:
        show(night_table(night))
        for line in details(night):
            typer.echo(line)
        typer.echo(f"page: {state / 'latest' / 'index.html'}")
    raise typer.Exit(night.code)
