"""What a model directory holds: tensors as the files list them, and the weights they make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.checkpoint.problem import Problem
from pipeline.errors import CheckpointError, UserError
from pipeline.quantize.tensor import QuantizedTensor

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
"""safetensors dtype names and what torch calls them."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class TensorEntry(NamedTuple):
    """One tensor as a safetensors header lists it."""

    name: str
    file: str
    """Path relative to the model directory."""
    dtype: str
    """safetensors name, such as BF16."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class State:
    """What a weight decodes to, and what its format needs to know to do so.

    `details` is the format's own (block size, zero-point convention ...); weights of one format
    with equal `stack_key` are laid out alike and can be decoded together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stack_key: tuple[Any, ...] = ()
    details: Any = None


@dataclass(eq=False, slots=True)
class StoredWeight:
    """One logical tensor (named as a dense checkpoint names it) and the stored parts it is in.

    Some formats keep shape and dtype in tensor bytes (bitsandbytes' quant_state): these are read
    the first time `state` is asked for, so that opening a directory touches headers only.
    """

    name: str
    format: str
    """nf4, fp4, int8, dense, gptq, ..."""
    parts: dict[str, TensorEntry]
    elements: int
    """Elements of the dense tensor; exact, except for 4-bit matrices of an odd number of
    elements (rounded up) or packed into words wider than a byte."""
    known: State | None = None
    resolve: Callable[[StoredWeight], State | None] | None = field(default=None, repr=False)
    """Reads what `known` lacks; gives None where the bytes are absent (headers only)."""

    @property
    def state(self) -> State | None:
        """Shape, dtype and format details; None in a directory of headers where they are bytes.

        Raises CheckpointError when the stored description is malformed.
        """
        if self.known is None and self.resolve is not None:
            self.known = self.resolve(self)
        return self.known

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the dense tensor; None where only headers are there and they do not tell."""
        state = self.state
        return None if state is None else state.shape

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype the tensor decodes to unless another is asked for; None as for `shape`."""
        state = self.state
        return None if state is None else state.dtype

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


class StorageFormat(Protocol):
    """How one family of formats is recognised and decoded; one member a file of `formats/`."""

    name: str
    rank: int
    """Formats claim tensors in rising order; the plain one comes last and takes what is left."""
    convertible: bool
    """Whether weights of this format are a source to convert from; False: results already."""

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """The weights of this format among `entries` (those no earlier format claimed).

        Raises CheckpointError for a weight with a part missing and for a part without a weight.
        """

    def state_part(self, weight: StoredWeight) -> str | None:
        """Name of the part whose bytes `parse_state` wants; None when headers say all."""

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Shape, dtype and details from that part's bytes; CheckpointError when malformed."""

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Dense `[N, *state.shape]` in `state.dtype`, on the device the parts are on.

        `weights`: N of one stack key (their own `state` may differ in details); `parts`: stacked
        `[N, *part shape]`, all but the state part.  Raises NumericalError naming the tensor when
        a scale or a weight is NaN or Inf.
        """

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """What verification finds wrong in the values of weights laid out alike.

        `parts` as for `decode`, on the CPU; `config`: config.json.
        """


@runtime_checkable
class PackedFormat(Protocol):
    """A storage format whose weights can be multiplied by without being decoded."""

    name: str

    def quantized(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """A batch `[N, out, in]` in its quantised form, on the device the parts are on.

        Arguments as for `StorageFormat.decode`.  Raises CheckpointError naming the tensor for one
        that can only be decoded, NumericalError for scales that are not finite.
        """


def decoding_problems(
    storage: StorageFormat, weights: Sequence[StoredWeight], parts: Mapping[str, Tensor]
) -> list[Problem]:
    """The `problems` of a format whose every error shows in decoding: the first one found."""
    state = weights[0].state
    assert state is not None, "weights to be checked have been resolved"
    try:
        storage.decode(weights, state, parts)
    except UserError as error:
        return [Problem(next(iter(weights[0].parts.values())).file, str(error))]
    return []


def missing_part(weight: str, part: str, file: str) -> CheckpointError:
    """The error for a weight that lacks a part."""
    return CheckpointError(
        f"{weight} ({file}) has no {part}; the directory is incomplete, download it again"
    )


def present_parts(
    module: str, parts: Sequence[str], entries: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Those of `module.PART` that are stored, by part."""
    found = {}
    for part in parts:
        entry = entries.get(f"{module}.{part}")
        if entry is not None:
            found[part] = entry
    return found


def packed_weights(
    entries: Mapping[str, TensorEntry],
    parts: Sequence[str],
    format_name: str,
    state_of: Callable[[str, Mapping[str, TensorEntry]], State],
) -> list[StoredWeight]:
    """The weights whose codes are a tensor `qweight`, with those of `parts` that are stored.

    `state_of` (module, its parts) judges a module; it is asked once for all that are laid out
    alike, of which there are thousands.
    """
    sound: dict[tuple[tuple[str, str, tuple[int, ...]], ...], State] = {}
    weights = []
    for name in entries:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            found = present_parts(module, parts, entries)
            kind = tuple((part, e.dtype, e.shape) for part, e in found.items())
            state = sound.get(kind)
            if state is None:
                state = sound[kind] = state_of(module, found)
            elements = state.shape[0] * state.shape[1]
            weights.append(StoredWeight(f"{module}.weight", format_name, found, elements, state))
    return weights


def refuse_loose(entries: Mapping[str, TensorEntry], endings: tuple[str, ...], main: str) -> None:
    """CheckpointError for a tensor of one of these endings whose module has no `main` part."""
    for name, entry in entries.items():
        if name.endswith(endings) and f"{name.rpartition('.')[0]}.{main}" not in entries:
            raise missing_part(name.rpartition(".")[0], main, entry.file)
