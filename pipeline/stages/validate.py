"""Stage 4: load the result hybrid and measure it against the record of its source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from pipeline import __version__, hybrid
from pipeline.checkpoint.index import read_json
from pipeline.checkpoint.names import expert_of
from pipeline.checkpoint.seal import with_digest
from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.checkpoint.writer import write_json
from pipeline.errors import CheckpointError, OutputError, ResourceError
from pipeline.evaluate.metrics import compare_each
from pipeline.evaluate.reference import Reference
from pipeline.evaluate.speed import measure, reset_peaks, timed
from pipeline.hybrid.ledger import Experts, ledger
from pipeline.hybrid.native.library import name as kernel_name
from pipeline.hybrid.placing import by_request
from pipeline.hybrid.use import UseCounter
from pipeline.models.skeleton import model_config
from pipeline.progress import size
from pipeline.quantize.precision import float32_products
from pipeline.report.build import (
    REPORT_FILE,
    existing_report,
    expert_figures,
    judge,
    measured,
    reference_figures,
)
from pipeline.report.card import write_card
from pipeline.report.optional import page_beside
from pipeline.stages.context import Context, Estimate, Job, planned
from pipeline.stages.formats import module_rules
from pipeline.stages.texts import planned_windows
from pipeline.stages.units import ORIGINAL_FILE, REFERENCE_FILE
from pipeline.workdir import CONVERSION

UNIT = "validate"
PROMPT_TOKENS = 512
DECODE_TOKENS = 64


def jobs(context: Context) -> list[Job]:
    """One unit: quality, then speed."""
    validate, g = context.recipe.validate_, context.geometry
    tokens = planned_windows(context.recipe) * validate.window
    active = g.layers * g.top_k * 3 * g.hidden * g.inner + g.vocabulary * g.hidden
    resident, experts = _loaded_bytes(context)
    # Logits of a window in bf16 and, in part, in float32; one layer's experts being unpacked.
    logits = 4 * validate.window * g.vocabulary
    unpacking = 2 * 3 * g.experts * g.hidden * g.inner
    on_cpu = context.device.type == "cpu"
    return [
        Job(
            "validate",
            UNIT,
            inputs=(REFERENCE_FILE,),
            outputs=(REPORT_FILE,),
            bytes_read=sum(w.elements for w in context.checkpoint.weights.values()) // 2,
            flops=2.0 * active * tokens,
            host_bytes=experts + unpacking + (resident + logits if on_cpu else 0),
            device_bytes=0 if on_cpu else _device_bytes(context, resident) + logits,
        )
    ]


def check_device_memory(context: Context) -> None:
    """ResourceError when the result could not be loaded within validate.device_memory."""
    limit, need = int(context.recipe.validate_.device_memory), _loaded_bytes(context)[0]
    what = "the weights outside the experts take"
    if context.device.type == "cuda" and need <= limit:
        need, what = _device_bytes(context, need), "loaded and at work the result takes"
    if need > limit:
        raise ResourceError(
            f"validate.device_memory is {size(limit)}, {what} {size(need)}; raise it"
        )


def _device_bytes(context: Context, weights: int) -> int:
    """What the loaded result takes of a GPU while it is validated, experts on the CPU; prompts may
    bring them where there is room for more (`hybrid/places.py`)."""
    homes = by_request({i: LayerExperts(1, 1) for i in context.geometry.moe_layers}, "cpu")
    found = ledger(
        model_config(context.checkpoint.config),
        context.geometry,
        weights,
        Experts(homes),
        length=max(context.recipe.validate_.window, PROMPT_TOKENS + DECODE_TOKENS),
    )
    return found.total


def _loaded_bytes(context: Context) -> tuple[int, int]:
    """Bytes of the loaded result: outside the routed experts, and in them."""
    a, recipe = context.architecture, context.recipe.requantize
    rules = module_rules(a, recipe.modules)
    packed = tuple(f".{module}.weight" for module in rules.quantized)
    group = recipe.group_size if recipe.group_size > 0 else context.geometry.inner
    bits = recipe.bits + 32 / group  # scale and zero, 16 bits each
    resident = experts = 0.0
    for name, weight in context.checkpoint.weights.items():
        if expert_of(name) is not None:
            experts += weight.elements * bits / 8
        elif not name.startswith(tuple(f"{part}." for part in a.ignored)):
            resident += weight.elements * (bits / 8 if name.endswith(packed) else 2)
    return int(resident), int(experts)


class Validation:
    """The stage; see the module's text."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def run(self, job: Job) -> None:
        """Validate the finished output, unless its report already answers the same question."""
        validate = self._context.recipe.validate_
        if not (self._context.output / CONVERSION).is_file():
            raise OutputError(
                f"{self._context.output} is not finished; run the earlier stages first"
            )
        thresholds = validate.thresholds.model_dump()
        report = answer(self._context)
        if report is not None:
            report = with_digest(report | verdict(report, thresholds))
        else:
            report = validate_model(
                self._context.output,
                device_memory=int(validate.device_memory),
                thresholds=thresholds,
                progress=self._context.progress,
                estimate=self._context.estimates.get("validate"),
            )
        write_json(self._context.output / REPORT_FILE, report)
        page_beside(self._context.output)
        write_card(self._context.output)

    def close(self) -> None:
        """Nothing is held."""


