"""The plan is data: what a recipe will do, and everything that can be refused before doing it.

`prepare` opens the source from its headers and checks the recipe against it; `plan` lists the jobs.
Both work on a directory of headers alone.  `run` executes the very list that `requant plan` prints.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import CheckpointError, RecipeError, ResourceError
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import architecture_of, build_skeleton, model_config
from pipeline.progress import size
from pipeline.quantize.methods import QUANTIZERS
from pipeline.recipe import Recipe
from pipeline.stages.context import Context, Job
from pipeline.stages.order import STAGES
from pipeline.workdir import WorkDirectory

RUNTIME_BYTES = 1 << 30
"""Host memory that Python, torch and transformers take before any tensor (measured: 0.7 GiB)."""

DENSE_FORMATS = frozenset({"nf4", "fp4", "int8", "dense"})
"""Formats that the pipeline converts from; the others are results already."""


@dataclass(frozen=True)
class Plan:
    """Jobs in order, and what the machine must have for them."""

    jobs: tuple[Job, ...]
    device: str
    seconds: float
    """Estimate for all jobs on this machine, from a short probe of its matrix rate."""
    disk_bytes: int
    host_bytes: int
    device_bytes: int

    def job_seconds(self, job: Job) -> float:
        """A job's share of the estimate."""
        total = sum(_work(j) for j in self.jobs)
        return self.seconds * _work(job) / total if total else 0.0


def prepare(recipe: Recipe, text: str) -> Context:
    """Open the source and check the recipe against it; nothing is written.

    Raises CheckpointError, RecipeError or OutputError, in one line, for what can be refused now.
    """
    source = locate(recipe)
    checkpoint = Checkpoint.open(source)
    architecture = architecture_of(checkpoint.config, str(source))
    try:
        geometry = architecture.geometry(checkpoint.config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}/config.json: {error} is missing or malformed") from None
    _check_recipe(recipe, architecture, geometry)
    _check_source(checkpoint, architecture, geometry)
    work = WorkDirectory(Path(recipe.output.path).absolute())
    work.check()
    if work.output.resolve().is_relative_to(source.resolve()):
        raise RecipeError(f"output.path {recipe.output.path} lies inside the source directory")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Context(recipe, text, checkpoint, architecture, geometry, work, device)


def plan(context: Context) -> Plan:
    """All jobs of a run, with what they need; refuses what machine or limits cannot hold."""
    jobs = tuple(job for stage in STAGES.values() for job in stage.jobs(context))
    result = Plan(
        jobs=jobs,
        device=str(context.device),
        seconds=_seconds(jobs, context.device),
        disk_bytes=sum(job.bytes_written for job in jobs),
        host_bytes=RUNTIME_BYTES + max(job.host_bytes for job in jobs),
        device_bytes=max(job.device_bytes for job in jobs),
    )
    _check_resources(result, context)
    return result


def as_dict(made: Plan) -> dict[str, Any]:
    """A plan as plain JSON types, a job's share of the estimate with each job."""
    jobs = [asdict(job) | {"seconds": made.job_seconds(job)} for job in made.jobs]
    return asdict(made) | {"jobs": jobs}


