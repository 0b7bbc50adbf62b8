"""Kills, full disks and crowds: the long part of the tests of what a conversion survives.

    .venv/bin/python scripts/torture.py [--json FILE] [--only PART ...] [--seed 0] [--workers 2]
        [--minutes N]
        [--kills 200] [--demo 12] [--publish 30] [--full 40] [--together 8] [--soak 200]

kills     `requant run` on the micro model (with the dense copy) as a process of its own, killed by
          SIGKILL at a drawn file operation (within writes too, half of the bytes written), or up
          to a tenth of a second after one; the resumed run is killed again, eight times in all,
          twice in each stage.  Then the same command once more, to the end.
demo      the same on the trained demo model, with less calibration text.
publish   `requant publish` to the tests' own Hub server, killed and repeated.
full      the disk is full at a drawn operation; or no file may be larger than a drawn size; or a
          real small file system fills up meanwhile (where this user may mount one).
together  so many conversions of the demo model at once, of one Hub id into one empty cache.
soak      so many conversions of the micro model in a row in one process: after a warm-up of 20,
          the median memory of the last 20 against that of the first 20, and open files.

A part passes when no byte of the result (weights, index, config, shard map, tokenizer, record)
differs from an uninterrupted run's, nothing half-made was accepted by `requant verify`, validate,
generate, shard, publish or `pipeline.hybrid.load`, nothing is left beside the result, and each
refusal was one line with exit code 2.  Exit code 1 when one does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests/hybrid")]
PARTS = {"kills": 200, "demo": 12, "publish": 30, "full": 40, "together": 8, "soak": 200}


def main() -> None:
    """Run the parts that are asked for, print one summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    for part, count in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="rounds that run side by side")
    parser.add_argument("--minutes", type=float, help="for each part; rounds begun are finished")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "commit": commit,
        "command": " ".join(sys.argv),
    }
    print(json.dumps(about), flush=True)
    results: dict[str, dict[str, Any]] = {}
    for part in options.only:
        module: Any = importlib.import_module(
            "torture_parts.crowds" if part in ("together", "soak") else "torture_parts.faults"
        )
        run: Callable[..., dict[str, Any]] = getattr(module, part)
        started = time.monotonic()
        if options.minutes is not None:
            os.environ["TORTURE_DEADLINE"] = str(started + 60 * options.minutes)
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            chance = random.Random(f"{options.seed} {part}")
            found = run(Path(folder), getattr(options, part), chance, options.workers)
        results[part] = found | {"seconds": round(time.monotonic() - started)}
        print(json.dumps({"part": part, **results[part]}), flush=True)
    passed = all(result["passed"] for result in results.values())
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "passed": passed, **results}, indent=2) + "\n")
    print("passed" if passed else "FAILED")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
