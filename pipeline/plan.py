"""The plan is data: what a recipe will do, and everything that can be refused before doing it.

`prepare` opens the source from its headers and checks the recipe against it; `plan` lists the jobs
and checks what they need against limits and machine.  Both work on a directory of headers alone
(which is planned here to be run elsewhere, so this machine's memory is then no reason to refuse).
`run` executes the very list that `requant plan` prints.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from pipeline.calibration import check_source, read_text
from pipeline.checkpoint.reader import Checkpoint
from pipeline.collection import collection_paused
from pipeline.errors import CheckpointError, RecipeError, ResourceError
from pipeline.hub.fetch import with_headers
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import architecture_of, expected_shapes, geometry_of
from pipeline.pace import DISK_BYTES_PER_SECOND, JOB_SECONDS, PACES, matrix_rate, read_rate
from pipeline.progress import size
from pipeline.quantize.methods import QUANTIZERS
from pipeline.recipe import Recipe
from pipeline.stages.context import Context, Estimate, Job
from pipeline.stages.folding import check_folds
from pipeline.stages.formats import module_rules, output_format
from pipeline.stages.order import BUILDING, STAGES
from pipeline.stages.placement import RUNTIME_BYTES
from pipeline.stages.side_files import side_files
from pipeline.stages.source import check_original
from pipeline.stages.streams import SHARE
from pipeline.stages.texts import calibration_sources
from pipeline.stages.validate import check_device_memory
from pipeline.workdir import WorkDirectory

PACKING_SLACK = 8
"""Elements that a packed matrix may seem to have on top of its own, from filling up a word."""


@dataclass(frozen=True)
class Standing:
    """What an earlier run has left of this one's work."""

    state: Literal["new", "unfinished", "finished", "other"]
    """"other": there is an output, or unfinished work, that was made differently."""
    done: frozenset[str] = frozenset()
    """Units that need not run again."""
    reason: str = ""
    """Why a run would refuse what is there."""


NOTHING = Standing("new")


@dataclass(frozen=True)
class Plan:
    """Jobs in order, and what the machine must have for them."""

    jobs: tuple[Job, ...]
    device: str
    matrix_rate: float
    """Operations a second in float32 products on this machine, from a short probe."""
    half_rate: float
    """The same in bfloat16."""
    read_rate: float
    """Bytes of the source that are read and digested a second; an assumption without the source."""
    disk_bytes: int
    host_bytes: int
    device_bytes: int
    have: Standing = NOTHING
    """What an earlier run has done of it."""
    remarks: tuple[str, ...] = ()
    """What of the recipe has no meaning on this machine."""

    @property
    def seconds(self) -> float:
        """Estimate for all jobs."""
        return sum(self.job_seconds(job) for job in self.jobs)

    @property
    def left(self) -> tuple[Job, ...]:
        """Jobs that are still to be done."""
        return tuple(job for job in self.jobs if job.unit not in self.have.done)

    @property
    def estimates(self) -> dict[str, Estimate]:
        """By stage, what its jobs will take; memory is the most that one of them needs."""
        found = {}
        for stage in dict.fromkeys(job.stage for job in self.jobs):
            jobs = [job for job in self.jobs if job.stage == stage]
            found[stage] = Estimate(
                seconds=round(sum(map(self.job_seconds, jobs)), 3),
                host_bytes=_host(jobs),
                device_bytes=max(job.device_bytes for job in jobs),
            )
        return found

    def job_seconds(self, job: Job) -> float:
        """Estimate for one job: its operations and steps or its bytes, and its start.

        Reading, computing and writing go on side by side, so the slowest counts.  Activations that
        are saved are more to write, as often as `SHARE` allows.
        """
        pace = PACES[torch.device(self.device).type]
        work = job.flops / (pace.exact * self.matrix_rate)
        work += job.half_flops / (pace.half * self.half_rate) + job.steps * pace.step_seconds
        # What is read after the source is the result, of which nothing is known yet.
        read = job.bytes_read / (self.read_rate if job.stage in BUILDING else DISK_BYTES_PER_SECOND)
        write = job.bytes_written / DISK_BYTES_PER_SECOND
        save = min(job.bytes_scratch / DISK_BYTES_PER_SECOND, SHARE * max(work, read, write))
        return max(work, read, write + save) + JOB_SECONDS


