"""The command line: one short function a verb, no logic.

Exit codes: 0 done, 1 the result misses its thresholds or is damaged, 2 the user's mistake.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import __version__
from pipeline.errors import CheckpointError, OutputError, UserError
from pipeline.secrets import redact_tracebacks, redacted
from pipeline.system_errors import system_errors


class Interrupted(Exception):
    """Ctrl-C inside a verb; typer would end the program without a word."""


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  (typer brings its own copy of click)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


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


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        typer.echo(f"requant {__version__}")
        raise typer.Exit


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
    from pipeline.plan import as_dict
    from pipeline.recipe import load_recipe
    from pipeline.report.tables import plan_table, plan_verdict, show
    from pipeline.run import survey

    made = survey(*load_recipe(recipe, overrides or []))
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
    fresh: Annotated[bool, typer.Option(help="forget earlier work")] = False,
    as_json: Json = False,
) -> None:
    """Convert, split, validate.  Resumes by itself.

    \b
    Examples:
      requant run recipes/demo.yaml
      requant run recipes/qwen3-next-80b-gptq.yaml --until shard
      requant run recipes/demo.yaml --set output.path=out/g32 --set requantize.group_size=32
    """
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
        announce=_announce,
    )
    report = existing_report(context.output)
    if report is None or (until or only or "validate") not in ("validate", "publish"):
        place = context.work.root if context.work.begun else context.output
        typer.echo(json.dumps({"result": str(place)}) if as_json else f"result: {place}")
        return
    _finish(report, as_json, context.output / REPORT_FILE, context.output / PAGE_FILE)


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

    split_existing(model, output, _announce)
    typer.echo(f"result: {output}")


@app.command()
def validate(
    model: Model,
    source: Annotated[Path | None, typer.Option(help="directory it was made from")] = None,
    text: Annotated[Path | None, typer.Option(help="with --source: the text to measure on")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="original of the source, to measure against as well")
    ] = None,
    device_memory: Memory = "10GiB",
    json_file: Annotated[Path | None, typer.Option("--json", help="copy of the report")] = None,
) -> None:
    """Measure perplexity, KL divergence, top-1 agreement and speed of a model, loaded hybrid.

    \b
    Examples:
      requant validate out/demo
      requant validate out/demo --source tests/models/qwen3-next-tiny-nf4 --text my.txt
      requant validate out/demo --reference models/Qwen3-Next-80B-A3B-Instruct
    """
    from pipeline.checkpoint.writer import write_json
    from pipeline.hub.cache import refuse_hub_cache
    from pipeline.stages.revalidate import revalidate

    if json_file is not None:
        refuse_hub_cache(json_file)
    if json_file is not None and not json_file.parent.is_dir():
        raise OutputError(f"{json_file.parent}, where the report is to go, is not a directory")
    report = revalidate(model, source, text, reference, device_memory, _announce)
    if json_file is not None:
        write_json(json_file, report)
    _finish(report, False, json_file)


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
    from pipeline.checkpoint.seal import edited_card
    from pipeline.progress import announce_rarely
    from pipeline.stages.verify import verify_model

    if not model.is_dir():
        raise CheckpointError(f"{model} is not a directory")
    problems = verify_model(model, announce_rarely(_announce))
    remark = edited_card(model)
    if as_json:
        found = {"ok": not problems, "problems": [str(p) for p in problems]}
        typer.echo(json.dumps(found | {"remarks": [remark] if remark else []}))
    else:
        if remark:
            typer.echo(remark)
        for problem in problems:
            typer.echo(str(problem))
        typer.echo(f"{model}: {'ok' if not problems else f'{len(problems)} problems'}")
    raise typer.Exit(1 if problems else 0)


@app.command()
def publish(
    model: Model,
    repo: Annotated[str, typer.Option(help="ORG/NAME on the Hub")],
    private: Annotated[bool, typer.Option(help="a repository that is made is private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch; made where missing")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="as the Hub spells it; else the source's")
    ] = None,
    unvalidated: Annotated[
        bool, typer.Option(help="also without a validation that passed; the card says so")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="check everything and write the card only")] = False,
    as_json: Json = False,
) -> None:
    """Put a finished, validated model on the Hub, all at once.  Goes on where it was stopped.

    The token comes from HF_TOKEN or from `hf auth login`.

    Example: requant publish out/demo --repo acme/demo-gptq --dry-run
    """
    from pipeline.recipe import Publish
    from pipeline.stages.publish import publish_model

    wanted = Publish(repo=repo, private=private, revision=revision, license=licence)
    done = publish_model(model, wanted, _announce, unvalidated=unvalidated, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(done, indent=2))
    elif dry_run:
        typer.echo(f"card: {model / 'README.md'}")
    else:
        typer.echo(f"{done['url']} at {done['commit']}" + ("" if done["new"] else ", as it was"))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    device_memory: Memory = "10GiB",
    placement: Annotated[
        str,
        typer.Option(help="cpu, resident, zero-copy, auto, or parts: zero-copy:0.5,cpu:0.5"),
    ] = "cpu",
    verify: Annotated[bool, typer.Option("--verify", help="check SHA256SUMS first")] = False,
) -> None:
    """Continue a text with a model loaded hybrid; prints tokens per second at the end.

    Checksums are not looked at, unless --verify is given: that reads every file once more.

    \b
    Examples:
      requant generate out/demo --prompt "A list is" --max-new-tokens 30
    """
    from pipeline.checkpoint.sums import check_sums
    from pipeline.hybrid.generate import stream_text
    from pipeline.threads import use_threads

    if verify and (problems := check_sums(model)):
        raise CheckpointError(f"{model}: {problems[0]}; `requant verify` tells all that is wrong")
    use_threads()
    rate = stream_text(model, prompt, max_new_tokens, device_memory, sys.stdout, placement)
    typer.echo(f"\n{rate:.1f} tokens/s", err=True)


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
        raise UserError("nights need trackio and matplotlib: pip install 'requant[nightly]'")
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
        announce=_announce,
    )
    if as_json:
        typer.echo(json.dumps(as_dict(night), indent=2))
    else:
        show(night_table(night))
        for line in details(night):
            typer.echo(line)
        typer.echo(f"page: {state / 'latest' / 'index.html'}")
    raise typer.Exit(night.code)


def _announce(line: str) -> None:
    typer.echo(redacted(line), err=True)


def _finish(
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
            _announce(MISSING)
        if report["machine"]["device"] == "cpu":
            _announce("no GPU was found: both parts ran on the CPU")
        _announce(
            "load it with pipeline.hybrid.load; transformers' own loading leaves experts random"
            " unless they are unfused first (docs/other-readers.md)"
        )
    raise typer.Exit(0 if report["passed"] else 1)


def main() -> None:
    """Entry point of the console script: user errors become one line and exit code 2."""
    # Libraries' own advice (optional kernels that are not installed) says nothing a user can use.
    # transformers sets its loggers' levels anew when it is imported; this switch it leaves alone.
    logging.disable(logging.WARNING)
    redact_tracebacks()
    # Tiles differ in size: without this, much of a GPU's memory is lost between blocks.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        with system_errors():
            app()
    except UserError as error:
        typer.echo(redacted(f"requant: {error}"), err=True)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        typer.echo("requant: stopped; the same command goes on from here", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
