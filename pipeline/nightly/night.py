"""One night: every job in turn, compared with its history, recorded and reported."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.writer import write_bytes
from pipeline.errors import OutputError, UserError
from pipeline.hub.cache import refuse_hub_cache
from pipeline.nightly import outputs
from pipeline.nightly.attempt import Attempt, attempt
from pipeline.nightly.history import History, Record
from pipeline.nightly.jobs import NightlyJob, collect
from pipeline.nightly.machine import commit, describe, versions
from pipeline.nightly.notify import notify
from pipeline.nightly.page import night_page
from pipeline.nightly.recipe import NightlyRecipe
from pipeline.nightly.rules import (
    FIGURES,
    Baseline,
    Finding,
    baselines,
    compare,
    is_suspicious,
)
from pipeline.report.build import judge

STAMP = "%Y%m%dT%H%M%SZ"
FLIPS_NIGHTS = 10
FLIPS = 3
"""This many changes between good and bad within FLIPS_NIGHTS make a job flaky."""
CODES = {"ok": 0, "regression": 1, "broken": 2}


@dataclass(frozen=True)
class Night:
    """What a night found; `records` are the rows that the history grew by."""

    started: str
    records: tuple[Record, ...]
    folder: Path
    """Where its pages, logs and reports are."""
    notes: tuple[str, ...] = ()

    @property
    def code(self) -> int:
        """0: all is well; 1: a regression; 2: something could not be validated at all."""
        return max(CODES[record["outcome"]] for record in self.records)


def run_night(
    targets: Sequence[str],
    state: Path,
    *,
    roots: Sequence[Path],
    accept: Collection[str],
    keep_nights: int,
    keep_rows: int,
    announce: Callable[[str], None],
) -> Night:
    """Validate all targets, one after the other, and write the history and the night's folder.

    `state` holds `history/`, `nights/STAMP/`, and `latest`, a link to the last of them.  `accept`
    names jobs whose figures of tonight are the new normal.  Raises UserError before any job for
    targets that are none, and when another night is running.
    """
    jobs = collect(targets, roots)
    unknown = set(accept) - {job.name for job in jobs}
    if unknown:
        names = ", ".join(job.name for job in jobs)
        raise UserError(f"--accept {min(unknown)}: no such job; tonight's are {names}")
    with _lock(state):
        history = History(state / "history")
        notes = []
        if history.kept_aside:
            notes.append(f"the history was damaged: kept as {history.kept_aside}, a new one begun")
            announce(notes[0])
        folder = _new_folder(state / "nights")
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        records: list[Record] = []
        try:
            for number, job in enumerate(jobs, 1):
                announce(f"[{number}/{len(jobs)}] {job.name}")
                past = history.of(job.name)
                record = _night_of(job, past, folder, started, job.name in accept)
                records.append(record)
                announce(f"[{number}/{len(jobs)}] {outputs.line(record)}")
        finally:  # also what a night had done when it was stopped
            history.append(records)
        history.prune(keep_rows)
        night = Night(started, tuple(records), folder, tuple(notes))
        outputs.write(night)
        page = night_page(night, {job.name: history.of(job.name) for job in jobs})
        write_bytes(folder / "index.html", page.encode())
        _keep_newest(state, keep_nights, folder)
        notify(night, announce)
    return night


def _night_of(
    job: NightlyJob, past: Sequence[Record], folder: Path, started: str, accept: bool
) -> Record:
    """One job's night: a run, a second one if the first was bad, and what to make of both."""
    runs: list[Attempt] = []
    base: Sequence[Baseline] = ()
    findings: Sequence[Finding] = ()
    if job.recipe is None:
        outcome, reasons = "broken", [str(job.problem)]
    else:
        runs.append(attempt(job.recipe, job.name, folder, 1))
        base = _past_of(job.recipe, runs[0], past, accept)
        if _bad(job.recipe, runs[0], base):
            runs.append(attempt(job.recipe, job.name, folder, 2))
        if not runs[0].report:  # the first told nothing of the machine
            base = _past_of(job.recipe, runs[-1], past, accept)
        measured = [run for run in runs if run.report]
        findings = compare(base, [figures_of(run) for run in measured], _last_runs(past, runs[-1]))
        outcome, reasons = _judge(job.recipe, runs, findings)
    best = next((run for run in reversed(runs) if run.report), Attempt(0.0))
    record: Record = {
        "schema": 1,
        "job": job.name,
        "night": started,
        "outcome": outcome,
        "reasons": reasons,
        "watched": [f.words for f in findings if not f.regression],
        "figures": figures_of(best),
        "runs": [figures_of(run) for run in runs],
        "errors": [run.error for run in runs if run.error],
        "baseline": {b.figure.name: {"median": b.median, "noise": b.noise} for b in base},
        "accepted": accept,
        "seconds": round(sum(run.seconds for run in runs), 3),
        "model": job.recipe.model if job.recipe else None,
        "seed": job.recipe.seed if job.recipe else None,
        "revision": best.result.get("revision"),
        "sums": best.result.get("sums"),
        "machine": describe(best.report),
        "versions": versions(),
        "commit": commit(),
        "report": best.report,
    }
    record["state"] = _state(record, past)
    record["changed"] = _changed(record, past)
    plain: Record = _plain(record)
    return plain


