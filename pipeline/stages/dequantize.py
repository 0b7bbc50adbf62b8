"""Stage 1: check the whole source, and take its checksums.

The dense weights themselves are streamed into the next stage layer by layer; nothing is written
unless the recipe says `dequantize: {write: true}`, which makes a standard bf16 checkpoint in
`<output.path>-bf16/`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.index import build_index
from pipeline.checkpoint.names import expert_of
from pipeline.checkpoint.seal import with_digest
from pipeline.checkpoint.sums import EarlyDigests, digest_file, identity, write_sums
from pipeline.checkpoint.untrusted import expanded
from pipeline.checkpoint.writer import FileRecord, write_json, write_safetensors
from pipeline.errors import CheckpointError, OutputError
from pipeline.hub.fetch import listed_sha256
from pipeline.recipe import Recipe
from pipeline.stages.context import Context, Job
from pipeline.stages.side_files import copy_side_files, digest_side_files
from pipeline.stages.tiling import tiles
from pipeline.workdir import CONVERSION, WorkDirectory, refuse_immovable

CHECK_UNIT = "dequantize-check"
WRITE_UNIT = "dequantize-write"
THREADS = min(16, os.cpu_count() or 1)
"""Files digested, and tensors decoded, at once."""


def jobs(context: Context) -> list[Job]:
    """One pass over the source's files; another that writes bf16, where asked for."""
    files = sorted(context.checkpoint.headers)
    total = sum(w.nbytes for w in context.checkpoint.weights.values())
    listed = [Job("dequantize", CHECK_UNIT, tuple(files), (), bytes_read=total)]
    if context.recipe.dequantize.write:
        target = dense_directory(context)
        refuse_immovable(target)
        if target.exists() and not (target / CONVERSION).is_file():
            raise OutputError(f"{target} exists and was not made by requant; move it away")
        elements = sum(w.elements for w in context.checkpoint.weights.values())
        largest = 6 * context.geometry.experts * context.geometry.hidden * context.geometry.inner
        listed.append(
            Job(
                "dequantize",
                WRITE_UNIT,
                tuple(files),
                (f"../{dense_directory(context).name}/",),
                bytes_read=total,
                bytes_written=2 * elements,
                host_bytes=2 * largest,
            )
        )
    return listed


def dense_directory(context: Context) -> Path:
    """Where the bf16 checkpoint goes."""
    return context.output.with_name(context.output.name + "-bf16")


