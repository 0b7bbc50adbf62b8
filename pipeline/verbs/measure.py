"""Verbs that look at a finished model: what it is worth, whether it is whole, what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.collection import collection_paused
from pipeline.errors import CheckpointError, OutputError
from pipeline.verbs.common import Json, Memory, Model, Native, Placement, announce, app, finish


@app.command()
def validate(
    model: Model,
    source: Annotated[Path | None, typer.Option(help="directory it was made from")] = None,
    text: Annotated[Path | None, typer.Option(help="with --source: the text to measure on")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="original of the source, to measure against as well")
    ] = None,
    device_memory: Memory = "10GiB",
    placement: Placement = "auto",
    native: Native = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="copy of the report")] = None,
) -> None:
    """Measure perplexity, KL divergence, top-1 agreement and speed of a model, loaded hybrid.

    Checksums are not looked at: `requant verify` does that.

    \b
    Examples:
      requant validate out/demo
      requant validate out/demo --source tests/models/qwen3-next-tiny-nf4 --text my.txt
      requant validate out/demo --reference models/Qwen3-Next-80B-A3B-Instruct
      requant validate out/demo --placement cpu
    """
    with collection_paused():
        from pipeline.checkpoint.writer import write_json
        from pipeline.hub.cache import refuse_hub_cache
        from pipeline.stages.revalidate import revalidate

    if json_file is not None:
        refuse_hub_cache(json_file)
    if json_file is not None and not json_file.parent.is_dir():
        raise OutputError(f"{json_file.parent}, where the report is to go, is not a directory")
    report = revalidate(
        model,
        source,
        text,
        reference,
        device_memory,
        announce,
        placement=placement,
        native=native,
    )
    if json_file is not None:
        write_json(json_file, report)
    finish(report, False, json_file)


@app.command()
def report(
    model: Model,
    output: Annotated[
        Path | None, typer.Option(help="write the page here, not into the model's directory")
    ] = None,
) -> None:
    """Write report.html: what was measured and what was lost, as one page that opens offline.

    \b
    Examples:
      requant report out/demo
      requant report out/demo --output /tmp/demo.html
    """
    from pipeline.report.optional import write_page

    typer.echo(f"page: {write_page(model, output)}")


@app.command()
def verify(model: Model, as_json: Json = False) -> None:
    """Check a finished model: seals, index, names, shapes, packed values, tokenizer, records.

    \b
    Examples:
      requant verify out/demo
      requant verify out/demo --json
    """
    with collection_paused():
        from pipeline.checkpoint.seal import edited_card
        from pipeline.progress import announce_rarely
        from pipeline.stages.verify import verify_model

    if not model.is_dir():
        raise CheckpointError(f"{model} is not a directory")
    problems = verify_model(model, announce_rarely(announce))
    remark = edited_card(model)
    if as_json:
        found = {"ok": not problems, "problems": [str(p) for p in problems]}
        typer.echo(json.dumps(found | {"remarks": [remark] if remark else []}))
    else:
        if remark:
            typer.echo(remark)
        for problem in problems:
            typer.echo(str(problem))
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        typer.echo(f"{model}: {count if problems else 'ok'}")
    raise typer.Exit(1 if problems else 0)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 100,
    device_memory: Memory = "10GiB",
    placement: Placement = "auto",
    native: Native = True,
    follow_use: Annotated[
        bool,
        typer.Option(
            "--follow-use/--static", help="resident experts change with use, or stay as chosen"
        ),
    ] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="tell where experts were and how they were reached")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check SHA256SUMS first")] = False,
) -> None:
    """Continue a text with a model loaded hybrid; prints tokens per second at the end.

    Checksums are not looked at, unless --verify is given: that reads every file once more.

    \b
    Examples:
      requant generate out/demo --prompt "A list is" --max-new-tokens 30
      requant generate out/demo --prompt "A list is" --placement zero-copy --stats
    """
    from pipeline.checkpoint.sums import check_sums
    from pipeline.hybrid.generate import stream_text
    from pipeline.report.tables import show, stats_tables
    from pipeline.threads import use_threads

    if verify and (problems := check_sums(model)):
        raise CheckpointError(f"{model}: {problems[0]}; `requant verify` tells all that is wrong")
    use_threads()
    try:
        made = stream_text(
            model,
            prompt,
            max_new_tokens,
            device_memory,
            sys.stdout,
            placement,
            announce=announce,
            count_use=stats,
            native=native,
            follow_use=follow_use,
        )
    except KeyboardInterrupt:
        typer.echo(err=True)  # ends the line that was being written
        raise
    typer.echo(f"\n{made.decode_rate:.1f} tokens/s", err=True)
    if stats:
        for table in stats_tables(made):
            show(table, err=True)
