"""Many conversions: at once, and one after the other in one process."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from torture_parts.faults import ROOT, TOKEN, deadline, hub_module, project, recipes

SHORT = ROOT / "calibration" / "docs-eval.txt"
HUB_ID = "acme/tiny-nf4"
WARM = 20
"""Conversions before memory is compared: libraries fill their caches in the first ones."""
COMPARED = 20
"""Conversions whose median counts: single ones differ by what the allocator has not given back."""


def together(folder: Path, count: int, chance: random.Random, workers: int) -> dict[str, Any]:
    """So many conversions at once; each process downloads the source if no other has yet."""
    source = ROOT / "tests" / "models" / "qwen3-next-tiny-nf4"
    with hub_module.HubServer() as hub:
        hub.store.token(TOKEN, user="ann", orgs=("acme",))
        hub.store.seed(HUB_ID, {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()})
        environment = os.environ | hub.environment(TOKEN)
        environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"PYTHONPATH": str(ROOT)}
        environment.pop("HF_HUB_CACHE", None)
        started = []
        for number in range(count):
            made = project(folder, str(number), demo=True).change(source={"model": HUB_ID})
            command = [sys.executable, "-m", "pipeline", "run", str(made.write())]
            log = (folder / f"{number}.log").open("w")
            process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
            started.append((made, process))
        codes = [process.wait() for _, process in started]
    alone = project(folder, "alone", demo=True)
    alone.run()
    expected = recipes.digests(alone.output)
    found = [recipes.digests(m.output) if m.output.exists() else {} for m, _ in started]
    wrong = [
        (folder / f"{number}.log").read_text()[-1500:]
        for number, (code, bytes_) in enumerate(zip(codes, found, strict=True))
        if code or bytes_ != expected
    ]
    return {
        "conversions": count,
        "exit_codes": codes,
        "with_differing_bytes": sum(bytes_ != expected for bytes_ in found),
        "wrong": wrong[:3],
        "passed": not wrong,
    }


def soak(folder: Path, count: int, chance: random.Random, workers: int) -> dict[str, Any]:
    """So many conversions, validation and page included, in this process."""
    psutil: Any = importlib.import_module("psutil")
    process = psutil.Process()
    resident, files = [], []
    expected: dict[str, str] = {}
    differing = 0
    for number in range(count):
        if time.monotonic() > deadline():
            break
        made = project(folder, "soak").change(calibration={"sources": [str(SHORT)]})
        made.run()
        found = recipes.digests(made.output)
        expected = expected or found
        differing += found != expected
        shutil.rmtree(made.folder)
        gc.collect()
        resident.append(process.memory_info().rss)
        files.append(process.num_fds())
        if number % 20 == 0:
            row = {"done": number + 1, "rss_mib": resident[-1] >> 20, "files": files[-1]}
            print(json.dumps(row), file=sys.stderr, flush=True)
    count = len(files)
    assert count >= WARM + 2 * COMPARED, f"{count} conversions are too few to compare"
    first, last = (median(part) for part in (resident[WARM:][:COMPARED], resident[-COMPARED:]))
    growth = last / first - 1
    return {
        "conversions": count,
        "with_differing_bytes": differing,
        "rss_mib_after": {n + 1: resident[n] >> 20 for n in (0, WARM, count // 2, count - 1)},
        "rss_mib_median": {"after the warm-up": int(first) >> 20, "last": int(last) >> 20},
        "rss_mib_most": max(resident) >> 20,
        "rss_growth": round(growth, 4),
        "open_files_after": {n + 1: files[n] for n in (0, WARM, count - 1)},
        "passed": growth < 0.05 and files[-1] <= files[WARM] and not differing,
    }
