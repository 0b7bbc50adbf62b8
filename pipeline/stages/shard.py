"""Stage 3: assemble, seal and name the output directory.

The weights are in place already: a file of experts a layer, and the shards of all else.  Index,
config, shard map, recipe and checksums are written, then the directory gets its final name.
`split_existing` does the same for a GPTQ or AWQ model that others made.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from pipeline import __version__
from pipeline.checkpoint.header import read_header
from pipeline.checkpoint.index import INDEX_NAME, build_index
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.seal import recipe_digests, with_digest
from pipeline.checkpoint.shard_map import MAP_NAME, LayerExperts, MappedFile, build_shard_map
from pipeline.checkpoint.split import experts_file
from pipeline.checkpoint.stored import DTYPES
from pipeline.checkpoint.sums import read_sums, sealed_files, write_sums
from pipeline.checkpoint.writer import FileRecord, write_bytes, write_json, write_safetensors
from pipeline.errors import CheckpointError, OutputError, ResourceError
from pipeline.evaluate.speed import peak_device_bytes, peak_host_bytes
from pipeline.hub.origin import origin
from pipeline.hybrid.ledger import Experts, ledger, reserve
from pipeline.hybrid.placing import by_request
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import architecture_of, geometry_of, model_config
from pipeline.progress import size
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.context import Context, Job, planned
from pipeline.stages.dequantize import CHECK_UNIT
from pipeline.stages.formats import module_rules, output_format
from pipeline.stages.nonexpert import PATTERN, Sizes, write_nonexpert
from pipeline.stages.side_files import copy_side_files, digest_side_files
from pipeline.stages.source import as_stored
from pipeline.stages.streams import drop_streams
from pipeline.stages.texts import text_licences
from pipeline.stages.units import (
    ORIGINAL_FILE,
    ORIGINAL_UNIT,
    REFERENCE_FILE,
    REFERENCE_UNIT,
    layer_unit,
)
from pipeline.workdir import CONVERSION, PEAKS, Marker, WorkDirectory

UNIT = "shard"


def jobs(context: Context) -> list[Job]:
    """One unit: it takes seconds, and its last step is the rename."""
    layers = context.geometry.moe_layers
    return [
        Job(
            "shard",
            UNIT,
            (PATTERN, *(experts_file(layer) for layer in layers)),
            (INDEX_NAME, "config.json", MAP_NAME),
        )
    ]


class Shard:
    """The stage; see the module's text."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def run(self, job: Job) -> None:
        """Assemble, seal, rename."""
        started = time.monotonic()
        context = self._context
        root = context.work.root
        layers = [
            marker
            for i in range(context.geometry.layers)
            if (marker := context.work.finished(layer_unit(i))) is not None
        ]
        units = [REFERENCE_UNIT, *([ORIGINAL_UNIT] if context.original else [])]
        last = [m for unit in units if (m := context.work.finished(unit)) is not None]
        checked = context.work.finished(CHECK_UNIT)
        if checked is None or len(last) != len(units) or len(layers) != context.geometry.layers:
            raise OutputError(f"{root}: requantize is not finished; run it first")
        context.progress("tables and checksums")
        with ThreadPoolExecutor(1, thread_name_prefix="remove") as beside:
            # Gigabytes, which take a second; no layer will be begun from them any more.
            removed = beside.submit(drop_streams, context.work)
            self._assemble(started, layers, last, checked)
            removed.result()
        context.work.publish()

    def _assemble(
        self, started: float, layers: Sequence[Marker], last: Sequence[Marker], checked: Marker
    ) -> None:
        """Write what is missing, and the seal."""
        context = self._context
        root = context.work.root
        records = {r.name: r for m in [*layers, *last] for r in m.outputs}
        nonexpert = {r: _sizes(root / r.name) for n, r in records.items() if fnmatch(n, PATTERN)}
        experts = {
            records[experts_file(i)]: (i, _sizes(root / experts_file(i)))
            for i in context.geometry.moe_layers
        }
        tokens = {m.data["layer"]: m.data.get("tokens") for m in layers}
        sealed = [
            *write_tables(root, self._config(), nonexpert, experts, tokens, context.geometry),
            *nonexpert,
            *experts,
            *(records[name] for name in (REFERENCE_FILE, ORIGINAL_FILE) if name in records),
            write_bytes(root / "recipe.yaml", context.recipe_text.encode()),
            write_bytes(
                root / "recipe.resolved.yaml",
                yaml.safe_dump(context.recipe.resolved(), sort_keys=False).encode(),
            ),
        ]
        write_json(root / CONVERSION, self._conversion(started))
        copy_side_files(context.checkpoint.path, root, checked.data["side_files"])
        seal(root, sealed)

    def close(self) -> None:
        """Nothing is held."""

    def _config(self) -> dict[str, Any]:
        context = self._context
        recipe = context.recipe.requantize
        plain = {k: v for k, v in context.checkpoint.config.items() if k != "quantization_config"}
        quantization = output_format(recipe).quantization_config(
            AffineScheme(recipe.bits, recipe.group_size, recipe.symmetric),
            module_rules(context.architecture, recipe.modules),
            __version__,
        )
        return plain | {"dtype": "bfloat16", "quantization_config": quantization}

    def _conversion(self, started: float) -> dict[str, Any]:
        """How the result was made: fingerprint, timings, statistics of every layer."""
        work = self._context.work
        markers = work.markers()
        checked = work.finished(CHECK_UNIT)
        stages: dict[str, dict[str, Any]] = {}
        for marker in markers:
            stage = stages.setdefault(marker.unit.partition("-")[0], {"seconds": 0.0})
            stage["seconds"] = round(stage["seconds"] + marker.seconds, 3)
            for peak in PEAKS:
                stage[peak] = max(stage.get(peak, 0), getattr(marker, peak))
        stages["shard"] = {
            "seconds": round(time.monotonic() - started, 3),
            "peak_host_bytes": peak_host_bytes(),
            "peak_device_bytes": peak_device_bytes(),
        }
        estimates = self._context.estimates
        stages = {name: took | planned(estimates.get(name)) for name, took in stages.items()}
        layers = [m.data for m in markers if "layer" in m.data]
        return with_digest(
            {
                "schema": 1,
                "kind": "converted",
                "method": self._context.recipe.requantize.method,
                **self._baselines(),
                "source": origin(self._context.checkpoint.path, self._context.recipe.source.model),
                "text_licences": text_licences(self._context.recipe),
                "fingerprint": work.fingerprint(),
                "source_files": checked.data["files"] if checked else {},
                "recipes": recipe_digests(work.root),
                "stages": stages,
                "layers": sorted(layers, key=lambda data: int(data["layer"])),
            }
        )

    def _baselines(self) -> dict[str, str]:
        """What the result is measured against: the source and, where it was given, the original;
        each with the form that most of it is in."""
        context = self._context
        found = {"baseline": as_stored(context.recipe.source.model, context.checkpoint)}
        if context.original is not None and context.recipe.source.reference is not None:
            found["reference"] = as_stored(context.recipe.source.reference, context.original)
        return found