class Dequantize:
    """The stage; see the module's text."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._elsewhere = 0.0
        """Seconds of the current job that markers of its parts account for."""

    def run(self, job: Job) -> None:
        """Check the source, or write it as bf16."""
        started = time.monotonic()
        self._elsewhere = 0.0
        data = self._check() if job.unit == CHECK_UNIT else self._write()
        seconds = time.monotonic() - started - self._elsewhere
        self._context.work.finish(job.unit, [], seconds, data)

    def close(self) -> None:
        """Nothing is held."""

    def _check(self) -> dict[str, Any]:
        checkpoint = self._context.checkpoint
        checkpoint.check_states()
        stored = {n: w for n, w in checkpoint.weights.items() if expert_of(n) is None}
        paths = [checkpoint.path / name for name in sorted(checkpoint.headers)]
        with ThreadPoolExecutor(THREADS) as pool:
            digesting = [pool.submit(self._context.digest, path) for path in paths]
            # The experts are checked when they are decoded, tile by tile.
            for checked in [pool.submit(self._decodes, name) for name in stored]:
                checked.result()
            digests = [digest.result() for digest in digesting]
        for path, digest in zip(paths, digests, strict=True):
            if listed_sha256(path) not in (None, digest):
                raise CheckpointError(
                    f"{path} is not what the Hub lists; delete {path.resolve()} and run again"
                )
        formats: dict[str, int] = {}
        for weight in checkpoint.weights.values():
            formats[weight.format] = formats.get(weight.format, 0) + 1
        files = {p.name: identity(p) | {"sha256": d} for p, d in zip(paths, digests, strict=True)}
        side = digest_side_files(checkpoint.path)
        return {"files": files, "side_files": side, "formats": formats}

    def _decodes(self, name: str) -> None:
        """Raise for a tensor that cannot be decoded."""
        self._context.checkpoint.load(name)

    def _write(self) -> dict[str, Any]:
        """Write one file a layer, then the index; each file is a unit that a resumed run skips."""
        context = self._context
        target = dense_directory(context)
        made = with_digest({"schema": 1, "kind": "dequantized", "source": self._source_digests()})
        folder = context.work.internal / "bf16"
        previous = target.with_name(f".{target.name}.requant.previous")
        if _read_json(target / CONVERSION) == made and not folder.exists():
            # An earlier run made it, or this one was killed after the renaming.
            shutil.rmtree(previous, ignore_errors=True)
            return {"path": str(target)}
        folder.mkdir(exist_ok=True)
        index: dict[str, dict[str, int]] = {}
        digests: dict[str, str] = {}
        for layer in [*range(context.geometry.layers), None]:
            part = "outer" if layer is None else f"layer-{layer:03d}"
            name = f"model-{part}.safetensors"
            names = self._names(layer)
            unit = f"{WRITE_UNIT}-{name.removesuffix('.safetensors')}"
            marker = context.work.finished(unit)
            if marker is None:
                context.progress(f"writing {name} in bf16")
                started = time.monotonic()
                tensors = self._dense(layer, names)
                written = write_safetensors(folder / name, tensors, {"format": "pt"})
                record = FileRecord(f".work/bf16/{name}", written.size, written.sha256)
                nbytes = {n: t.nbytes for n, t in tensors.items()}
                seconds = time.monotonic() - started
                self._elsewhere += seconds
                marker = context.work.finish(unit, [record], seconds, {"nbytes": nbytes})
            index[name] = marker.data["nbytes"]
            digests[name] = marker.outputs[0].sha256
        write_json(folder / "model.safetensors.index.json", build_index(index))
        config = {k: v for k, v in context.checkpoint.config.items() if k != "quantization_config"}
        write_json(folder / "config.json", config | {"dtype": "bfloat16"})
        copy_side_files(context.checkpoint.path, folder, self._checked()["side_files"])
        write_json(folder / CONVERSION, made)
        write_sums(folder, digests)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        folder.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
        return {"path": str(target)}

    def _source_digests(self) -> dict[str, str]:
        files = self._checked()["files"]
        digests = {name: known["sha256"] for name, known in files.items()}
        return digests | {"config.json": digest_file(self._context.checkpoint.path / "config.json")}

    def _checked(self) -> dict[str, Any]:
        marker = self._context.work.finished(CHECK_UNIT)
        assert marker is not None, "the check comes before the writing"
        return marker.data

    def _names(self, layer: int | None) -> list[str]:
        a = self._context.architecture
        prefixes = {i: a.layer_prefix(i) for i in range(self._context.geometry.layers)}
        weights = self._context.checkpoint.weights
        if layer is not None:
            return sorted(n for n in weights if n.startswith(prefixes[layer]))
        every = tuple(prefixes.values())
        return sorted(n for n in weights if not n.startswith(every))

    def _dense(self, layer: int | None, names: list[str]) -> dict[str, Tensor]:
        """A layer's tensors, the experts decoded tile by tile, floating point ones as bf16."""
        context = self._context
        a = context.architecture
        out: dict[str, Tensor] = {}
        if layer is not None and layer in context.geometry.moe_layers:
            for experts in tiles(context.geometry.experts):
                for projection in (a.gate, a.up, a.down):
                    stack = [f"{a.expert_module(layer, e, projection)}.weight" for e in experts]
                    decoded = context.checkpoint.load_stack(stack, "cpu", torch.bfloat16)
                    out |= dict(zip(stack, decoded.unbind(), strict=True))
        for name in names:
            if name not in out:
                tensor = context.checkpoint.load(name)
                out[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        return out


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def early_digests(recipe: Recipe) -> EarlyDigests:
    """The source's digests, begun where a run has all of it before it: opening the source takes one
    processor and hardly reads."""
    files: list[Path] = []
    with suppress(OSError):  # told of by whoever opens them
        work = WorkDirectory(Path(recipe.output.path).absolute())
        source = expanded(recipe.source.model)
        if not work.begun and not work.output.exists() and source.is_dir():
            files = [f for f in sorted(source.glob("*.safetensors")) if f.is_file()]
    return EarlyDigests(files)


def check_unchanged(context: Context, files: Mapping[str, Any], begun: Path) -> None:
    """Refuse to go on with a source that is no longer the one that was checked.

    `files`: what the check's marker says of them; `begun`: what was made from them.
    """
    for name, known in files.items():
        path = context.checkpoint.path / name
        now = identity(path) if path.is_file() else {}
        same = now == {k: known[k] for k in ("size", "mtime_ns")}
        if not same and (not now or digest_file(path) != known["sha256"]):
            raise OutputError(
                f"source file {path} has changed since {begun} was begun;"
                " put the old file back, or start again with --fresh"
            )
