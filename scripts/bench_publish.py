"""Publishes a small model a hundred times while everything goes wrong.

    .venv/bin/python scripts/bench_publish.py [--rounds 100] [--seed 0] [--shard-bytes N]

Two series, against the tests' own Hub server over real HTTP on this machine:

faults  every twentieth request goes wrong at random (429, 500, 503, cut, answer lost, slow, one bit
        flipped in an upload, token expired), and each publication is killed once, at a random time
        or a random byte.  The same command is given until it ends well.
kills   no faults; each publication is killed once, at a random byte of what it sends.

A series passes when every round ends with all files there and their checksums right, no commit ever
showed a part of a model, and (kills) no more than 1.2 times the model's bytes were sent on average.

A kill costs what had been sent of the file in flight: over the model's bytes M, the sum of squares
of the sizes of the files that the kill may strike over 2 M times their sum, on average.  The first
line says what that comes to, and what one publication without a kill sends.  `--shard-bytes` splits
the rest of the micro model beside its experts as finely in proportion as a large one's: that of the
80B model (42 GiB) is in files of 4 GiB at most, 9.5 % of it, which is 138,000 bytes here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
TOKEN = "hf_" + "b" * 34
FAULT_RATE = 0.05
MOST_RUNS = 12
KINDS = ("status", "status", "cut", "lost", "slow", "flip", "expire")


@dataclass
class Round:
    """What became of one publication."""

    runs: int
    killed: bool
    complete: bool
    half_seen: int
    """Commits that showed a part of the model."""
    sent: int
    """Bytes of all requests' bodies."""
    faults: int
    seconds: float


def main() -> None:
    """Run both series and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, help="a finished one instead of the micro model")
    parser.add_argument("--shard-bytes", type=int, help="of the micro model's rest, per file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        if options.model is None:
            model = _convert(Path(folder), options.shard_bytes)
        if options.model is not None:
            shutil.copytree(options.model, model)
        size = sum(path.stat().st_size for path in model.iterdir())
        print(f"{platform.platform()}, {os.cpu_count()} CPUs; model: {size:,} bytes", flush=True)
        print(f"{_expected(model, size)}", flush=True)
        results = {}
        for series in ("faults", "kills"):
            rounds = _series(series, model, options.rounds, options.seed)
            results[series] = _summary(series, rounds, size)
            shown = {key: value for key, value in results[series].items() if key != "all"}
            print(json.dumps(shown), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if all(result["passed"] for result in results.values()) else 1)


def _expected(model: Path, size: int) -> str:
    """What must be sent at least: without a kill, and what one costs by the files' sizes."""
    hub_module: Any = importlib.import_module("support.hub")
    with hub_module.HubServer() as hub:
        hub.store.token(TOKEN, user="ann", orgs=("acme",))
        copy = shutil.copytree(model, model.parent / "copy")
        code = _finish(_start(_publish(copy), hub.environment(TOKEN)))
        shutil.rmtree(copy)
        if code:
            raise SystemExit(f"a publication without faults ended with {code}")
        alone = sum(request.received for request in hub.requests) / size
    struck = [path.stat().st_size for path in model.glob("*.safetensors")]
    loss = sum(n * n for n in struck) / (2 * sum(struck) * size)
    return (
        f"large files: {sorted(struck)}; sent over size without a kill: {alone:.3f}; a kill at a"
        f" random byte of them loses {loss:.3f} on average"
    )


