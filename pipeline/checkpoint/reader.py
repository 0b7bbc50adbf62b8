"""A model directory, opened by its headers and read by the name of the dense tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.admission import refuse_code, refuse_unfinished
from pipeline.checkpoint.files import GAP_BYTES, Gathered, Memory, TensorFiles, fresh
from pipeline.checkpoint.finite import all_finite
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.header import FileHeader, read_header
from pipeline.checkpoint.index import check_against, read_json, read_layout, resolve_inside
from pipeline.checkpoint.lazy import LazyParts
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.stored import (
    PackedFormat,
    State,
    StorageFormat,
    StoredWeight,
    TensorEntry,
)
from pipeline.checkpoint.summary import Summary, summarise
from pipeline.checkpoint.untrusted import twins
from pipeline.collection import collection_paused
from pipeline.errors import CheckpointError
from pipeline.quantize.tensor import QuantizedTensor

LEGACY_CONFIG = "quantize_config.json"
"""Where AutoGPTQ kept what now stands in config.json's quantization_config."""
PLAIN = "dense"
"""The format of tensors that are stored as they are."""
CHECKED = 512
"""Weights checked together: some formats decode all of them to see what is wrong."""
MAX_TENSORS = 2_000_000
"""In a directory; the largest models have a quarter of that."""


@dataclass(frozen=True)
class Fetched:
    """Stored bytes of stacks of weights, not decoded yet."""

    stacks: list[list[StoredWeight]]
    bytes: Gathered

    def to(self, device: torch.device | str) -> Fetched:
        """The same with its bytes on a device; from pinned memory the copy is asynchronous."""
        return Fetched(self.stacks, self.bytes.to(device))