@collection_paused()
def prepare(recipe: Recipe, text: str) -> Context:
    """Open the source and check the recipe against it; nothing is written.

    A source on the Hub that is not on this machine yet is opened by its headers alone.

    Raises CheckpointError, RecipeError or OutputError, in one line, for what can be refused now.
    """
    source = with_headers(recipe.source.model, recipe.source.revision)
    checkpoint = Checkpoint.open(source)
    architecture = architecture_of(checkpoint.config, str(source))
    geometry = geometry_of(architecture, checkpoint.config, str(source))
    side_files(source)  # refuses links to elsewhere
    _check_recipe(recipe, architecture)
    for source_text in calibration_sources(recipe):
        check_source(source_text)
    read_text(recipe.validate_.text)  # refuses what is missing, empty or not UTF-8
    shapes = expected_shapes(checkpoint, architecture, geometry)
    _check_source(checkpoint, architecture, shapes)
    _check_groups(recipe, architecture, geometry, shapes)
    if QUANTIZERS[recipe.requantize.method].folds:
        modules = recipe.requantize.modules
        check_folds(architecture, geometry, checkpoint.config, shapes, modules)
    work = WorkDirectory(Path(recipe.output.path).absolute())
    work.check()
    if work.output.resolve().is_relative_to(source.resolve()):
        raise RecipeError(f"output.path {recipe.output.path} lies inside the source directory")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original = _open_reference(recipe, checkpoint, architecture, geometry)
    others = further_devices(device)
    return Context(recipe, text, checkpoint, architecture, geometry, work, device, others, original)


def further_devices(device: torch.device) -> tuple[torch.device, ...]:
    """All other GPUs of this one's kind: another kind would give other bytes."""
    if device.type != "cuda":
        return ()
    own = torch.cuda.current_device()
    kind = torch.cuda.get_device_properties(own).name
    every = range(torch.cuda.device_count())
    same = [i for i in every if torch.cuda.get_device_properties(i).name == kind]
    return tuple(torch.device("cuda", i) for i in same if i != own)


def _open_reference(
    recipe: Recipe, checkpoint: Checkpoint, architecture: Architecture, geometry: Geometry
) -> Checkpoint | None:
    """`source.reference`, which must be the very model that the source is a form of."""
    if recipe.source.reference is None:
        return None
    path = with_headers(recipe.source.reference)
    original = Checkpoint.open(path)
    other = f"source.reference {path} is not the original of {checkpoint.path}"
    check_original(original, checkpoint.path, architecture, geometry, other)
    _check_source(original, architecture, expected_shapes(original, architecture, geometry))
    return original


def plan(context: Context, stages: Collection[str] = tuple(STAGES)) -> Plan:
    """All jobs of a run, with what they need.

    Raises ResourceError when the limits, or the machine, cannot hold the jobs of `stages`.
    """
    jobs = tuple(job for stage in STAGES.values() for job in stage.jobs(context))
    building = any(stage in BUILDING for stage in stages)
    result = Plan(
        jobs=jobs,
        device=str(context.device),
        matrix_rate=matrix_rate(context.device, torch.float32),
        half_rate=matrix_rate(context.device, torch.bfloat16),
        read_rate=_read_rate(context.checkpoint),
        disk_bytes=sum(job.bytes_written for job in jobs) + max(j.bytes_scratch for j in jobs),
        host_bytes=RUNTIME_BYTES + max(job.host_bytes for job in jobs),
        device_bytes=max(job.device_bytes for job in jobs),
        remarks=_remarks(context) if building else (),
    )
    if building:
        _check_disk(result, context)
    chosen = [job for job in jobs if job.stage in stages]
    _check_limits([job for job in chosen if job.stage in BUILDING], context)
    if "validate" in stages:
        check_device_memory(context)
    if not context.checkpoint.headers_only:
        _check_machine(chosen, context)
    return result


def as_dict(made: Plan) -> dict[str, Any]:
    """A plan as plain JSON types, a job's share of the estimate with each job."""
    jobs = [
        asdict(job) | {"seconds": made.job_seconds(job), "done": job.unit in made.have.done}
        for job in made.jobs
    ]
    return asdict(made) | {
        "seconds": made.seconds,
        "seconds_left": sum(map(made.job_seconds, made.left)),
        "jobs": jobs,
        "have": {"state": made.have.state, "reason": made.have.reason},
    }


def _check_recipe(recipe: Recipe, architecture: Architecture) -> None:
    wanted = recipe.requantize
    if QUANTIZERS.get(wanted.method) is None:
        known = ", ".join(QUANTIZERS)
        raise RecipeError(f"requantize.method {wanted.method!r} is unknown; known: {known}")
    output_format(wanted)  # refuses what cannot be stored
    for name in wanted.modules:
        if name not in architecture.module_classes:
            known = ", ".join(architecture.module_classes)
            raise RecipeError(f"requantize.modules: {name!r} is unknown; known here: {known}")
    if "experts" not in wanted.modules:
        raise RecipeError("requantize.modules must name experts: they are what runs in RAM")