def seal(root: Path, records: Sequence[FileRecord]) -> None:
    """Write SHA256SUMS; the records spare reading those files again."""
    write_sums(root, {record.name: record.sha256 for record in records})


def split_existing(model: Path, output: Path, announce: Callable[[str], None]) -> None:
    """Split a quantised model that others made; nothing is decoded or changed.

    `output` is built in a directory beside it and renamed whole.  Raises CheckpointError for a
    model whose experts are not quantised, OutputError for an output that is not ours to write.
    """
    checkpoint = Checkpoint.open(model)
    if checkpoint.headers_only:
        raise CheckpointError(f"{model} holds headers only, no weights")
    if output.resolve().is_relative_to(model.resolve()):
        raise OutputError(f"{output} is the model's own directory, or inside it; choose another")
    architecture = architecture_of(checkpoint.config, str(model))
    geometry = geometry_of(architecture, checkpoint.config, str(model))
    _check_experts(checkpoint, architecture, geometry)
    owners: dict[str, int | None] = {}
    prefixes = {
        f"{architecture.layer_prefix(i)}{architecture.experts}.": i for i in geometry.moe_layers
    }
    depth = (architecture.layer_prefix(0) + architecture.experts).count(".") + 1
    for name in checkpoint.entries:
        owners[name] = prefixes.get(".".join(name.split(".")[:depth]) + ".")
    made = {"split": str(model.resolve())}
    with WorkDirectory(output.absolute()) as work:
        work.recover()
        _refuse_conversion(work, made)
        _check_disk(work.output, sum(entry.nbytes for entry in checkpoint.entries.values()))
        work.clear()
        work.open(made)
        side = digest_side_files(model)
        experts: dict[FileRecord, tuple[int, dict[str, int]]] = {}
        for layer in geometry.moe_layers:
            announce(f"layer {layer + 1} of {geometry.layers}")
            tensors = {n: checkpoint.read(n) for n, owner in owners.items() if owner == layer}
            record = write_safetensors(work.root / experts_file(layer), tensors)
            experts[record] = (layer, {n: t.nbytes for n, t in tensors.items()})
        outside = [checkpoint.entries[n] for n, owner in owners.items() if owner is None]
        rest = {entry.name: (DTYPES[entry.dtype], entry.shape) for entry in outside}
        nonexpert = write_nonexpert(work.root, rest, checkpoint.read)
        sealed = write_tables(work.root, checkpoint.config, nonexpert, experts, {}, geometry)
        write_json(work.root / CONVERSION, with_digest({"schema": 1, "kind": "split"}))
        copy_side_files(model, work.root, side)
        seal(work.root, [*sealed, *nonexpert, *experts])
        work.publish()


