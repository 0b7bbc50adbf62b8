"""A big model of true geometry as `requant run` would have left it: packed experts, random codes.

Files, names, order of tensors, tables and checksums are made by the very code that makes a result;
only the numbers are drawn.  Experts are 4 bits in groups of 128, everything else is BF16.  Codes
are random words; scales make weights of the size that keeps activations, and some experts are
called more than others.  The record of the source, which validation asks for, is noise as well: it
lets `requant validate` measure its speed, and every quality that it reports is of noise.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic_geometries import Model, Shape
from synthetic_noise import Tables, bfloat16_bits, fill_gaussian, make_tables, rng_for
from torch import Tensor

from pipeline import __version__
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.output import OutputFormat
from pipeline.checkpoint.pieces import PackedTile, pack_tile, write_experts
from pipeline.checkpoint.seal import with_digest
from pipeline.checkpoint.split import experts_file
from pipeline.checkpoint.writer import FileRecord, write_json
from pipeline.evaluate.reference import Reference
from pipeline.evaluate.windows import Windows
from pipeline.models import Architecture
from pipeline.models.skeleton import architecture_of, geometry_of
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor
from pipeline.stages.formats import module_rules
from pipeline.stages.nonexpert import Sizes, write_nonexpert
from pipeline.stages.shard import seal, write_tables
from pipeline.stages.side_files import copy_side_files, digest_side_files
from pipeline.stages.units import REFERENCE_FILE
from pipeline.workdir import CONVERSION

METHODS = {"gptq": True, "awq": False}
"""Storage format -> whether a recipe's result in it is symmetric."""
GROUP = 128
TILE = 32
"""Experts made at once."""
STD = 0.02
SCALES = 1 << 16
"""Scales drawn for a kind of matrix; all of its experts take theirs from these."""
WINDOWS, LENGTH, KEPT = 2, 640, 8

Dense = Mapping[str, tuple[Shape, float, float]]
"""Tensor outside the experts -> shape, mean and standard deviation."""


@dataclass(frozen=True)
class _Task:
    """What a process must know to make layers; plain values, as they travel."""

    config: dict[str, Any]
    name: str
    experts: int
    shapes: dict[str, Shape]
    """Projection -> [out, in]."""
    output: Path
    method: str
    seed: int

    @property
    def architecture(self) -> Architecture:
        """The declaration that the config names."""
        return architecture_of(self.config, self.name)


def write_converted(
    model: Model, output: Path, dense: Dense, *, method: str, seed: int, threads: int, side: Path
) -> int:
    """Write the whole directory; returns the bytes of its tensor files.

    method: of METHODS; side: a directory whose tokenizer goes with it; threads: processes.
    """
    output.mkdir(parents=True)
    architecture = architecture_of(model.config, model.name)
    geometry = geometry_of(architecture, model.config, model.name)
    shapes = model.expert_matrices()
    task = _Task(model.config, model.name, model.experts, shapes, output, method, seed)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(threads, mp_context=fork) as pool:
        made = pool.map(partial(_layer, task), geometry.moe_layers)
        nonexpert = _nonexpert(output, dense, seed)
        experts = dict(zip(geometry.moe_layers, made, strict=True))
    calls = {layer: _calls(seed, layer, geometry.experts) for layer in geometry.moe_layers}
    rules = module_rules(architecture, ["experts"])
    quantization = _format(method).quantization_config(_scheme(method), rules, __version__)
    config = model.config | {"dtype": "bfloat16", "quantization_config": quantization}
    files = {record: (layer, sizes) for layer, (record, sizes) in experts.items()}
    tables = write_tables(output, config, nonexpert, files, calls, geometry)
    reference = _reference(geometry.vocabulary, seed).save(output / REFERENCE_FILE)
    write_json(output / CONVERSION, with_digest({"schema": 1, "kind": "synthetic"}))
    copy_side_files(side, output, digest_side_files(side))
    seal(output, [*tables, *nonexpert, *files, reference])
    return sum(record.size for record in (*nonexpert, *files))


def _layer(task: _Task, layer: int) -> tuple[FileRecord, dict[str, int]]:
    """One layer's experts, and their tensors' bytes."""
    torch.set_num_threads(1)
    architecture = task.architecture
    sizes: dict[str, int] = {}

    def name(expert: int, projection: str) -> str:
        return architecture.expert_module(layer, expert, projection)

    def tiles() -> Iterator[PackedTile]:
        kinds = _templates(task)
        rng = rng_for(task.seed, f"experts {layer}")
        for first in range(0, task.experts, TILE):
            count = min(TILE, task.experts - first)
            parts = {p: _draw(kind, count, rng) for p, kind in kinds.items()}
            for expert in range(first, first + count):
                for projection, its in parts.items():
                    stem = name(expert, projection)
                    sizes.update({f"{stem}.{k}": v[0].nbytes for k, v in its.items()})
            yield pack_tile(parts)

    record = write_experts(task.output / experts_file(layer), task.experts, name, tiles())
    return record, sizes