def _check_source(
    checkpoint: Checkpoint, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every tensor that the model needs is there, convertible, and of the config's shape."""
    results = {w.format for n, w in checkpoint.weights.items() if not checkpoint.convertible(n)}
    for known in sorted(results):
        raise CheckpointError(
            f"{checkpoint.path} is already quantised as {known}; split it as it is with"
            " `requant shard`"
        )
    checkpoint.check_states()
    for name, shape in shapes.items():
        weight = checkpoint.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        found = weight.shape
        # Headers alone do not tell the shape of a packed matrix, but its size (see `elements`).
        if found is None and not 0 <= weight.elements - math.prod(shape) < PACKING_SLACK:
            found = (weight.elements,)
        if found is not None and tuple(found) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {tuple(found)},"
                f" config.json asks for {shape}"
            )
    ignored = tuple(f"{part}." for part in architecture.ignored)
    for name in checkpoint.weights:
        if name not in shapes and not name.startswith(ignored):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has no place in the"
                f" {architecture.model_type} model that config.json describes"
            )


def _check_groups(
    recipe: Recipe,
    architecture: Architecture,
    geometry: Geometry,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """The group size divides the inputs of all that is to be quantised, and whole words fit."""
    wanted = recipe.requantize
    matrices = {"the experts' gate and up": (geometry.inner, geometry.hidden)}
    matrices["the experts' down"] = (geometry.hidden, geometry.inner)
    for layer in range(geometry.layers):
        for module in module_rules(architecture, wanted.modules).quantized:
            name = f"{architecture.layer_prefix(layer)}{module}.weight"
            if name in shapes:
                matrices[name] = (shapes[name][0], shapes[name][1])
    words = 32 // wanted.bits
    for name, (rows, columns) in matrices.items():
        if wanted.group_size > 0 and columns % wanted.group_size:
            raise RecipeError(
                f"requantize.group_size {wanted.group_size} does not divide the {columns} inputs"
                f" of {name}"
            )
        if rows % words or columns % words:
            raise RecipeError(
                f"{name} is {rows} x {columns}, which {wanted.bits}-bit words cannot hold: both"
                f" must be multiples of {words}"
            )


def _read_rate(checkpoint: Checkpoint) -> float:
    if checkpoint.headers_only:
        return DISK_BYTES_PER_SECOND
    return read_rate([checkpoint.path / name for name in sorted(checkpoint.headers)])


def _check_disk(result: Plan, context: Context) -> None:
    """What is still to be written fits; finished units of an earlier run are on disk already."""
    parent = context.output.parent
    while not parent.exists():
        parent = parent.parent
    done = {m.unit: sum(record.size for record in m.outputs) for m in context.work.markers()}
    units = {job.unit: job.bytes_written for job in result.jobs}
    need = result.disk_bytes - sum(units.get(unit, size) for unit, size in done.items())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise ResourceError(
            f"{parent} has {size(free)} free, the plan writes {size(need)};"
            " make room or choose another output.path"
        )


def _check_limits(jobs: Sequence[Job], context: Context) -> None:
    """The recipe's limits are the conversion's; a validation has a limit of its own."""
    limits = context.recipe.limits
    for name, limit, need in (
        ("host_memory", int(limits.host_memory), _host(jobs)),
        (
            "device_memory",
            int(limits.device_memory),
            max((j.device_bytes for j in jobs), default=0),
        ),
    ):
        if need > limit and name == "device_memory":
            raise ResourceError(
                f"limits.device_memory is {size(limit)}; with the activations in host memory and"
                f" one tile of experts at a time {size(need)} are needed: raise the limit, or lower"
                " calibration.samples, which shrinks a tile's share of the tokens"
            )
        if need > limit:
            raise ResourceError(
                f"limits.{name} is {size(limit)}, the plan needs {size(need)}; raise the limit"
                " or lower calibration.samples or calibration.sequence_length"
            )


def _check_machine(jobs: Sequence[Job], context: Context) -> None:
    """The machine has the memory that the jobs need, now."""
    have = {"host memory": psutil.virtual_memory().available, "device memory": None}
    if context.device.type == "cuda":
        # What torch has taken already, to warm up say, is there for it to use again.
        free = torch.cuda.mem_get_info(context.device)[0]
        have["device memory"] = int(free + torch.cuda.memory_reserved(context.device))
    for stage in dict.fromkeys(job.stage for job in jobs):
        its = [job for job in jobs if job.stage == stage]
        need = {"host memory": _host(its), "device memory": max(job.device_bytes for job in its)}
        for what, there in have.items():
            if there is not None and need[what] > there:
                advice = (
                    "run it with --until shard here and validate on a larger machine"
                    if stage == "validate"
                    else "lower calibration.samples or calibration.sequence_length"
                )
                raise ResourceError(
                    f"{stage} needs {size(need[what])} of {what}, {size(there)} are there; {advice}"
                )


def _remarks(context: Context) -> tuple[str, ...]:
    limits = context.recipe.limits
    if context.device.type == "cuda" or "device_memory" not in limits.model_fields_set:
        return ()
    return (
        "no GPU was found: the conversion runs on the CPU, limits.device_memory limits nothing",
    )


def _host(jobs: Sequence[Job]) -> int:
    return RUNTIME_BYTES + max((job.host_bytes for job in jobs), default=0)