def locate(recipe: Recipe) -> Path:
    """The source's directory: as given, or a Hub id's snapshot in the local Hub cache."""
    model = recipe.source.model
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"source.model {model} is a file; give the model's directory")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"source.model {model} does not exist")
    try:
        return Path(
            snapshot_download(model, revision=recipe.source.revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        raise CheckpointError(
            f"source.model {model} is neither a directory nor in the local Hub cache;"
            f" download it first: hf download {model}"
        ) from None


def _check_recipe(recipe: Recipe, architecture: Architecture, geometry: Geometry) -> None:
    wanted = recipe.requantize
    if QUANTIZERS.get(wanted.method) is None:
        known = ", ".join(QUANTIZERS)
        raise RecipeError(f"requantize.method {wanted.method!r} is unknown; known: {known}")
    for name in wanted.modules:
        if name not in architecture.module_classes:
            known = ", ".join(architecture.module_classes)
            raise RecipeError(f"requantize.modules: {name!r} is unknown; known here: {known}")
    if "experts" not in wanted.modules:
        raise RecipeError("requantize.modules must name experts: they are what runs in RAM")
    group = wanted.group_size
    for what, columns in (("hidden size", geometry.hidden), ("inner size", geometry.inner)):
        if group > 0 and columns % group:
            raise RecipeError(
                f"requantize.group_size {group} does not divide the experts' {what} {columns}"
            )


def _check_source(checkpoint: Checkpoint, architecture: Architecture, geometry: Geometry) -> None:
    """Every tensor that the model needs is there, convertible, and of the config's shape."""
    formats = {w.format for w in checkpoint.weights.values()}
    for known in sorted(formats - DENSE_FORMATS):
        raise CheckpointError(
            f"{checkpoint.path} is already quantised as {known}; split it as it is with"
            " `requant shard`"
        )
    checkpoint.check_states()
    shapes = {
        architecture.gate: (geometry.inner, geometry.hidden),
        architecture.up: (geometry.inner, geometry.hidden),
        architecture.down: (geometry.hidden, geometry.inner),
    }
    names: dict[str, tuple[int, ...]] = {}
    for layer in geometry.moe_layers:
        fused = f"{architecture.layer_prefix(layer)}{architecture.experts}.gate_up_proj"
        if fused in checkpoint.weights:
            raise CheckpointError(
                f"{checkpoint.path}: {fused} stacks all experts in one tensor; only checkpoints"
                " with one tensor per expert and projection can be converted"
            )
        for expert in range(geometry.experts):
            for projection, shape in shapes.items():
                names[f"{architecture.expert_module(layer, expert, projection)}.weight"] = shape
    skeleton = build_skeleton(model_config(checkpoint.config), torch.bfloat16)
    experts = tuple(
        f"{architecture.layer_prefix(i)}{architecture.experts}." for i in geometry.moe_layers
    )
    head = f"{architecture.head}.weight"
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for name, parameter in skeleton.named_parameters():
        if not name.startswith(experts) and not (tied and name == head):
            names[name] = tuple(parameter.shape)
    for name, shape in names.items():
        weight = checkpoint.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        found = weight.shape
        if found is not None and tuple(found) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {tuple(found)},"
                f" config.json asks for {shape}"
            )


def _work(job: Job) -> float:
    """A job's cost in arbitrary units: operations, and bytes at 200 operations each."""
    return job.flops + 200.0 * (job.bytes_read + job.bytes_written) + 1e6


def _seconds(jobs: tuple[Job, ...], device: torch.device) -> float:
    """An estimate from a probe of 0.2 s: the rate of bf16 products of the size that experts have.

    Real layers reach about a third of that rate, measured on the shipped model.
    """
    n = 512
    a = torch.randn(n, n, device=device).to(torch.bfloat16)
    (a @ a).sum().item()
    rounds = 0
    started = time.perf_counter()
    while time.perf_counter() - started < 0.2:
        for _ in range(8):
            b = a @ a
        b.sum().item()
        rounds += 8
    rate = rounds * 2.0 * n**3 / (time.perf_counter() - started)
    return sum(_work(job) for job in jobs) / (rate / 3)


def _check_resources(result: Plan, context: Context) -> None:
    limits = context.recipe.limits
    parent = context.output.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if result.disk_bytes > free:
        raise ResourceError(
            f"{parent} has {size(free)} free, the plan writes {size(result.disk_bytes)};"
            " make room or choose another output.path"
        )
    available = psutil.virtual_memory().available
    for name, need, limit, have in (
        ("host_memory", result.host_bytes, int(limits.host_memory), available),
        ("device_memory", result.device_bytes, int(limits.device_memory), _device_memory(context)),
    ):
        if need > limit:
            raise ResourceError(
                f"limits.{name} is {size(limit)}, the plan needs {size(need)}; raise the limit"
                " or lower calibration.samples or calibration.sequence_length"
            )
        if need > have:
            raise ResourceError(
                f"the plan needs {size(need)} of {name.replace('_', ' ')}, {size(have)} are there;"
                " lower calibration.samples or calibration.sequence_length"
            )


def _device_memory(context: Context) -> int:
    if context.device.type != "cuda":
        return 0
    return int(torch.cuda.mem_get_info(context.device)[0])
