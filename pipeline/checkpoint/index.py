"""Which files of a directory hold the model: model.safetensors.index.json, and its safety.

A directory may be a Hugging Face cache snapshot, whose files are links into ../../blobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.checkpoint.canonical import parse_index
from pipeline.checkpoint.stored import TensorEntry
from pipeline.checkpoint.untrusted import (
    SMALL,
    Limits,
    check_name,
    check_tensor_names,
    parse_table,
    read_limited,
    shown,
    twins,
)
from pipeline.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_LIMITS = Limits(128 << 20, 2_000_000)
"""Four times what the largest models have."""


@dataclass(frozen=True)
class Layout:
    """The files that hold the model, and the index's map where there is an index."""

    files: list[str]
    weight_map: Mapping[str, str] | None
    total_size: object = None
    """What the index says of the bytes of all tensors, whatever that is."""


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON table of the directory; CheckpointError when missing, absurd, not JSON or no table."""
    limits = INDEX_LIMITS if name == INDEX_NAME else SMALL
    try:
        data = read_limited(resolve_inside(directory, name), name, limits)
    except OSError as error:
        raise CheckpointError(f"{directory}: {name} cannot be read ({error.strerror})") from error
    return (parse_index(data, name) if name == INDEX_NAME else None) or parse_table(
        data, name, limits
    )


def read_layout(directory: Path) -> Layout:
    """The model's files by its index, or the single model.safetensors.

    Raises CheckpointError when there is neither, when the index is malformed, or when it names a
    file that is missing, lies outside the directory or is not safetensors.
    """
    if (directory / INDEX_NAME).exists():
        index = read_json(directory, INDEX_NAME)
        table = index.get("weight_map")
        files = listed_files(table)
        for file in files:
            resolve_inside(directory, file)
        metadata = index.get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        return Layout(files, table, said)
    if (directory / SINGLE_NAME).exists():
        resolve_inside(directory, SINGLE_NAME)
        return Layout([SINGLE_NAME], None)
    raise _no_model(directory)


def listed_files(weight_map: object) -> list[str]:
    """The files that an index names, sorted; CheckpointError for what no index may say."""
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{INDEX_NAME}: has no weight_map")
    if not weight_map:
        raise CheckpointError(f"{INDEX_NAME}: its weight_map is empty")
    check_tensor_names(weight_map, INDEX_NAME)
    if not set(map(type, weight_map.values())) <= {str}:
        tensor = next(name for name, file in weight_map.items() if not isinstance(file, str))
        raise CheckpointError(f"{INDEX_NAME}: {tensor} is mapped to no file name")
    files = set(weight_map.values())
    for file in sorted(files):
        _check_name(file)
    pair = twins(sorted(files))
    if pair is not None:
        raise CheckpointError(f"{INDEX_NAME}: {pair[0]} and {pair[1]} differ in case only; refused")
    return sorted(files)


def resolve_inside(directory: Path, file: str) -> Path:
    """The real path of a file of the directory.

    Raises CheckpointError when it is missing or leads outside the directory; a link may lead into
    the blobs of the same Hugging Face cache folder (`models--org--name`), nowhere else.
    """
    _check_inside(file)
    try:
        real = (directory / PurePosixPath(file)).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not in {directory}; download the model again, completely"
        ) from error
    root = directory.resolve()
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.name.startswith("models--") and (parent / "snapshots") in (root, *root.parents):
            allowed.append(parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{file}: a link to {real}, outside the model directory; refused")
    if not real.is_file():  # a pipe would be waited for, a device never end
        raise CheckpointError(f"{file}: not a regular file; refused")
    return real


def check_against(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    """Index and headers must name the same tensors in the same files; CheckpointError if not."""
    if weight_map == {name: entry.file for name, entry in entries.items()}:
        return
    for tensor, file in weight_map.items():
        entry = entries.get(tensor)
        if entry is None:
            raise CheckpointError(
                f"{INDEX_NAME}: {tensor} is said to be in {file}, whose header has no such tensor"
            )
        if entry.file != file:
            raise CheckpointError(
                f"{INDEX_NAME}: {tensor} is said to be in {file}, but is in {entry.file}"
            )
    if len(weight_map) != len(entries):
        extra = next(name for name in entries if name not in weight_map)
        raise CheckpointError(
            f"{entries[extra].file}: {extra} is not listed in {INDEX_NAME}; the files are not "
            "of one model"
        )


def build_index(files: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Contents of the index: `files` maps each file to its tensors and their bytes."""
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    total = sum(sum(tensors.values()) for tensors in files.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _check_inside(file: str) -> None:
    check_name(file, "a file's name")
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{shown(file)}: lies outside the model directory; refused")


def _check_name(file: str) -> None:
    _check_inside(file)
    if file.lower().endswith(PICKLES):
        raise CheckpointError(
            f"{file}: a pickle can run code when read; convert the model to safetensors first"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX_NAME}: {file} is not a safetensors file")


def _no_model(directory: Path) -> CheckpointError:
    if not directory.is_dir():
        return CheckpointError(f"{directory}: not a directory")
    names = sorted(path.name for path in directory.iterdir())
    pickles = [
        shown(name) for name in names if name.lower().endswith(PICKLES) and "model" in name.lower()
    ]
    if pickles:
        return CheckpointError(
            f"{pickles[0]}: a pickle can run code when read; convert the model to safetensors first"
        )
    if any(name.endswith(".gguf") for name in names):
        return CheckpointError(f"{directory}: a GGUF file, not a Hugging Face model directory")
    if any(name.endswith(".safetensors") for name in names):
        return CheckpointError(f"{directory}: {INDEX_NAME} is missing; download it too")
    return CheckpointError(f"{directory}: holds no {INDEX_NAME} and no {SINGLE_NAME}")