def _templates(task: _Task) -> dict[str, dict[str, Tensor]]:
    """Projection -> the parts of one matrix, packed by the format itself, all codes alike."""
    found = {}
    for projection, (rows, columns) in task.shapes.items():
        # Uniform codes around 8 have a standard deviation of 4.6.
        scale = STD * (2048 / columns) ** 0.5 / 4.6
        arrays = {
            "codes": torch.full((1, rows, columns), 8, dtype=torch.uint8),
            "scales": torch.full((1, rows, columns // GROUP), scale, dtype=torch.float16),
            "zeros": torch.full((1, rows, columns // GROUP), 8, dtype=torch.uint8),
        }
        quantized = QuantizedTensor(_scheme(task.method), arrays)
        found[projection] = _format(task.method).pack(quantized)
    return found


def _draw(
    template: Mapping[str, Tensor], count: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Parts [count, ...] of so many matrices."""
    parts = {name: part.expand(count, *part.shape[1:]) for name, part in template.items()}
    words = rng.integers(0, 2**64, dtype=np.uint64, size=parts["qweight"].numel() // 2)
    parts["qweight"] = torch.from_numpy(words.view(np.int32)).view(parts["qweight"].shape)
    scale = float(template["scales"].flatten()[0])
    # bfloat16 is what every reader multiplies by without another rounding
    several = np.exp(0.2 * rng.standard_normal(SCALES, dtype=np.float32)) * scale
    exact = torch.from_numpy(bfloat16_bits(several)).view(torch.bfloat16).half()
    shape = parts["scales"].shape
    index = rng.integers(0, SCALES, dtype=np.uint16, size=shape.numel())
    parts["scales"] = torch.from_numpy(exact.numpy()[index]).view(shape)
    return parts


def _nonexpert(output: Path, dense: Dense, seed: int) -> Sizes:
    """All that is no routed expert."""
    tables: Tables = make_tables()

    def read(name: str) -> Tensor:
        shape, mean, std = dense[name]
        data = np.empty(2 * int(np.prod(shape)), dtype=np.uint8)
        fill_gaussian(data, mean, std, tables, rng_for(seed, name))
        return torch.from_numpy(data).view(torch.bfloat16).view(shape)

    described = {name: (torch.bfloat16, shape) for name, (shape, _, _) in dense.items()}
    return write_nonexpert(output, described, read)


def _calls(seed: int, layer: int, experts: int) -> list[int]:
    """As a calibration would have counted: a long tail."""
    drawn = rng_for(seed, f"calls {layer}").lognormal(6.0, 1.0, experts)
    return [int(number) for number in drawn]


def _reference(vocabulary: int, seed: int) -> Reference:
    """Predictions of nobody, in the form in which a source's are kept."""
    rng = rng_for(seed, "reference")
    known = min(vocabulary, 3000)  # tokens that the tokenizer beside it has
    ids = torch.from_numpy(rng.integers(5, known, (WINDOWS, LENGTH)))
    scored = torch.ones((WINDOWS, LENGTH), dtype=torch.bool)
    scored[:, 0] = False
    positions = int(scored.sum())
    kept = rng.permuted(np.tile(np.arange(known), (positions, 1)), axis=1)[:, :KEPT]
    even = float(np.log(0.5 / KEPT))
    return Reference(
        windows=Windows(ids, scored),
        kept=torch.full((positions,), KEPT, dtype=torch.uint8),
        ids=torch.from_numpy(kept.copy()).flatten(),
        logprobs=torch.full((positions * KEPT,), even, dtype=torch.float16),
        log_rest=torch.full((positions,), float(np.log(0.5)), dtype=torch.float16),
        target=torch.full((positions,), -float(np.log(vocabulary)), dtype=torch.float32),
        top_k=KEPT,
        vocabulary=vocabulary,
        labels={"text": "random tokens"},
    )


def _scheme(method: str) -> AffineScheme:
    return AffineScheme(4, GROUP, METHODS[method])


def _format(method: str) -> OutputFormat:
    found = FORMATS[method]
    assert isinstance(found, OutputFormat)
    return found
