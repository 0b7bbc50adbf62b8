"""Starting one job's process, ending it when its time is up, and saying how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.writer import write_bytes
from pipeline.nightly.notify import WEBHOOK
from pipeline.nightly.recipe import NightlyRecipe
from pipeline.progress import duration


@dataclass(frozen=True)
class Attempt:
    """How one attempt at a job went; `error` says why there is no `result`."""

    seconds: float
    error: str | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> dict[str, Any]:
        """What was measured; empty when nothing was."""
        found: dict[str, Any] = self.result.get("report", {})
        return found


def attempt(recipe: NightlyRecipe, name: str, folder: Path, number: int) -> Attempt:
    """Validate in a new process; its words go to `folder/NAME-NUMBER.log`.

    The process leads a group of its own, which is ended with it: after the time limit, and when
    this process is stopped.
    """
    asked, answer, log = (
        folder / f"{name}-{number}.{kind}" for kind in ("recipe.json", "result.json", "log")
    )
    write_bytes(asked, recipe.model_dump_json(indent=2).encode())
    command = [sys.executable, "-m", "pipeline.nightly.worker", str(asked), str(answer)]
    environment = {key: value for key, value in os.environ.items() if key != WEBHOOK}
    limit = recipe.time_limit_minutes * 60
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    seconds = time.monotonic() - started
    if code is None:
        return Attempt(seconds, f"took longer than its time limit of {duration(limit)}")
    if code != 0:
        return Attempt(seconds, _ending(code, log))
    result = json.loads(answer.read_text())
    if "error" in result:
        return Attempt(seconds, result["error"])
    return Attempt(seconds, None, result)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it and all it started have ended
    process.wait()


def _ending(code: int, log: Path) -> str:
    """In one line, how a process ended that left no result."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; perhaps the machine ran out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else "it said nothing"
    return f"its process ended with code {code}: {last} (see {log.name})"
