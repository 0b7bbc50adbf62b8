"""Runs of a recipe in processes of their own, killed at a chosen moment.

The processes come from a fork server that has the libraries imported: a run costs no start-up.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pipeline.recipe import parse_recipe
from pipeline.run import run

MODELING = "transformers.models.qwen3_next.modeling_qwen3_next"
CHANGES = (
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (shutil, "rmtree"),
)
"""All by which the package changes what the disk shows; each call is a moment to be killed at."""


def process_context() -> multiprocessing.context.BaseContext:
    """Where the processes come from; the server starts with the first one and keeps running."""
    if torch.cuda.is_available():
        # What the server imports looks at the device, and CUDA does not survive a fork.
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.run", "bitsandbytes", MODELING])
    return context


Moment = int | tuple[str, ...]
"""A change by its number, or by parts of what describes it."""


def run_killed(
    data: dict[str, Any], text: str, until: str, kill_at: Moment | None, fresh: bool = False
) -> list[str] | None:
    """Run a recipe up to a stage; SIGKILL comes right before change `kill_at` of the disk.

    Files that are written side by side change the disk in another order every time: what must be
    a certain change is named by parts of its description, not by its number.
    Returns the changes that were made, as "what path [target]", and None for a run that was killed.
    """
    context = process_context()
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_convert, args=(theirs, data, text, until, kill_at, fresh))
    process.start()
    theirs.close()
    try:
        changes = mine.recv()
    except EOFError:
        changes = None
    process.join()
    assert process.exitcode == (-signal.SIGKILL if changes is None else 0)
    return changes


def _convert(
    answer: Connection,
    data: dict[str, Any],
    text: str,
    until: str,
    kill_at: Moment | None,
    fresh: bool,
) -> None:
    changes: list[str] = []
    lock = threading.Lock()

    def changed(function, name, path, *args, **options):
        change = " ".join([name, str(path), *map(str, args)])
        with lock:
            due = isinstance(kill_at, tuple) and all(part in change for part in kill_at)
            if due or len(changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(change)
        return function(path, *args, **options)

    for owner, name in CHANGES:
        original = getattr(owner, name)
        # a plain function, so that it still is a method of its class
        setattr(owner, name, _method(partial(changed, original, name)))
    run(parse_recipe(data, "recipe.yaml"), text, until=until, quiet=True, fresh=fresh)
    answer.send(changes)


def _method(function):
    def call(*args, **options):
        return function(*args, **options)

    return call