class Checkpoint:
    """What is on disk, read lazily; one instance may be used by several threads.

    path: the directory.  config: config.json.  entries: every stored tensor by its stored name.
    weights: every logical tensor by the name a dense checkpoint gives it
    (`model.layers.0.mlp.experts.17.gate_proj.weight`, `model.norm.weight`).  headers_only: the
    files end after their headers, so that sizes are known but nothing can be loaded.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], headers: Mapping[str, FileHeader]
    ) -> None:
        """Use `Checkpoint.open`, which checks what this takes for granted."""
        self.path = path
        self.config = config
        self.headers = headers
        self.indexed_size: object = None
        """`total_size` of the index, None where there is none."""
        self.headers_only = any(header.headers_only for header in headers.values())
        self.entries = _merge(headers.values())
        self._storage: dict[str, StorageFormat] = {}
        self._weights = self._claim()
        self._files = TensorFiles.of(path, list(headers))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._files.bytes_read

    @property
    def weights(self) -> Mapping[str, StoredWeight]:
        """Every logical tensor by its dense name."""
        return self._weights

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read all headers and check everything that headers can show.

        Raises CheckpointError, one line naming file or tensor, for files missing, truncated or
        outside the directory, headers malformed, index and headers at odds, and weights with
        parts missing, left over or of an unknown kind.
        """
        path = Path(path)
        with collection_paused():
            refuse_unfinished(path)
            layout = read_layout(path)
            config = _read_config(path)
            refuse_code(path)
            headers = _read_headers(path, layout.files)
            _check_completeness(headers)
            checkpoint = cls(path, config, {header.file: header for header in headers})
            if layout.weight_map is not None:
                check_against(layout.weight_map, checkpoint.entries)
                checkpoint.indexed_size = layout.total_size
        return checkpoint

    def _claim(self) -> dict[str, StoredWeight]:
        """Ask every format for its weights; what is left over is an error of the last one's."""
        weights: dict[str, StoredWeight] = {}
        remaining = dict(self.entries)
        for member in sorted((FORMATS[name] for name in FORMATS), key=lambda f: f.rank):
            for weight in member.claim(remaining, self.config):
                other = weights.setdefault(weight.name, weight)
                if other is not weight:
                    raise CheckpointError(
                        f"{self.path}: {weight.name} is stored twice, as {other.format} and as "
                        f"{weight.format}"
                    )
                self._storage[weight.format] = member
                if weight.known is None:
                    weight.resolve = self._read_state
                for part in weight.parts.values():
                    del remaining[part.name]
        return weights

    def load(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """One dense tensor; see `load_stack`."""
        return self.load_stack([name], device, dtype)[0]

    def load_stack(
        self,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Dense tensors of equal shape as `[N, *shape]` on `device`.

        Packed bytes travel to the device and are decoded there, all matrices of one layout in one
        call.  Values are decoded to the dtype the source was quantised from and then rounded to
        `dtype`, so that what is asked for changes no value beyond that rounding.

        Raises CheckpointError for a name that is not there, stored descriptions that are
        malformed, shapes that differ, or a directory of headers only; NumericalError for NaN, Inf.
        """
        return self.decode(self.fetch([names]).to(device), dtype)[0]

    def fetch(self, stacks: Sequence[Sequence[str]], memory: Memory = fresh) -> Fetched:
        """The stored bytes of several stacks, read into `memory` in one go and not decoded yet.

        Raises CheckpointError as `load_stack` does for what is not there or cannot be read.
        """
        found = [self._find(names) for names in stacks]
        self._resolve([weight for weights in found for weight in weights])
        return Fetched(found, self._gather([w for ws in found for w in ws], memory))

    def decode(self, fetched: Fetched, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Each stack of `fetched`, as `load_stack` gives it, on the device its bytes are on."""
        return [self._stack(weights, fetched.bytes, dtype) for weights in fetched.stacks]

    def _stack(
        self, weights: list[StoredWeight], stored: Gathered, dtype: torch.dtype | None
    ) -> Tensor:
        groups = self._groups(weights)
        first = _known(weights[0])
        for weight in weights:
            state = _known(weight)
            if state.shape != first.shape or (dtype is None and state.dtype != first.dtype):
                raise CheckpointError(
                    f"{weight.name} is {state.dtype} {list(state.shape)}, but {weights[0].name}, "
                    f"to be stacked with it, is {first.dtype} {list(first.shape)}"
                )
        dtype = dtype or first.dtype
        decoded = [self._decode([weights[i] for i in group], stored) for group in groups]
        if len(decoded) == 1:
            return decoded[0].to(dtype)
        device = stored.data.device
        out = torch.empty((len(weights), *first.shape), dtype=dtype, device=device)
        for group, values in zip(groups, decoded, strict=True):
            out[torch.tensor(group, device=device)] = values.to(dtype)
        return out

    def convertible(self, name: str) -> bool:
        """Whether the weight is a source to convert from, not a conversion's result already."""
        return self._storage[self.weights[name].format].convertible

    def is_packed(self, name: str) -> bool:
        """Whether the weight's format is one that `load_quantized` reads."""
        return isinstance(self._storage[self.weights[name].format], PackedFormat)

    def load_quantized(
        self, names: Sequence[str], device: torch.device | str = "cpu", memory: Memory = fresh
    ) -> QuantizedTensor:
        """Matrices in their quantised form, as one batch `[N, out, in]` on `device`.

        memory: where their bytes are read into; of what is on the CPU, some may stay there.
        Raises CheckpointError, naming a tensor, for one that is missing, laid out otherwise than
        the first or of a format that can only be decoded; NumericalError for NaN, Inf in scales.
        """
        weights = self._find(names)
        storage = self._storage[weights[0].format]
        if not isinstance(storage, PackedFormat):
            raise CheckpointError(
                f"{names[0]} is stored as {weights[0].format}, which can only be decoded"
            )
        parts = self.load_parts(names, device, memory)
        return storage.quantized(weights, _known(weights[0]), parts)

    def load_parts(
        self, names: Sequence[str], device: torch.device | str = "cpu", memory: Memory = fresh
    ) -> dict[str, Tensor]:
        """The stored parts of equally laid out weights, undecoded: part -> `[N, *part shape]`."""
        weights = self._find(names)
        self._resolve(weights)
        odd = next((w for w in weights if self._layout(w) != self._layout(weights[0])), None)
        if odd is not None:
            raise CheckpointError(f"{odd.name} is not laid out as {weights[0].name}")
        return self._parts(weights, self._gather(weights, memory).to(device))

    def read(self, name: str) -> Tensor:
        """One stored tensor by its stored name (`...qweight`), as it is, on the CPU."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: no tensor is stored as {name}")
        self._require_data()
        entries = [self.entries[name]]
        return self._files.gather(entries).stack(entries)[0]

    def problems(self, names: Sequence[str]) -> list[Problem]:
        """What is wrong with the values of these weights, laid out alike or not."""
        weights = self._find(names)
        try:
            self._resolve(weights)
        except CheckpointError as error:
            return [Problem(str(self.path), str(error))]
        stored = [self._stored_parts(weight) for weight in weights]
        # A matrix's small parts lie beside its neighbours': together they take fewer reads.
        parts = [part for its in stored for part in its.values()]
        small = self._files.gather([part for part in parts if part.nbytes <= GAP_BYTES])
        found = []
        for group in self._groups(weights):
            for first in range(0, len(group), CHECKED):
                part = group[first : first + CHECKED]
                some, its = [weights[i] for i in part], [stored[i] for i in part]
                storage = self._storage[some[0].format]
                plain = some[0].format == PLAIN  # of which no more can be said
                if not (plain and all(all_finite(self._files.pieces(p["data"])) for p in its)):
                    lazy = LazyParts(its, self._files, small)
                    found += storage.problems(some, lazy, self.config)
        return found

    def check_states(self, names: Iterable[str] | None = None) -> None:
        """Read and check every stored description now (one per matrix), not at first use.

        Raises CheckpointError for the first malformed one; does nothing on headers only.
        """
        if not self.headers_only:
            chosen = self.weights.values() if names is None else self._find(list(names))
            with collection_paused():
                self._resolve([weight for weight in chosen if weight.known is None])

    def describe(self) -> Summary:
        """Formats, bytes, experts, layers and oddities, from headers alone."""
        return summarise(self.weights, self.config, self.headers)

    def close(self) -> None:
        """Close the files; a later load opens them again."""
        self._files.close()

    def _find(self, names: Sequence[str]) -> list[StoredWeight]:
        if not names:
            raise ValueError("no tensor names given")
        self._require_data()
        missing = next((name for name in names if name not in self.weights), None)
        if missing is not None:
            raise CheckpointError(f"{self.path}: has no tensor {missing}")
        return [self.weights[name] for name in names]

    def _require_data(self) -> None:
        if self.headers_only:
            raise CheckpointError(
                f"{self.path}: holds headers only, no weights; it can be planned with, not loaded"
            )

    def _read_state(self, weight: StoredWeight) -> State | None:
        if self.headers_only:
            return None
        self._resolve([weight])
        return weight.known

    def _resolve(self, weights: Sequence[StoredWeight]) -> None:
        """Read the descriptions that are tensor bytes, together where they lie together."""
        todo = [weight for weight in weights if weight.known is None]
        entries = []
        for weight in todo:
            part = self._storage[weight.format].state_part(weight)
            assert part is not None, f"{weight.format} knows no state of {weight.name}"
            entries.append(weight.parts[part])
        for weight, data in zip(todo, self._files.read(entries), strict=True):
            weight.known = self._storage[weight.format].parse_state(weight, data)

    def _stored_parts(self, weight: StoredWeight) -> dict[str, TensorEntry]:
        """What decoding reads: all parts but the description, which is known already."""
        skipped = self._storage[weight.format].state_part(weight)
        return {part: entry for part, entry in weight.parts.items() if part != skipped}

    def _gather(self, weights: Sequence[StoredWeight], memory: Memory = fresh) -> Gathered:
        entries = [entry for weight in weights for entry in self._stored_parts(weight).values()]
        return self._files.gather(entries, memory)

    def _parts(self, weights: Sequence[StoredWeight], stored: Gathered) -> dict[str, Tensor]:
        return {
            part: stored.stack([weight.parts[part] for weight in weights])
            for part in self._stored_parts(weights[0])
        }

    def _groups(self, weights: Sequence[StoredWeight]) -> list[list[int]]:
        """Positions of weights that can be read and decoded together."""
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, weight in enumerate(weights):
            groups[self._layout(weight)].append(index)
        return list(groups.values())

    def _layout(self, weight: StoredWeight) -> tuple[Any, ...]:
        """Equal for weights that can be read and decoded together."""
        state = _known(weight)
        skipped = self._storage[weight.format].state_part(weight)
        parts = [(p, e.dtype, e.shape) for p, e in weight.parts.items() if p != skipped]
        return weight.format, state.shape, state.dtype, state.stack_key, *parts

    def _decode(self, weights: Sequence[StoredWeight], stored: Gathered) -> Tensor:
        storage = self._storage[weights[0].format]
        return storage.decode(weights, _known(weights[0]), self._parts(weights, stored))


def _known(weight: StoredWeight) -> State:
    assert weight.known is not None, f"{weight.name} has not been resolved"
    return weight.known


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, "config.json")
    if "quantization_config" not in config and (path / LEGACY_CONFIG).exists():
        legacy = read_json(path, LEGACY_CONFIG)
        config["quantization_config"] = {"quant_method": "gptq", **legacy}
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise CheckpointError("config.json: quantization_config is not a table")
    return config


def _read_headers(path: Path, files: Sequence[str]) -> list[FileHeader]:
    headers: list[FileHeader] = []
    count = 0
    for file in files:
        headers.append(read_header(resolve_inside(path, file), file))
        count += len(headers[-1].entries)
        if count > MAX_TENSORS:
            raise CheckpointError(f"{path}: more than {MAX_TENSORS:,} tensors; refused")
    return headers


def _check_completeness(headers: Sequence[FileHeader]) -> None:
    """Either every file has its data or none has."""
    empty = [header.file for header in headers if header.headers_only]
    whole = [h.file for h in headers if not h.headers_only and h.data_end > h.data_start]
    if empty and whole:
        raise CheckpointError(
            f"{empty[0]}: truncated after its header, while {whole[0]} is whole; download it again"
        )


def _merge(headers: Iterable[FileHeader]) -> dict[str, TensorEntry]:
    every = [entry for header in headers for entry in header.entries]
    entries = {entry.name: entry for entry in every}
    if len(entries) != len(every):
        first: dict[str, TensorEntry] = {}
        entry, other = next((e, o) for e in every if (o := first.setdefault(e.name, e)) is not e)
        raise CheckpointError(
            f"{entry.file}: {entry.name} is in {other.file} too; the files are not of one model"
        )
    pair = twins(entries)
    if pair is not None:
        file = entries[pair[1]].file
        raise CheckpointError(f"{file}: {pair[0]} and {pair[1]} differ in case only; refused")
    return entries
