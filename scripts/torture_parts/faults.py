"""Rounds in which one process goes wrong: killed, or refused room on the disk."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "t" * 34
MOST_RUNS = 6
CHARACTERS = 50_000
"""Of each text, for the micro model."""
KILLS_A_ROUND = 8
"""As many of each stage; a round ends early when a run gets through, which only the last can."""
LATEST = 0.1
"""Seconds after an operation, for the kills that strike between two."""
BEGINS_WITH = {
    "dequantize": "",
    "requantize": "DIR/out.partial/.model-experts-",
    "shard": "DIR/out.partial/.model-nonexpert-",
    "validate": "DIR/out/.report.json.",
}
"""What the first operation of a stage is about."""

faults: Any = importlib.import_module("support.faults")
recipes: Any = importlib.import_module("support.recipes")
hub_module: Any = importlib.import_module("support.hub")
Round = dict[str, Any]
Target = tuple[str, int]
"""An operation, and how many like it went before."""
Kill = tuple[int, float]
"""The number of an operation, and seconds after it."""


def deadline() -> float:
    """When no further round begins, on the monotonic clock."""
    return float(os.environ.get("TORTURE_DEADLINE", "inf"))


def project(folder: Path, name: str, *, demo: bool = False) -> Any:  # noqa: ANN401
    """A recipe for a shipped model in a directory of its own, with the beginnings of the shipped
    texts: the micro model needs no more, and reading them whole would be most of its time."""
    texts = {}
    for use, shipped in (("calibration", "docs-calib.txt"), ("evaluation", "docs-eval.txt")):
        texts[use] = folder / "texts" / shipped
        if not texts[use].exists():
            texts[use].parent.mkdir(parents=True, exist_ok=True)
            words = (ROOT / "calibration" / shipped).read_text(encoding="utf-8")
            texts[use].write_text(words if demo else words[:CHARACTERS], encoding="utf-8")
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    made = recipes.Project(folder, texts)
    if demo:
        made.change(
            source={"model": str(ROOT / "tests" / "models" / "qwen3-next-tiny-nf4")},
            requantize={"group_size": 128},
            calibration={"samples": 16, "sequence_length": 256},
            validate={"window": 256, "stride": 128, "max_windows": 8},
        )
    return made


def kills(
    folder: Path, count: int, chance: random.Random, workers: int, *, demo: bool = False
) -> dict[str, Any]:
    """Conversions, the dense copy and the validation included, killed at random and resumed."""
    whole = project(folder, "whole", demo=demo)
    outcome = faults.requant(["run", _with_copy(whole)], whole.folder)
    assert outcome.code == 0, outcome.said
    expected = _digests(whole)
    targets, begins = _targets([o.replace(str(whole.folder), "DIR") for o in outcome.operations])
    plans: list[tuple[int, list[Kill]]] = []
    for number in range(-(-count // KILLS_A_ROUND)):
        drawn = [
            (place, chance.choice((0.0, 0.0, chance.uniform(0.0, LATEST))))
            for first, last in pairwise([*begins, len(targets)])
            for place in sorted(chance.sample(range(first, last), KILLS_A_ROUND // len(begins)))
        ]
        plans.append((number, drawn))

    def one(plan: tuple[int, list[Kill]]) -> Round:
        made = project(folder, str(plan[0]), demo=demo)
        return _killed(made, plan[1], targets, expected)

    rounds = _side_by_side(one, plans, workers)
    last = {name: place for place, (name, _) in enumerate(targets)}
    killed = Counter(bisect_right(begins, last[name]) - 1 for r in rounds for name in r["struck"])
    summary = {
        "rounds": len(rounds),
        "kills": sum(r["killed"] for r in rounds),
        "operations": len(targets),
        "killed_in": {stage: killed[number] for number, stage in enumerate(BEGINS_WITH)},
        "killed_between_operations": sum(r["late"] for r in rounds),
        "half_made_left": sum(r["half_made"] for r in rounds),
        "half_made_accepted": sum(len(r["accepted"]) for r in rounds),
        "damaged_under_the_final_name": sum(len(r["damaged"]) for r in rounds),
        "rounds_with_differing_bytes": sum(r["differs"] for r in rounds),
        "files_left_beside": sum(r["left"] for r in rounds),
    }
    wrong = [r for r in rounds if r["accepted"] or r["damaged"] or r["differs"] or r["left"]]
    return summary | {"wrong": wrong[:5], "passed": not wrong}


def _with_copy(made: Any) -> Path:  # noqa: ANN401
    path: Path = made.change(dequantize={"write": True}).write()
    return path


def _digests(made: Any) -> dict[str, str]:  # noqa: ANN401
    """Of the result and of the dense copy, those of them that are there."""
    return {
        f"{folder.name}/{name}": digest
        for folder in _results(made)
        for name, digest in recipes.digests(folder).items()
        if not name.endswith(".tmp")  # a killed run's, in no seal; the next run deletes it
    }


def _results(made: Any) -> list[Path]:  # noqa: ANN401
    copy = made.output.with_name("out-bf16")
    return [folder for folder in (made.output, copy) if folder.exists()]


def _targets(operations: list[str]) -> tuple[list[Target], list[int]]:
    """A whole run's operations, and at which of them each stage begins.

    Without directories that are made: most are there already, and asked for at any time.
    """
    seen: Counter[str] = Counter()
    targets = []
    for operation in operations:
        if operation.startswith("os.mkdir"):
            continue
        name = faults.plain(operation)
        targets.append((name, seen[name]))
        seen[name] += 1
    begins = [
        next(place for place, (name, _) in enumerate(targets) if what in name)
        for what in BEGINS_WITH.values()
    ]
    return targets, begins


def demo(folder: Path, count: int, chance: random.Random, workers: int) -> dict[str, Any]:
    """As `kills`, on the demo model."""
    return kills(folder, count, chance, workers, demo=True)


def _killed(
    made: Any,  # noqa: ANN401
    plan: list[Kill],
    targets: list[Target],
    expected: dict[str, str],
) -> Round:
    command = ["run", _with_copy(made)]
    found: Round = {"plan": plan, "killed": 0, "late": 0, "half_made": 0, "accepted": []}
    found |= {"struck": [], "damaged": []}
    for place, delay in plan:
        # Where a resumed run has done this one already, the first that it does after it.
        ahead = ((name.replace("DIR", str(made.folder)), n) for name, n in targets[place:])
        fault = faults.Fault(targets=frozenset(ahead), delay=delay)
        outcome = faults.requant(command, made.folder, fault)
        if outcome.code == 0:
            break
        if outcome.code == -9:
            struck = outcome.said.rpartition(faults.STRUCK)[2].split("\n")[0]
            found["killed"] += 1
            found["late"] += delay > 0
            found["struck"].append(struck.replace(str(made.folder), "DIR"))
        if faults.half_made(made.partial):
            found["half_made"] += 1
            found["accepted"] += faults.accepted(made.partial, made.folder)
        found["damaged"] += [n for n, digest in _digests(made).items() if digest != expected.get(n)]
        for folder in _results(made):
            found["damaged"] += map(str, faults.verify_model(folder))
    outcome = faults.requant(command, made.folder)
    found["differs"] = outcome.code != 0 or _digests(made) != expected
    if outcome.code:
        found["said"] = outcome.said[-2000:]
    result = {"out", "out-bf16", "recipe.yaml"}
    found["left"] = sum(path.name not in result for path in made.folder.iterdir())
    shutil.rmtree(made.folder)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def publish(folder: Path, count: int, chance: random.Random, workers: int) -> dict[str, Any]:
    """Publications killed at random and repeated."""
    whole = project(folder, "whole")
    assert faults.requant(["run", whole.write()], whole.folder).code == 0
    with hub_module.HubServer() as hub:
        copy = Path(shutil.copytree(whole.output, folder / "counted" / "model"))
        outcome = _publish(hub, copy, None)
    assert outcome.code == 0, outcome.said
    plans = [
        (number, chance.randrange(len(outcome.operations)) if number % 3 == 0 else None,
         chance.uniform(0, 2))
        for number in range(count)
    ]  # fmt: skip

    def one(plan: tuple[int, int | None, float]) -> Round:
        number, at, seconds = plan
        model = Path(shutil.copytree(whole.output, folder / str(number) / "model"))
        fault = faults.Fault(at=at, seconds=None if at is not None else seconds)
        with hub_module.HubServer() as hub:
            outcome = _publish(hub, model, fault)
            killed = outcome.code == -9
            runs = 1
            while outcome.code and runs < MOST_RUNS:
                outcome, runs = _publish(hub, model, None), runs + 1
            repo = hub.store.repos["model", "acme/micro"]
            here = {p.name: p.read_bytes() for p in model.iterdir() if p.name[0] != "."}
            there = {n: blob.data for n, blob in repo.head().items() if n[0] != "."}
            shown = [{n for n in c.tree if n[0] != "."} for c in list(repo.commits.values())[1:]]
        shutil.rmtree(model)
        half = sum(names != here.keys() for names in shown)
        return {"killed": killed, "differs": outcome.code != 0 or here != there, "half": half}

    rounds = _side_by_side(one, plans, workers)
    wrong = [r for r in rounds if r["differs"] or r["half"]]
    return {
        "rounds": len(rounds),
        "kills": sum(r["killed"] for r in rounds),
        "rounds_with_differing_bytes": sum(r["differs"] for r in rounds),
        "commits_with_half_a_model": sum(r["half"] for r in rounds),
        "wrong": wrong[:5],
        "passed": not wrong,
    }


def _publish(hub: Any, model: Path, fault: Any) -> Any:  # noqa: ANN401
    hub.store.token(TOKEN, user="ann", orgs=("acme",))
    command = ["publish", model, "--repo", "acme/micro", "--license", "apache-2.0"]
    return faults.requant(command, model.parent, fault, **hub.environment(TOKEN))


def full(folder: Path, count: int, chance: random.Random, workers: int) -> dict[str, Any]:
    """Conversions whose disk is full at every kind of operation, for every file."""
    whole = project(folder, "whole")
    outcome = faults.requant(["run", whole.write()], whole.folder)
    assert outcome.code == 0, outcome.said
    expected = recipes.digests(whole.output)
    rooms = [i for i, o in enumerate(outcome.operations) if o.split()[0] in faults.TAKES_ROOM]
    places = sorted(chance.sample(rooms, min(count, len(rooms))))
    sizes = sorted({p.stat().st_size - 1 for p in whole.output.iterdir()} - {-1, 0})
    plans = [
        *((f"at-{at}", faults.Fault(at=at, error=faults.FULL)) for at in places),
        *((f"size-{size}", faults.Fault(file_bytes=size)) for size in sizes if size > 1000),
    ]

    def one(plan: tuple[str, Any]) -> Round:
        made = project(folder, plan[0])
        return _refused(made, plan[1], expected)

    rounds = _side_by_side(one, plans, workers)
    real = _small_file_systems(folder, expected, chance) if _may_mount() else []
    wrong = [r for r in [*rounds, *real] if r["differs"] or r["unclear"] or r["accepted"]]
    return {
        "rounds": len(rounds),
        "operations_refused_at": len(places),
        "file_sizes": len(plans) - len(places),
        "refused": sum(r["refused"] for r in rounds),
        "real_file_systems": len(real),
        "real_refused": sum(r["refused"] for r in real),
        "lost_outputs": sum(r["differs"] for r in [*rounds, *real]),
        "half_made_accepted": sum(len(r["accepted"]) for r in rounds),
        "unclear_lines": sum(r["unclear"] for r in [*rounds, *real]),
        "lines": sorted({r["line"] for r in [*rounds, *real]})[:12],
        "wrong": wrong[:5],
        "passed": not wrong,
    }


def _refused(made: Any, fault: Any, expected: dict[str, str]) -> Round:  # noqa: ANN401
    command = ["run", made.write()]
    outcome = faults.requant(command, made.folder, fault)
    line = outcome.line.replace(str(made.folder), "DIR")
    taken = []
    if faults.half_made(made.partial):
        taken = faults.accepted(made.partial, made.folder)
    again = faults.requant(command, made.folder)
    found = {
        "fault": str(fault),
        "refused": outcome.code == 2,
        "unclear": outcome.code not in (0, 2) or (outcome.code == 2 and not is_clear(outcome.said)),
        "line": line if outcome.code == 2 else "",
        "accepted": taken,
        "differs": again.code != 0 or recipes.digests(made.output) != expected,
    }
    if found["unclear"] or found["differs"]:
        found["said"] = [outcome.said[-1500:], again.said[-1500:]]
    shutil.rmtree(made.folder)
    return found


def is_clear(said: str) -> bool:
    """One line of ours at the end that says how to go on, and no traceback."""
    last = said.strip().splitlines()[-1]
    helps = "same command" in last or "make room" in last
    return last.startswith("requant: ") and helps and "Traceback" not in said


def _may_mount() -> bool:
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /tmp"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _small_file_systems(
    folder: Path, expected: dict[str, str], chance: random.Random
) -> list[Round]:
    """Another program fills the file system when so many units are done; it makes room again."""
    found = []
    for number in range(6):
        made = project(folder, f"tmpfs-{number}")
        recipe = made.write().rename(folder / f"tmpfs-{number}.yaml")
        run = f"{sys.executable} -m pipeline run {recipe}"
        script = f"""
            mount -t tmpfs -o size=64m none {made.folder} || exit 9
            ( until [ "$(ls {made.partial}/.work/markers | wc -l)" -ge {chance.randrange(1, 5)} ]
              do sleep 0.01; done; cat /dev/zero > {made.folder}/hog ) 2>/dev/null &
            {run}; echo "code $?" >&2
            kill $! 2>/dev/null; wait; rm -f {made.folder}/hog
            {run}; echo "code $?" >&2
            cp -r {made.output} {folder}/result-{number}
        """
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        first, _, rest = done.stderr.partition("code ")
        code = int(rest[:1])
        same = recipes.digests(folder / f"result-{number}") == expected
        line = first.strip().splitlines()[-1] if code == 2 else ""
        row = {"refused": code == 2, "differs": not same, "accepted": [], "line": line}
        row["unclear"] = code not in (0, 2) or (code == 2 and not is_clear(first))
        if row["unclear"] or row["differs"]:
            row["said"] = done.stderr[-2000:]
        found.append(row)
    return found


def _side_by_side(one: Callable[[Any], Round], plans: list[Any], workers: int) -> list[Round]:
    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(_in_time, one, plan) for plan in plans]
        return [found for future in done if (found := future.result()) is not None]


def _in_time(one: Callable[[Any], Round], plan: Any) -> Round | None:  # noqa: ANN401
    return one(plan) if time.monotonic() < deadline() else None