def _convert(folder: Path, shard_bytes: int | None) -> Path:
    """The micro model, converted and validated; `shard_bytes`: most of a file beside experts."""
    recipe = {
        "source": {"model": str(ROOT / "tests" / "models" / "micro-nf4")},
        "output": {"path": str(folder / "micro")},
        "requantize": {"group_size": 32},
        "calibration": {
            "sources": [str(ROOT / "calibration" / "docs-calib.txt")],
            "samples": 8,
            "sequence_length": 64,
        },
        "validate": {
            "text": str(ROOT / "calibration" / "docs-eval.txt"),
            "window": 64,
            "stride": 32,
            "max_windows": 4,
            "thresholds": {"perplexity_ratio": None},
        },
        "limits": {"threads": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = _finish(_start(["run", str(path)], {}, shard_bytes))
    if code:
        raise SystemExit(f"the conversion ended with {code}")
    return folder / "micro"


def _series(series: str, model: Path, count: int, seed: int) -> list[Round]:
    chance = random.Random(seed)
    hub_module: Any = importlib.import_module("support.hub")
    rounds = []
    for number in range(count):
        with hub_module.HubServer() as hub:
            hub.store.token(TOKEN, user="ann", orgs=("acme",))
            if series == "faults":
                hub.faults.at_random(chance.randrange(1 << 30), FAULT_RATE, KINDS)
            copy = model.parent / "copy"
            shutil.copytree(model, copy)
            rounds.append(_round(hub, copy, chance, by_byte=series == "kills" or number % 2 == 0))
            shutil.rmtree(copy)
        print(f"{series} {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
    return rounds


def _round(hub: Any, model: Path, chance: random.Random, *, by_byte: bool) -> Round:  # noqa: ANN401
    """One publication, killed once, then repeated until it ends well."""
    large = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    command = _publish(model)
    started = time.monotonic()
    process = _start(command, hub.environment(TOKEN))
    if by_byte:
        at = chance.randrange(large)

        def watch(received: int) -> bool:
            if received < at:
                return False
            hub.watch = None
            process.kill()
            return True

        hub.watch = watch
    else:
        timer = threading.Timer(chance.uniform(0, 0.6), process.kill)
        timer.start()
    killed = _finish(process) < 0
    runs = 1
    code = -1 if killed else process.exitcode
    while code != 0 and runs < MOST_RUNS:
        hub.watch = None
        hub.store.tokens[TOKEN].expired = False  # somebody logs in anew
        code = _finish(_start(command, hub.environment(TOKEN)))
        runs += 1
    # Hidden files are no part of a model: .gitattributes, and what a kill left of a write.
    repo = hub.store.repos["model", "acme/micro"]
    here = {path.name: path.read_bytes() for path in model.iterdir() if path.name[0] != "."}
    there = {name: blob.data for name, blob in repo.head().items() if name[0] != "."}
    seen = [{name for name in c.tree if name[0] != "."} for c in list(repo.commits.values())[1:]]
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if odd or code:
        print(f"exit code {code}, other on the Hub than here: {odd}", file=sys.stderr)
    return Round(
        runs=runs,
        killed=killed,
        complete=code == 0 and here == there,
        half_seen=sum(names != here.keys() for names in seen),
        sent=sum(request.received for request in hub.requests),
        faults=len(hub.faults.struck),
        seconds=time.monotonic() - started,
    )


def _publish(model: Path) -> list[str]:
    return ["publish", str(model), "--repo", "acme/micro", "--license", "apache-2.0"]


def _start(arguments: list[str], variables: dict[str, str], shard_bytes: int | None = None) -> Any:  # noqa: ANN401
    """`requant ARGUMENTS` in a process of its own, which a server with all imports done forks."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.run", "pipeline.stages.publish", "bitsandbytes"])
    process = context.Process(target=_command, args=(arguments, variables, shard_bytes))
    process.start()
    return process


def _command(arguments: list[str], variables: dict[str, str], shard_bytes: int | None) -> None:
    from huggingface_hub import constants  # noqa: PLC0415  (in the child, already imported there)

    from pipeline.cli import main as requant  # noqa: PLC0415
    from pipeline.stages import nonexpert  # noqa: PLC0415

    if shard_bytes is not None:  # not a choice of users: files of 4 GiB suit any real model
        nonexpert.NONEXPERT_BYTES = shard_bytes
    os.environ |= variables
    constants.HF_HUB_DISABLE_XET = True  # read when it was imported
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["requant", *arguments]
    requant()


def _finish(process: Any) -> int:  # noqa: ANN401
    process.join()
    return int(process.exitcode)


def _summary(series: str, rounds: list[Round], size: int) -> dict[str, Any]:
    shares = [r.sent / size for r in rounds]
    whole = all(r.complete and not r.half_seen for r in rounds)
    return {
        "series": series,
        "rounds": len(rounds),
        "complete": sum(r.complete for r in rounds),
        "half_seen": sum(r.half_seen for r in rounds),
        "killed": sum(r.killed for r in rounds),
        "faults": sum(r.faults for r in rounds),
        "runs_mean": statistics.fmean(r.runs for r in rounds),
        "runs_most": max(r.runs for r in rounds),
        "sent_over_size_mean": round(statistics.fmean(shares), 4),
        "sent_over_size_most": round(max(shares), 4),
        "seconds": round(sum(r.seconds for r in rounds), 1),
        "passed": whole and (series == "faults" or statistics.fmean(shares) <= 1.2),
        "all": [asdict(r) for r in rounds],
    }


if __name__ == "__main__":
    main()
