"""Executes a plan: the stages in order, finished units skipped, one line of progress each."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers

from pipeline import __version__
from pipeline.checkpoint.untrusted import expanded
from pipeline.code import code_digest
from pipeline.collection import set_aside
from pipeline.device_errors import device_errors, limited
from pipeline.errors import CheckpointError, DeviceFull, NumericalError, OutputError, RecipeError
from pipeline.evaluate.speed import reset_peaks
from pipeline.hub.fetch import download
from pipeline.plan import NOTHING, Plan, Standing, plan, prepare
from pipeline.progress import Reporter
from pipeline.quantize.backend import solver_backend
from pipeline.quantize.hessian import HESSIAN_EXPERTS, HESSIAN_TOKENS
from pipeline.quantize.precision import float32_products
from pipeline.recipe import Recipe
from pipeline.report.build import existing_report
from pipeline.secrets import secrets
from pipeline.stages.context import Context, Job
from pipeline.stages.dequantize import CHECK_UNIT, check_unchanged, early_digests
from pipeline.stages.experts import CHUNK_PAIRS
from pipeline.stages.order import BUILDING, STAGES
from pipeline.stages.placement import retreat
from pipeline.stages.publish import check_wanted
from pipeline.stages.stream import TOKENS_PER_BATCH
from pipeline.stages.streams import resumable_layers
from pipeline.stages.validate import UNIT as VALIDATE_UNIT
from pipeline.stages.validate import answer
from pipeline.stages.warm_up import WarmUp, output_exists
from pipeline.threads import use_threads
from pipeline.workdir import CONVERSION, difference


def run(
    recipe: Recipe,
    text: str,
    *,
    until: str | None = None,
    only: str | None = None,
    fresh: bool = False,
    quiet: bool = False,
    announce: Callable[[str], None] = lambda _line: None,
) -> Context:
    """Convert, resuming what an earlier run has done; returns the context, output in place.

    `until`: the last stage to run; `only`: the one stage to run (those before it must be done).
    Raises the UserErrors of preparation, planning and every stage.
    """
    for name in (until, only):
        if name is not None and name not in STAGES:
            raise RecipeError(f"unknown stage {name!r}; stages are: {', '.join(STAGES)}")
    if until and only:
        raise RecipeError("--until and --only exclude each other")
    if fresh and only:
        raise RecipeError("--fresh begins with the first stage, it does not go with --only")
    if any(secret in text for secret in secrets()):  # the text will lie in the result
        raise RecipeError("the recipe holds a token of yours; take it out, HF_TOKEN is enough")
    use_threads(recipe.limits.threads)
    chosen = _chosen_stages(recipe, until, only)
    solving = "requantize" in chosen and (fresh or not output_exists(recipe))
    with early_digests(recipe) as digests, WarmUp(recipe, announce, wanted=solving) as warm:
        context = _prepared(recipe, text, chosen, announce)
        context.digest, context.warmed = digests.of, warm.wait
        warm.opened(context)
        with set_aside():
            _run(context, chosen, fresh, quiet, announce)
    return context


def _run(
    context: Context,
    chosen: list[str],
    fresh: bool,
    quiet: bool,
    announce: Callable[[str], None],
) -> None:
    with context.work:
        context.work.recover()
        wanted = fingerprint(context)  # reads the texts: nothing is forgotten for a bad one
        if fresh:
            context.work.clear()
        built = not fresh and _is_built(context, wanted)
        todo = [name for name in chosen if not (built and name in BUILDING)]
        if built and len(todo) < len(chosen):
            other = _made(context).get("fingerprint", {}).get("code") != wanted["code"]
            note = "; the code has changed since, --fresh makes it anew" if other else ""
            announce(f"{context.output} is in place and up to date{note}")
        whole = plan(context, todo)
        context.estimates = whole.estimates
        for remark in whole.remarks:
            announce(remark)
        if any(name in BUILDING for name in todo):
            _execute_building(context, whole, wanted, todo, quiet, announce)
        for name in todo:
            report = existing_report(context.output) if name == "publish" else None
            if report is not None and not report["passed"]:
                announce(f"not published: {'; '.join(report['failures'])}")
            elif name not in BUILDING:
                _execute_rest(context, name, quiet)
                if name == "publish":
                    announce(f"{context.recipe.publish.repo} on the Hub holds this model")


def survey(recipe: Recipe, text: str) -> Plan:
    """What `run` would do with a recipe, and what of it is done already; writes nothing.

    Raises what preparation and planning of the work that is left raise.
    """
    use_threads(recipe.limits.threads)
    context = prepare(recipe, text)
    have = _standing(context)
    left = [name for name in STAGES if have.state != "finished" or name not in BUILDING]
    return replace(plan(context, left), have=have)


def _standing(context: Context) -> Standing:
    """How far the work has come, judged as `run` judges it: by the fingerprint of the whole."""
    if not context.work.begun and not (context.output / CONVERSION).is_file():
        return NOTHING
    if context.checkpoint.headers_only:
        return Standing("other", reason=f"{context.output} was made from a whole source")
    wanted = fingerprint(context)
    whole = plan(context, stages=())
    try:
        if _is_built(context, wanted):
            built = {job.unit for job in whole.jobs if job.stage in BUILDING}
            validated = {VALIDATE_UNIT} if answer(context) is not None else set()
            return Standing("finished", frozenset(built | validated))
    except OutputError as error:
        return Standing("other", reason=str(error))
    if changed := difference(context.work.fingerprint(), json.loads(json.dumps(wanted))):
        reason = f"{context.work.root} holds unfinished work made differently: {changed}"
        return Standing("other", reason=reason)
    return Standing("unfinished", frozenset(_done(context, whole)))


def _prepared(
    recipe: Recipe, text: str, chosen: list[str], announce: Callable[[str], None]
) -> Context:
    """The context with whole models; those that are on the Hub only are downloaded."""
    context = prepare(recipe, text)
    if "publish" in chosen:
        check_wanted(recipe, context.checkpoint.path)
    absent = [
        (named, revision)
        for opened, named, revision in (
            (context.checkpoint, recipe.source.model, recipe.source.revision),
            (context.original, recipe.source.reference, None),
        )
        if opened is not None and opened.headers_only
        if named is not None and not expanded(named).is_dir()
    ]
    if absent:
        plan(context, chosen)  # refuses what cannot be done before anything is downloaded
        for named, revision in absent:
            download(named, revision, announce)
        context = prepare(recipe, text)
    _require_data(context)
    return context


def _require_data(context: Context) -> None:
    for opened in (context.checkpoint, context.original):
        if opened is not None and opened.headers_only:
            raise CheckpointError(
                f"{opened.path} holds headers only; it can be planned, not converted"
            )


def fingerprint(context: Context) -> dict[str, Any]:
    """Everything that can change a byte of the result."""
    recipe = context.recipe
    resolved = recipe.resolved()
    headers = context.checkpoint.headers
    config = context.checkpoint.config.items()
    cuda = context.device.type == "cuda"
    original = context.original
    sizes = {} if original is None else {n: original.headers[n].size for n in original.headers}
    return {
        "code": code_digest(),
        "source": {name: headers[name].size for name in sorted(headers)},
        **({"reference": dict(sorted(sizes.items()))} if sizes else {}),
        "config": {key: value for key, value in config if key != "quantization_config"},
        "recipe": {key: resolved[key] for key in ("dequantize", "requantize")},
        "texts": context.texts.digests,
        "seed": recipe.calibration.seed,
        "tiles": {
            "experts": context.tile_experts,
            "tokens": TOKENS_PER_BATCH,
            "pairs": CHUNK_PAIRS,
            "hessian": [HESSIAN_EXPERTS, HESSIAN_TOKENS],
        },
        "threads": torch.get_num_threads(),
        "solver": solver_backend(context.device),
        "float32_products": float32_products(),
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "requant": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": importlib.metadata.version("bitsandbytes"),
            "triton": _version("triton"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _chosen_stages(recipe: Recipe, until: str | None, only: str | None) -> list[str]:
    """Publishing is asked for by a repository in the recipe, or by its name."""
    asked = recipe.publish.repo is not None or until == "publish"
    names = [name for name in STAGES if asked or name != "publish"]
    if only:
        return [only]
    return names[: names.index(until) + 1] if until else names


def _is_built(context: Context, wanted: dict[str, Any]) -> bool:
    """Whether the output directory is there, made from the same fingerprint and source.

    A --fresh run that was cut off has left work that is to be finished, not an output to be kept.
    What other code has finished is whole all the same: only unfinished work could get mixed.
    """
    wanted = json.loads(json.dumps(wanted))
    begun = context.work.begun and difference(context.work.fingerprint(), wanted) is None
    if begun or not (context.output / CONVERSION).is_file():
        return False
    made = _made(context)
    found, files = made.get("fingerprint", {}), made.get("source_files", {})
    changed = difference(found | {"code": wanted["code"]}, wanted)
    if changed:
        raise OutputError(
            f"{context.output} was made differently: {changed};"
            " choose another output.path, or make it again with --fresh"
        )
    check_unchanged(context, files, context.output)
    return True


def _made(context: Context) -> dict[str, Any]:
    """How the output in place was made; OutputError where that cannot be read."""
    path = context.output / CONVERSION
    try:
        made: dict[str, Any] = json.loads(path.read_text())
        if isinstance(made, dict) and isinstance(made.get("fingerprint", {}), dict):
            return made
    except ValueError:
        pass
    raise OutputError(f"{path} is damaged; make the output again with --fresh")


def _execute_building(
    context: Context,
    whole: Plan,
    wanted: dict[str, Any],
    todo: list[str],
    quiet: bool,
    announce: Callable[[str], None],
) -> None:
    context.work.open(wanted)
    checked = context.work.finished(CHECK_UNIT)
    if checked is not None:
        check_unchanged(context, checked.data["files"], context.work.root)
    jobs = [job for job in whole.jobs if job.stage in todo and job.stage in BUILDING]
    done = _done(context, whole)
    first = BUILDING.index(next(name for name in todo if name in BUILDING))
    for job in whole.jobs:
        if job.stage in BUILDING[:first] and job.unit not in done:
            raise OutputError(
                f"{job.stage} is not finished in {context.work.root}; run it first (without --only)"
            )
    resumed = sum(job.unit in done for job in jobs)
    if resumed:
        announce(f"resuming: {resumed} of {len(jobs)} units are done")
    seconds = sum(whole.job_seconds(job) for job in jobs)
    with _leaving_nothing(context), Reporter(seconds, quiet) as reporter, limited(context):
        context.progress, context.within = reporter.detail, reporter.within
        for name in todo:
            if name in BUILDING:
                while not _fits(context, whole, name, done, reporter):
                    kept = _done(context, whole)
                    layers = sum(j.stage == name and j.unit in kept for j in whole.jobs)
                    announce(
                        "the GPU's memory ran out; going on with less in flight,"
                        f" {layers} layers are done"
                    )
                    done = kept


def _fits(context: Context, whole: Plan, name: str, done: set[str], reporter: Reporter) -> bool:
    """Run a stage; False where the device had no room for it and less can be put there."""
    try:
        _run_stage(context, whole, name, done, reporter)
    except DeviceFull:
        if not retreat(context):
            raise
    else:
        return True
    # Outside the handler: the error's traceback holds what was on the device.
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


@contextmanager
def _leaving_nothing(context: Context) -> Iterator[None]:
    """Deletes the work of a source found bad before anything was made that could be resumed."""
    try:
        yield
    except (CheckpointError, NumericalError):
        if not any(marker.outputs for marker in context.work.markers()):
            context.work.clear()
        raise


def _run_stage(
    context: Context, whole: Plan, name: str, done: set[str], reporter: Reporter
) -> None:
    stage = None
    counted = 0.0
    reset_peaks()
    try:
        for job in (j for j in whole.jobs if j.stage == name):
            if job.unit in done:
                reporter.skip(whole.job_seconds(job))
                counted += whole.job_seconds(job)
                continue
            reporter.start(_title(job, context), whole.job_seconds(job))
            started = time.monotonic()
            with device_errors(context, job):
                if stage is None:
                    stage = STAGES[name].make(context)
                stage.run(job)
            reporter.finish(whole.job_seconds(job), time.monotonic() - started)
            counted += whole.job_seconds(job)
    except DeviceFull:
        reporter.skip(-counted)  # it may be gone through again
        raise
    finally:
        if stage is not None:
            stage.close()


def _execute_rest(context: Context, name: str, quiet: bool) -> None:
    context.warmed()  # where no layer was left, nobody has waited for it yet
    jobs = STAGES[name].jobs(context)
    with Reporter(len(jobs), quiet) as reporter:
        context.progress = reporter.detail
        stage = STAGES[name].make(context)
        try:
            for job in jobs:
                reporter.start(_title(job, context))
                started = time.monotonic()
                stage.run(job)
                reporter.finish(1.0, time.monotonic() - started)
        finally:
            stage.close()


def _done(context: Context, whole: Plan) -> set[str]:
    """Units that need not run again.

    Layers depend on the activations that leave the layer before them, which are saved now and then:
    until all is requantised, a layer counts as done only up to the last that was saved.
    """
    done = {job.unit for job in whole.jobs if context.work.finished(job.unit) is not None}
    units = [job.unit for job in whole.jobs if job.stage == "requantize"]
    if not done.issuperset(units):
        kept = resumable_layers(context.work, context.geometry.layers)
        done -= set(units[kept:])
    return done


def _title(job: Job, context: Context) -> str:
    if job.layer is not None:
        kind = context.geometry.layer_kinds[job.layer].replace("_", " ")
        return f"{job.stage}: layer {job.layer + 1} of {context.geometry.layers} ({kind})"
    return job.unit.replace("-", ": ", 1)
