"""Verbs that make a model, and those that say beforehand what will come of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.collection import collection_paused
from pipeline.verbs.common import HubModel, Json, Model, RecipeFile, Set, announce, app, finish


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing, and what to do about it.

    \b
    Examples:
      requant doctor
      requant doctor --json
    """
    from pipeline.doctor import advice, examine
    from pipeline.report.tables import pairs_table, show

    found = examine()
    missing = advice(found)
    if as_json:
        typer.echo(json.dumps(found | {"advice": missing}, indent=2))
        return
    what = "one thing to know" if len(missing) == 1 else f"{len(missing)} things to know"
    typer.echo(f"requant works here; {what if missing else 'nothing is missing'}")
    for line in missing:
        typer.echo(f"- {line}")
    show(pairs_table("this machine", found))


@app.command()
def inspect(model: HubModel, as_json: Json = False) -> None:
    """What a model directory is, from its headers alone.

    \b
    Examples:
      requant inspect tests/models/qwen3-next-tiny-nf4
      requant inspect unsloth/Qwen3-Next-80B-A3B-Instruct-bnb-4bit --json
    """
    from pipeline.checkpoint.reader import Checkpoint
    from pipeline.hub.fetch import with_headers
    from pipeline.report.tables import show, summary_table

    summary = Checkpoint.open(with_headers(model)).describe()
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=2))
    else:
        typer.echo(summary.verdict)
        show(summary_table(model, summary))


@app.command()
def plan(recipe: RecipeFile, overrides: Set = None, as_json: Json = False) -> None:
    """What a recipe will do, what of it is done, and what it needs, without doing it.

    \b
    Examples:
      requant plan recipes/demo.yaml
      requant plan recipes/qwen3-next-80b-gptq.yaml --set requantize.group_size=32 --json
    """
    with collection_paused():
        from pipeline.plan import as_dict
        from pipeline.recipe import load_recipe
        from pipeline.report.tables import plan_table, plan_verdict, show
        from pipeline.run import survey

    made = survey(*load_recipe(recipe, overrides or []))
    for remark in made.remarks:
        announce(remark)
    if as_json:
        typer.echo(json.dumps(as_dict(made), indent=2))
    else:
        typer.echo(plan_verdict(made))
        show(plan_table(made))


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Set = None,
    until: Annotated[
        str | None,
        typer.Option(help="last stage: dequantize, requantize, shard, validate, publish"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="the one stage to run, those before it being done")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget earlier work")] = False,
    as_json: Json = False,
) -> None:
    """Convert, split, validate.  Resumes by itself.

    \b
    Examples:
      requant run recipes/demo.yaml
      requant run recipes/qwen3-next-80b-gptq.yaml --until shard
      requant run recipes/demo.yaml --set output.path=out/g32 --set requantize.group_size=32
    """
    with collection_paused():
        from pipeline.recipe import load_recipe
        from pipeline.report.build import PAGE_FILE, REPORT_FILE, existing_report
        from pipeline.run import run as execute

    wanted, text = load_recipe(recipe, overrides or [])
    context = execute(
        wanted,
        text,
        until=until,
        only=only,
        fresh=fresh,
        announce=announce,
    )
    report = existing_report(context.output)
    if report is None or (until or only or "validate") not in ("validate", "publish"):
        place = context.work.root if context.work.begun else context.output
        typer.echo(json.dumps({"result": str(place)}) if as_json else f"result: {place}")
        return
    finish(report, as_json, context.output / REPORT_FILE, context.output / PAGE_FILE)


@app.command()
def shard(
    model: Model,
    output: Annotated[Path, typer.Option(help="new directory for the split model")],
) -> None:
    """Split an existing quantised model into non-expert and expert files, to run it hybrid.

    \b
    Examples:
      requant shard models/Qwen3-Next-80B-GPTQ --output out/split
    """
    from pipeline.stages.shard import split_existing

    split_existing(model, output, announce)
    typer.echo(f"result: {output}")
