"""Whether a model directory is whole, and is the model that its config.json describes.

`checkpoint/verify.py` looks at files, headers and values; here they are held against the
architecture, the tokenizer and the records of the validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.calibration import load_tokenizer
from pipeline.checkpoint.gptq_settings import settings_of
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.verify import verify_directory
from pipeline.errors import CheckpointError
from pipeline.evaluate.reference import Reference
from pipeline.models import ARCHITECTURES, Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import build_skeleton, expected_shapes, geometry_of, model_config
from pipeline.stages.units import ORIGINAL_FILE, REFERENCE_FILE

DENSE = ("BF16", "F16", "F32")
MOST = 20
"""Missing or superfluous tensors that are named; more are counted."""


def verify_model(
    path: Path, progress: Callable[[str], None] = lambda _message: None
) -> list[Problem]:
    """All that is wrong with a model directory; an empty list when nothing is.

    On top of `verify_directory`: names, shapes and types of all tensors against the architecture
    (so that no expert is missing in any layer), what is quantised against config.json, a tokenizer
    that fits the vocabulary, and the records of the validation.  Directories of headers alone and
    models of unknown architectures are checked by `verify_directory` only.
    """
    return verify_directory(path, progress, partial(_against_architecture, path, progress))


def _against_architecture(
    path: Path, progress: Callable[[str], None], checkpoint: Checkpoint
) -> list[Problem]:
    architecture = ARCHITECTURES.get(str(checkpoint.config.get("model_type")))
    if architecture is None or checkpoint.headers_only:
        return []
    progress("tensors against the architecture")
    problems: list[Problem] = []
    try:
        geometry = geometry_of(architecture, checkpoint.config, str(path))
        problems += _tensors(checkpoint, architecture, geometry)
        problems += _tokenizer(path, geometry)
        problems += _records(path, geometry)
    except CheckpointError as error:
        problems.append(Problem("config.json", str(error)))
    return problems


def _tensors(
    checkpoint: Checkpoint, architecture: Architecture, geometry: Geometry
) -> list[Problem]:
    wanted = expected_shapes(checkpoint, architecture, geometry)
    try:
        checkpoint.check_states()
    except CheckpointError:
        return []  # told of by `verify_directory`
    weights = checkpoint.weights
    ignored = tuple(f"{part}." for part in architecture.ignored)
    extra = [name for name in weights if name not in wanted and not name.startswith(ignored)]
    missing = [name for name in wanted if name not in weights]
    found = [*_listed(missing, "is missing"), *_listed(extra, "has no place in the model")]
    ours = _written_here(checkpoint)
    linear = _linear_modules(checkpoint, architecture, wanted) if ours else set()
    for name, shape in wanted.items():
        weight = weights.get(name)
        if weight is None:
            continue
        part = next(iter(weight.parts.values()))
        if weight.shape != shape:
            what = f"is {list(weight.shape or ())}, config.json asks for {list(shape)}"
            found.append(Problem(part.file, what, name))
        if weight.format != "dense":
            continue
        if part.dtype not in DENSE or (ours and part.dtype != "BF16"):
            what = f"is {part.dtype}, {'BF16' if ours else 'a floating type'} was expected"
            found.append(Problem(part.file, what, name))
        if name in linear and _is_quantised(name.removesuffix(".weight"), checkpoint):
            found.append(Problem(part.file, "is dense, config.json says that it is packed", name))
    return found


def _listed(names: list[str], what: str) -> list[Problem]:
    found = [Problem("config.json", what, name) for name in names[:MOST]]
    if len(names) > MOST:
        found.append(Problem("config.json", f"and {len(names) - MOST} more: {what}"))
    return found


def _linear_modules(
    checkpoint: Checkpoint, architecture: Architecture, wanted: Mapping[str, object]
) -> set[str]:
    """Names of the weights of linear modules, experts' included: what can be quantised."""
    skeleton = build_skeleton(model_config(checkpoint.config), torch.float32)
    found = {f"{name}.weight" for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    return found | {name for name in wanted if f".{architecture.experts}." in name}


def _written_here(checkpoint: Checkpoint) -> bool:
    """Whether its config.json says that it was packed by this program, which leaves bf16."""
    meta = (checkpoint.config.get("quantization_config") or {}).get("meta")
    return isinstance(meta, Mapping) and "requant:" in str(meta.get("quantizer"))


def _is_quantised(module: str, checkpoint: Checkpoint) -> bool:
    settings = checkpoint.config.get("quantization_config") or {}
    if settings.get("quant_method") not in ("gptq", "awq"):
        return False
    return settings_of(module, settings).quantized


def _tokenizer(path: Path, geometry: Geometry) -> list[Problem]:
    """A tokenizer is there and gives no token that the model has not got."""
    try:
        tokens = load_tokenizer(path).vocabulary().values()
    except CheckpointError as error:
        return [Problem("tokenizer.json", str(error))]
    highest = max(tokens, default=-1)
    if highest >= geometry.vocabulary:
        what = f"gives token {highest}, the model's vocabulary has {geometry.vocabulary}"
        return [Problem("tokenizer.json", what)]
    return []


def _records(path: Path, geometry: Geometry) -> list[Problem]:
    found = []
    for name in (REFERENCE_FILE, ORIGINAL_FILE):
        if not (path / name).exists():
            continue
        try:
            record = Reference.load(path / name)
        except CheckpointError as error:
            found.append(Problem(name, str(error)))
            continue
        if record.vocabulary != geometry.vocabulary:
            what = f"is of a vocabulary of {record.vocabulary}, the model's has"
            found.append(Problem(name, f"{what} {geometry.vocabulary}"))
    return found
