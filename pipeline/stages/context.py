"""What every stage gets, and what it gives: a context in, jobs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.sums import digest_file
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.recipe import Recipe
from pipeline.stages.texts import Texts, prepare_texts
from pipeline.stages.tiling import tile_experts
from pipeline.workdir import WorkDirectory


@dataclass(frozen=True)
class Job:
    """One unit of work, as data: what it reads and writes and what it will cost."""

    stage: str
    unit: str
    """Unique name; its marker bears it."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Files, relative to the output directory."""
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_scratch: int = 0
    """Temporary files that are gone when the next job is done."""
    flops: float = 0.0
    """Operations in float32 products."""
    half_flops: float = 0.0
    """Operations in bfloat16 products."""
    steps: int = 0
    """Columns that are gone through one after another, however many rows and matrices have them."""
    host_bytes: int = 0
    """Peak anonymous host memory, estimated."""
    device_bytes: int = 0
    """Peak device memory, estimated; 0 without a device."""
    layer: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What the plan expects all jobs of a stage to take."""

    seconds: float
    host_bytes: int
    device_bytes: int


def planned(estimate: Estimate | None) -> dict[str, Any]:
    """An estimate as reports hold it beside what came of it; empty without one."""
    return {} if estimate is None else {"estimate": asdict(estimate)}


@dataclass
class Context:
    """One run: the recipe and everything that was found out before the first job."""

    recipe: Recipe
    recipe_text: str
    checkpoint: Checkpoint
    architecture: Architecture
    geometry: Geometry
    work: WorkDirectory
    device: torch.device
    others: tuple[torch.device, ...] = ()
    """Further devices of the same kind, to share the tiles of a layer with."""
    original: Checkpoint | None = None
    """`source.reference`, opened."""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """By stage; given by whoever has made a plan."""
    digest: Callable[[Path], str] = field(default=digest_file)
    """SHA-256 of a file of the source; a run begins with them before it opens the source."""
    warmed: Callable[[], None] = field(default=lambda: None)
    """Waits until what the first layer needs of the device is ready (`warm_up`)."""
    retreats: int = 0
    """How often the device's memory ran out, so that less was put on it (`placement.retreat`)."""
    progress: Callable[[str], None] = field(default=lambda _message: None)
    """Told, in a few words, what is going on inside a long job."""
    within: Callable[[float], None] = field(default=lambda _share: None)
    """Told how much of a long job is done, from 0 to 1."""

    @property
    def solvers(self) -> tuple[torch.device, ...]:
        """The devices that a layer's tiles are solved on."""
        return (self.device, *self.others)

    @property
    def tile_experts(self) -> int:
        """Experts that are decoded and solved together."""
        calibration = self.recipe.calibration
        tokens = calibration.samples * calibration.sequence_length
        return tile_experts(self.geometry, tokens, self.device)

    @cached_property
    def texts(self) -> Texts:
        """Calibration and evaluation tokens; made on first use, since planning needs none."""
        return prepare_texts(self.recipe, self.checkpoint.path, self.geometry.vocabulary)

    @property
    def output(self) -> Path:
        """The result's final place."""
        return self.work.output


class Stage(Protocol):
    """One stage; holds state between its own jobs, none that a marker could not restore."""

    def run(self, job: Job) -> None:
        """Do one job and leave its marker.  Never called for a job whose marker is in place."""

    def close(self) -> None:
        """Wait for what is still being written, release memory."""


StageFactory = Callable[[Context], Stage]
JobLister = Callable[[Context], list[Job]]
