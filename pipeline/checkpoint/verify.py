"""Whether a directory is whole and says of itself what is true."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.checkpoint.index import INDEX_NAME
from pipeline.checkpoint.names import ExpertName, expert_of
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.seal import seal_problems
from pipeline.checkpoint.shard_map import MAP_NAME, MappedFile, mapped_files, read_shard_map
from pipeline.checkpoint.sums import SUMS_NAME, check_sums, read_sums
from pipeline.collection import set_aside
from pipeline.errors import CheckpointError
from pipeline.threads import share_interpreter, single_threads

THREADS = min(16, os.cpu_count() or 1)
"""Batches of weights checked at once."""

OTHER_FILES = ("validation_reference.safetensors", "validation_original.safetensors")
"""safetensors files that hold no weights of the model."""


def verify_directory(
    path: Path,
    progress: Callable[[str], None] = lambda _message: None,
    further: Callable[[Checkpoint], list[Problem]] = lambda _checkpoint: [],
) -> list[Problem]:
    """All that is wrong with a model directory; an empty list when nothing is.

    Checksums (where there is a SHA256SUMS), the seals of files outside it, headers and index both
    ways, shard_map.json (where there is one), config.json against the tensors, and every value:
    scales finite and of a sign that makes sense, zeros and groups in range, weights finite.  Reads
    all bytes for the sums and again what values can be judged by (packed codes cannot).  A
    directory of headers only is checked by its headers.
    `progress` is told of each file and each batch of weights, from several threads.  `further` is
    asked last, for what else is wrong with a directory that could be opened.
    """
    share_interpreter()
    with ThreadPoolExecutor(1, thread_name_prefix="sums") as beside:
        # Digests keep other processors busy than headers do.
        sealed = (path / SUMS_NAME).exists()
        sums = beside.submit(check_sums, path, progress=progress) if sealed else None
        rest = _contents(path, progress, further)
        return [*(sums.result() if sums is not None else []), *rest]


def _contents(
    path: Path,
    progress: Callable[[str], None],
    further: Callable[[Checkpoint], list[Problem]],
) -> list[Problem]:
    """What `verify_directory` finds besides checksums."""
    problems = seal_problems(path)
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        return [*problems, Problem(str(path), str(error))]
    with set_aside():
        problems += _opened(checkpoint, progress, further)
    checkpoint.close()
    return problems


def _opened(
    checkpoint: Checkpoint,
    progress: Callable[[str], None],
    further: Callable[[Checkpoint], list[Problem]],
) -> list[Problem]:
    batches = [] if checkpoint.headers_only else _batches(checkpoint)
    with single_threads(THREADS, "values") as pool:
        checked = pool.map(checkpoint.problems, batches)
        # Meanwhile, as it takes one processor.
        problems = [Problem("config.json", what) for what in checkpoint.describe().conflicts]
        problems += _index_problems(checkpoint)
        problems += _map_problems(checkpoint)
        others = further(checkpoint)
        try:
            for number, (names, found) in enumerate(zip(batches, checked, strict=True), 1):
                progress(f"values of {names[0]}, {number} of {len(batches)}")
                problems += found
        except CheckpointError as error:  # the config makes no sense, or a file has changed
            problems.append(Problem(str(checkpoint.path), str(error)))
    return problems + others


def _batches(checkpoint: Checkpoint) -> list[list[str]]:
    """Names of weights to be read together: a layer's experts, or one other."""
    batches: dict[str | int, list[str]] = defaultdict(list)
    for name in checkpoint.weights:
        expert = expert_of(name)
        batches[name if expert is None else expert.layer].append(name)
    return list(batches.values())


def _index_problems(checkpoint: Checkpoint) -> list[Problem]:
    problems = []
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        if path.name not in checkpoint.headers and path.name not in OTHER_FILES:
            problems.append(
                Problem(path.name, "belongs to no model here; the index has not got it")
            )
    said = checkpoint.indexed_size
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    if said is not None and said != total:
        problems.append(Problem(INDEX_NAME, f"total_size is {said}, the tensors make {total}"))
    return problems


def _map_problems(checkpoint: Checkpoint) -> list[Problem]:
    if not (checkpoint.path / MAP_NAME).exists():
        return []
    try:
        listed = mapped_files(read_shard_map(checkpoint.path))
    except CheckpointError as error:
        return [Problem(MAP_NAME, f"cannot be read ({error})")]
    problems = [
        Problem(MAP_NAME, f"{name} is listed in one of it and the index, not in both")
        for name in sorted(listed.keys() ^ checkpoint.headers.keys())
    ]
    for name in sorted(listed.keys() & checkpoint.headers.keys()):
        problems += _mapped_file(checkpoint, name, listed[name])
    return problems + _mapped_digests(checkpoint, listed.values())


def _mapped_digests(checkpoint: Checkpoint, files: Iterable[MappedFile]) -> list[Problem]:
    """Digests in the map against those in SHA256SUMS, which the files are held against."""
    if checkpoint.headers_only or not (checkpoint.path / SUMS_NAME).exists():
        return []
    try:
        sums = read_sums(checkpoint.path)
    except CheckpointError:
        return []  # told of by `check_sums`
    return [
        Problem(MAP_NAME, f"the sha256 of {file.name} is not the one in {SUMS_NAME}")
        for file in files
        if file.sha256 not in (None, sums.get(file.name))
    ]


def _mapped_file(checkpoint: Checkpoint, name: str, file: MappedFile) -> list[Problem]:
    header = checkpoint.headers[name]
    problems = []
    if not header.headers_only and file.nbytes != header.size:
        problems.append(
            Problem(MAP_NAME, f"{name} is said to be {file.nbytes} bytes, not {header.size}")
        )
    names = [entry.name for entry in header.entries]
    if file.kind == "experts" and _all_of_layer(names, file.layer):
        return problems
    for entry in header.entries:
        expert = expert_of(entry.name)
        layer = None if expert is None else expert.layer
        kind = "nonexpert" if expert is None else "experts"
        if (file.kind, file.layer) != (kind, layer):
            problems.append(
                Problem(name, f"of class {kind}, layer {layer}, against {MAP_NAME}", entry.name)
            )
    return problems


def _all_of_layer(names: Sequence[str], layer: int | None) -> bool:
    """Whether what they begin with makes all of them experts' tensors of a layer."""
    stem, found, _ = names[0].partition(".experts.") if names else ("", "", "")
    start = f"{stem}.experts."
    if not found or layer is None or expert_of(f"{start}0.x") != ExpertName(layer, 0, "x"):
        return False
    if not all(name.startswith(start) and name != start for name in names):
        return False
    rest = "\n".join(names).replace(start, "")
    # Behind the list these could make a name another layer's, or a draft head's.
    return "layers." not in rest and "mtp" not in rest
