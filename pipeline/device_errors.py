"""What a device can do to a run: too little memory, or gone.  Said in one line, with what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.errors import ResourceError
from pipeline.stages.context import Context, Job
from pipeline.stages.placement import smallest
from pipeline.system_errors import system_errors


@contextlib.contextmanager
def limited(context: Context) -> Iterator[None]:
    """Hold torch's GPU memory to the recipe's limit: what would exceed it fails as if there were
    no more."""
    if context.device.type != "cuda":
        yield
        return
    limit = int(context.recipe.limits.device_memory)
    numbers = [_number(device) for device in context.solvers]
    for number in numbers:
        total = torch.cuda.get_device_properties(number).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), number)
    try:
        yield
    finally:
        for number in numbers:
            torch.cuda.set_per_process_memory_fraction(1.0, number)


@contextlib.contextmanager
def device_errors(context: Context, job: Job) -> Iterator[None]:
    """Turn a device's failure within a job into ResourceError.

    Finished units are on disk and nothing else is: the same command goes on after them.  So it is
    with what the machine itself refuses (`pipeline.system_errors`).
    """
    try:
        with system_errors(_where(job), "finished layers are kept"):
            yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{_where(job)}: {_advice(context)}") from error
    except torch.AcceleratorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"{_where(job)}: the GPU failed ({reason}); finished layers are kept, give the same"
            " command again once it works"
        ) from error


def _where(job: Job) -> str:
    return job.stage if job.layer is None else f"{job.stage}, layer {job.layer}"


def _advice(context: Context) -> str:
    limit = int(context.recipe.limits.device_memory)
    least = smallest(context).device_bytes
    kept = "finished layers are kept"
    if limit > least:
        # The limit is no part of the fingerprint: with another the run still goes on.
        return (
            f"the GPU's memory ran out; {kept}, go on with --set"
            f" limits.device_memory={-(-least // 2**20)}MiB, which keeps the streams in host memory"
            " and one tile in flight"
        )
    return (
        f"the GPU's memory ran out with one tile in flight; {kept}, raise limits.device_memory or"
        " use a GPU with more memory"
    )


def _number(device: torch.device) -> int:
    """A GPU's index; "cuda" alone is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index
