"""What a device can do to a run: too little memory, or gone.  Said in one line, with what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.errors import DeviceFull, ResourceError
from pipeline.stages.context import Context, Job
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
    """Turn a device's failure within a job into ResourceError, too little memory into DeviceFull.

    Finished units are on disk and nothing else is: the same command goes on after them.  So it is
    with what the machine itself refuses (`pipeline.system_errors`).
    """
    try:
        with system_errors(_where(job), "finished layers are kept"):
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceFull(
            f"{_where(job)}: the GPU's memory ran out with one tile in flight; finished layers are"
            " kept, raise limits.device_memory or use a GPU with more memory"
        ) from error
    except torch.AcceleratorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"{_where(job)}: the GPU failed ({reason}); finished layers are kept, give the same"
            " command again once it works"
        ) from error


def _where(job: Job) -> str:
    return job.stage if job.layer is None else f"{job.stage}, layer {job.layer}"


def _number(device: torch.device) -> int:
    """A GPU's index; "cuda" alone is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index