def answer(context: Context) -> dict[str, Any] | None:
    """The report beside the output, if it answers what this recipe asks on this machine."""
    report = existing_report(context.output)
    limit = int(context.recipe.validate_.device_memory)
    same = report is not None and report.get("question") == _question(context.output, limit)
    return report if same else None


def validate_model(
    model: Path,
    *,
    device_memory: int,
    thresholds: Mapping[str, float | None],
    placement: str = "auto",
    native: bool = True,
    reference: Reference | None = None,
    original: tuple[str, Reference] | None = None,
    progress: Callable[[str], None] = lambda _message: None,
    estimate: Estimate | None = None,
) -> dict[str, Any]:
    """Measure a model directory against `reference`, or against the record it contains.

    `original`: name and predictions, on the same windows, of what the source was made from; without
    it that record serves too, if there is one and `reference` is not given.  `estimate`: what the
    plan said that this would take.  `placement`, `native`: see `hybrid.load`.  Returns the report.

    Raises CheckpointError when there is no record.
    """
    conversion = _conversion(model)
    if reference is None:
        path = model / REFERENCE_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{model} holds no {REFERENCE_FILE}; give the source it was made from with --source"
            )
        reference = Reference.load(path)
        if original is None and (model / ORIGINAL_FILE).is_file():
            name = str(conversion.get("reference", "the original"))
            original = name, Reference.load(model / ORIGINAL_FILE)
    started = time.monotonic()
    reset_peaks()  # a conversion in the same process is no part of the result
    progress("loading the model")
    loaded, load_seconds = timed(
        lambda: hybrid.load(model, device_memory=device_memory, placement=placement, native=native)
    )
    references = [reference] if original is None else [reference, original[1]]
    counter = UseCounter(loaded)
    comparison, *others = compare_each(loaded, references, progress=progress)
    counter.close()  # so that it costs the measured speed nothing
    prompt = reference.windows.token_ids[0, :PROMPT_TOKENS]
    speed = measure(loaded, prompt, decode_tokens=DECODE_TOKENS)
    placed: dict[str, Any] = loaded.hybrid_placement  # type: ignore[assignment]
    report = {
        "schema": 1,
        "model": model.name,
        "validated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **measured(comparison, speed, load_seconds),
        "reference": reference_figures(original[0] if original else None, comparison, others),
        "placement": {**placed, "use": counter.take()},
        "experts": expert_figures(conversion),
        "stages": conversion.get("stages", {})
        | {
            "validate": {
                "seconds": round(time.monotonic() - started, 3),
                "peak_host_bytes": speed.peak_host_bytes,
                "peak_device_bytes": speed.peak_device_bytes,
                **planned(estimate),
            }
        },
        "baseline": conversion.get("baseline", "the reference's source"),
        "text": dict(reference.labels),
        "machine": machine(),
        "question": _question(model, device_memory, placement, native),
    }
    return with_digest(report | verdict(report, thresholds))


def verdict(report: Mapping[str, Any], thresholds: Mapping[str, float | None]) -> dict[str, Any]:
    """The part of a report that thresholds decide."""
    failures = judge(report, thresholds)
    return {"thresholds": dict(thresholds), "failures": failures, "passed": not failures}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "host_memory": psutil.virtual_memory().total,
        "requant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
        "numpy": importlib.metadata.version("numpy"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "float32_products": ", ".join(f"{k}: {v}" for k, v in float32_products().items()),
        "tf32": "on" if float32_products()["cuda"] == "tf32" else "off",
    }


def _question(
    model: Path, device_memory: int, placement: str = "auto", native: bool = True
) -> dict[str, Any]:
    """What was measured on what: equal questions need no second measurement."""
    sums = model / "SHA256SUMS"
    identity = hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else None
    return {
        "sums": identity,
        "device_memory": device_memory,
        "placement": placement,
        "cpu_kernel": kernel_name() if native else "not asked for",
        "machine": machine(),
    }


def _conversion(model: Path) -> dict[str, Any]:
    return read_json(model, CONVERSION) if (model / CONVERSION).is_file() else {}