def _refuse_conversion(work: WorkDirectory, made: Mapping[str, Any]) -> None:
    """A split may replace a split, finished or not; never what a conversion took hours to make."""
    done = work.output / CONVERSION
    if done.is_file() and json.loads(done.read_text()).get("kind") != "split":
        raise OutputError(f"{work.output} holds a converted model; choose another --output")
    if done.is_file():
        known = read_sums(work.output)
        strange = [name for name in sealed_files(work.output) if name not in known]
        if strange:
            raise OutputError(f"{work.output} holds {strange[0]}, which is not ours; move it away")
    if work.begun and work.fingerprint() != made:
        raise OutputError(
            f"{work.root} holds unfinished work of another run; choose another --output"
        )


def _check_disk(output: Path, need: int) -> None:
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if need > free:
        raise ResourceError(f"{parent} has {size(free)} free, the split model takes {size(need)}")


def _check_experts(checkpoint: Checkpoint, a: Architecture, geometry: Geometry) -> None:
    """Every expert is there, and quantised."""
    for layer in geometry.moe_layers:
        for expert in range(geometry.experts):
            for projection in (a.gate, a.up, a.down):
                name = f"{a.expert_module(layer, expert, projection)}.weight"
                stored = checkpoint.weights.get(name)
                if stored is None or checkpoint.convertible(name):
                    what = "missing" if stored is None else f"stored as {stored.format}"
                    raise CheckpointError(
                        f"{checkpoint.path}: expert tensor {name} is {what}; only GPTQ and"
                        " AWQ models can be split, convert others with `requant run`"
                    )


def write_tables(
    root: Path,
    config: Mapping[str, Any],
    nonexpert: Sizes,
    experts: Mapping[FileRecord, tuple[int, dict[str, int]]],
    tokens: Mapping[int, Sequence[int] | None],
    geometry: Geometry,
) -> list[FileRecord]:
    """config.json, the index and the shard map; `tokens`: per layer, tokens each expert saw."""
    files = {record.name: sizes for record, sizes in nonexpert.items()}
    files |= {record.name: sizes for record, (_, sizes) in experts.items()}
    mapped = [MappedFile(r.name, "nonexpert", None, r.size, r.sha256) for r in nonexpert]
    mapped += [
        MappedFile(r.name, "experts", layer, r.size, r.sha256) for r, (layer, _) in experts.items()
    ]
    layers = {
        layer: LayerExperts(
            geometry.experts, sum(sizes.values()) // geometry.experts, tokens.get(layer)
        )
        for layer, sizes in experts.values()
    }
    homes = by_request(layers, "zero-copy")
    sizes = {layer: known.expert_nbytes for layer, known in layers.items()}
    beside = reserve(ledger(model_config(config), geometry, 0, Experts(homes, sizes)))
    return [
        write_json(root / "config.json", config),
        write_json(root / INDEX_NAME, build_index(files)),
        write_json(root / MAP_NAME, build_shard_map(mapped, layers, beside)),
    ]


def _sizes(path: Path) -> dict[str, int]:
    """Stored bytes of every tensor of a file, from its header."""
    return {entry.name: entry.nbytes for entry in read_header(path, path.name).entries}
