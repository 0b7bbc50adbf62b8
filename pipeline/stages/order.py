"""The order of the stages; each lists its jobs and makes an executor for them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.stages import dequantize, publish, requantize, shard, units, validate
from pipeline.stages.context import JobLister, StageFactory

BUILDING = ("dequantize", "requantize", "shard")
"""Stages that make the output directory; what comes after measures and sends it."""


@dataclass(frozen=True)
class StageEntry:
    """A stage as the plan and the run see it."""

    jobs: JobLister
    make: StageFactory


STAGES: dict[str, StageEntry] = {
    "dequantize": StageEntry(dequantize.jobs, dequantize.Dequantize),
    "requantize": StageEntry(units.jobs, requantize.Requantize),
    "shard": StageEntry(shard.jobs, shard.Shard),
    "validate": StageEntry(validate.jobs, validate.Validation),
    "publish": StageEntry(publish.jobs, publish.Publication),
}