def figures_of(run: Attempt) -> dict[str, float]:
    """The compared figures of one run."""
    return {f.name: run.report[f.name] for f in FIGURES if f.name in run.report}


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Data that JSON in UTF-8 can hold: null for NaN and infinities, and no lone surrogates, which
    names of files can bring along."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _past_of(
    recipe: NightlyRecipe, run: Attempt, past: Sequence[Record], accept: bool
) -> Sequence[Baseline]:
    if accept or not run.report:
        return ()
    key = describe(run.report)["key"]
    return baselines(past, key, recipe.relative.nights, recipe.relative.minimum)


def _last_runs(past: Sequence[Record], run: Attempt) -> Sequence[Mapping[str, Any]]:
    """Runs of the night before, if it was on the same machine."""
    if not past or past[-1]["machine"]["key"] != describe(run.report)["key"]:
        return ()
    runs: Sequence[Mapping[str, Any]] = past[-1]["runs"]
    return runs


def _bad(recipe: NightlyRecipe, run: Attempt, base: Sequence[Baseline]) -> bool:
    """Whether a run asks for a second one."""
    return bool(_misses(recipe, run)) or is_suspicious(base, figures_of(run))


def _misses(recipe: NightlyRecipe, run: Attempt) -> list[str]:
    """What is wrong with one run by itself: no result, damage, absolute bounds."""
    if run.error:
        return [run.error]
    bounds = run.report["thresholds"] | {
        name: bound for name, bound in recipe.thresholds.model_dump().items() if bound is not None
    }
    return [*(f"damaged: {p}" for p in run.result["problems"]), *judge(run.report, bounds)]


def _judge(
    recipe: NightlyRecipe, runs: Sequence[Attempt], findings: Sequence[Finding]
) -> tuple[str, list[str]]:
    """Outcome and reasons: only what is wrong with every run counts."""
    if all(run.error for run in runs):
        return "broken", [str(runs[-1].error)]
    misses = [_misses(recipe, run) for run in runs]
    reasons = misses[-1] if all(misses) else []
    if runs[-1].error and reasons:  # the second run says less than the first
        reasons = misses[0]
    reasons = reasons + [f.words for f in findings if f.regression]
    return ("regression" if reasons else "ok"), reasons


def _state(record: Record, past: Sequence[Record]) -> str:
    """What is new, fixed, flaky, still failing, watched or well about tonight's outcome."""
    bad = record["outcome"] != "ok"
    was_bad = bool(past) and past[-1]["outcome"] != "ok"
    recent = [r["outcome"] != "ok" for r in past[-FLIPS_NIGHTS + 1 :]] + [bad]
    flips = sum(a != b for a, b in itertools.pairwise(recent))
    if bad != was_bad and flips >= FLIPS:
        return "flaky"
    if bad:
        return "still failing" if was_bad else "new"
    if was_bad:
        return "fixed"
    if record["watched"]:
        return "watched"
    return "flaky" if len(record["runs"]) > 1 else "ok"


def _changed(record: Record, past: Sequence[Record]) -> list[str]:
    """What is different from the last good night: where to look first."""
    good = next((r for r in reversed(past) if r["outcome"] == "ok"), None)
    if good is None or record["outcome"] == "broken":
        return []
    pairs = {
        "the model's files": (good["sums"], record["sums"]),
        "revision": (good["revision"], record["revision"]),
        "commit": (good["commit"], record["commit"]),
        "machine": (good["machine"]["key"], record["machine"]["key"]),
    }
    pairs |= {n: (good["versions"].get(n), v) for n, v in record["versions"].items()}
    return [
        f"{name}: {str(old)[:12]} -> {str(new)[:12]}" if name != "machine" else "machine"
        for name, (old, new) in pairs.items()
        if old != new
    ]


@contextlib.contextmanager
def _lock(state: Path) -> Iterator[None]:
    """Keep two nights with one history from overlapping."""
    path = state / "lock"
    refuse_hub_cache(state)
    try:
        state.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise OutputError(f"{state}: cannot be written to ({error.strerror})") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise OutputError(
                f"another night is running ({stream.read().strip()}); wait for it to end"
            ) from None
        stream.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        stream.write(f"process {os.getpid()}, since {now}\n")
        stream.flush()
        yield
        stream.truncate(0)


def _new_folder(nights: Path) -> Path:
    while True:
        folder = nights / time.strftime(STAMP, time.gmtime())
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # two nights within a second
            time.sleep(0.1)
            continue
        except OSError as error:
            raise OutputError(f"{nights}: cannot be written to ({error.strerror})") from None
        return folder


def _keep_newest(state: Path, count: int, latest: Path) -> None:
    """Point `latest` at tonight and delete all but the newest folders of nights."""
    link = state / "latest"
    for left in state.glob(".latest.*"):  # of a night that was killed here; we hold the lock
        left.unlink()
    fresh = state / f".latest.{os.getpid()}"
    fresh.symlink_to(latest.relative_to(state))
    fresh.replace(link)
    nights = sorted(
        path
        for path in (state / "nights").iterdir()
        if re.fullmatch(r"\d{8}T\d{6}Z", path.name) and path.is_dir()
    )
    for old in nights[:-count]:
        shutil.rmtree(old)
