"""AWQ as AutoAWQ's GEMM kernels read it: 4-bit words packed along the output dimension.

Stored per module M with weight [out, in] and groups G of g inputs:
  M.qweight  I32 [in, out / 8]   nibble i of word c (lowest first) is output 8 c + ORDER[i]
  M.qzeros   I32 [G, out / 8]    packed alike; the zero itself, 0 ... 15
  M.scales   F16 [G, out]
weight[o, i] = scales[i // g, o] * (code[o, i] - zero[i // g, o])

There is no g_idx, no other number of bits, and `zero_point` is true: symmetric codes are stored
with the zero 8 in every group.  A group of -1 is one group of all inputs, as AutoAWQ has it.  The
scales that AWQ searches for are in the weights (and in the norms before them), not in the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.finite import UNSOUND_SCALES, require_finite, sound_scales
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.gptq_settings import ModuleSettings, settings_of_each
from pipeline.checkpoint.output import ModuleRules
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.stored import (
    DTYPES,
    State,
    StoredWeight,
    TensorEntry,
    missing_part,
    packed_weights,
    refuse_loose,
)
from pipeline.checkpoint.untrusted import shown
from pipeline.checkpoint.words import pack_words, unpack_words
from pipeline.errors import CheckpointError
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

BITS = 4
PER_WORD = 32 // BITS
PARTS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each nibble of a word, lowest nibble first."""
PLACES = tuple(ORDER.index(output) for output in range(PER_WORD))
"""Nibble of each output of a word."""
DECODE_ELEMENTS = 1 << 26
"""Elements decoded at a time (three float32 temporaries of this size)."""


@dataclass(frozen=True)
class Packing:
    """How one AWQ matrix is packed."""

    groups: int
    bits: int = BITS


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Parts of one matrix or of a batch: leading dimensions of the arrays stay in front.

    Arrays as AffineScheme says (`codes [..., out, in]`); 4 bits, and out a multiple of 8.  Raises
    ValueError for others.
    """
    codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
    rows = codes.shape[-2]
    if quantized.scheme.bits != BITS or rows % PER_WORD:
        raise ValueError(f"AWQ packs 4 bits and multiples of {PER_WORD} outputs only")
    return {
        "qweight": _pack(codes),
        "qzeros": _pack(zeros),
        "scales": scales.transpose(-1, -2).to(torch.float16).contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], scheme: AffineScheme) -> QuantizedTensor:
    """Inverse of `pack`, for one matrix or a batch with leading dimensions.

    Raises CheckpointError where scales are not representable in float16.
    """
    stored = parts["scales"]
    scales = stored.to(torch.float16)
    if stored.dtype != torch.float16 and not torch.equal(scales.to(stored.dtype), stored):
        raise CheckpointError(f"scales of type {stored.dtype} do not fit into float16")
    arrays = {
        "codes": _unpack(parts["qweight"]).transpose(-1, -2).contiguous(),
        "scales": scales.transpose(-1, -2).contiguous(),
        "zeros": _unpack(parts["qzeros"]).transpose(-1, -2).contiguous(),
    }
    return QuantizedTensor(scheme, arrays)


def _pack(values: Tensor) -> Tensor:
    """uint8 `[..., out, n]` -> int32 `[..., n, out / 8]`."""
    words = values.transpose(-1, -2).unflatten(-1, (-1, PER_WORD))
    return pack_words(words[..., list(ORDER)].flatten(-2), BITS)


def _unpack(words: Tensor) -> Tensor:
    """int32 `[..., n, out / 8]` -> uint8 `[..., n, out]`."""
    nibbles = unpack_words(words.contiguous(), BITS).unflatten(-1, (-1, PER_WORD))
    return nibbles[..., list(PLACES)].flatten(-2)


class Awq:
    """AutoAWQ's version "gemm"."""

    name = "awq"
    rank = 31
    convertible = False

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """Weights by their qweight where config.json says awq; CheckpointError for loose parts."""
        settings = config.get("quantization_config") or {}
        if settings.get("quant_method") != "awq":
            return []
        layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if layout != "gemm":
            raise CheckpointError(
                f"config.json says AWQ of the layout '{shown(layout, 40)}'; only 'gemm' can be read"
            )
        weights = packed_weights(entries, PARTS, self.name, self._state)
        refuse_loose(entries, (".qzeros", ".scales"), "qweight")
        return weights

    def _state(self, module: str, parts: Mapping[str, TensorEntry]) -> State:
        """What a module's parts make; CheckpointError where they do not fit together."""
        packed = parts["qweight"]
        for part in PARTS:
            if part not in parts:
                raise missing_part(module, part, packed.file)
        if any(len(entry.shape) != 2 for entry in parts.values()):
            raise CheckpointError(f"{packed.file}: {module} is packed in no known way")
        columns, words = packed.shape
        groups, rows = parts["scales"].shape
        if words and rows * BITS != words * 32:
            raise CheckpointError(
                f"{packed.file}: {module} is packed with {words * 32 / max(rows, 1):g} bits;"
                f" AWQ of {BITS} bits can be read"
            )
        expected = {
            "qweight": (("I32",), (columns, words)),
            "qzeros": (("I32",), (groups, words)),
            "scales": (("F16", "BF16", "F32"), (groups, rows)),
        }
        for part, entry in parts.items():
            dtypes, shape = expected[part]
            if entry.dtype not in dtypes or entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}; "
                    f"{dtypes[0]} {list(shape)} was expected"
                )
        if not groups or columns % groups:
            raise CheckpointError(
                f"{packed.file}: {module} has {groups} groups for {columns} inputs"
            )
        dtype = DTYPES[parts["scales"].dtype]
        return State((rows, columns), dtype, (groups,), Packing(groups))

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """See `pipeline.checkpoint.output.OutputFormat`."""
        return pack(quantized)

    def quantization_config(
        self, scheme: AffineScheme, rules: ModuleRules, version: str
    ) -> dict[str, Any]:
        """See `pipeline.checkpoint.output.OutputFormat`.

        AWQ readers look at `modules_to_not_convert` alone: transformers takes an entry for the end
        of a module's name, vLLM, SGLang and AutoAWQ for any part of it (docs/other-readers.md).
        """
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": [*rules.skipped, *rules.outside],
            "meta": {"quantizer": [f"requant:{version}"]},
        }

    def refusal(self, scheme: AffineScheme) -> str | None:
        """See `pipeline.checkpoint.output.OutputFormat`."""
        return None if scheme.bits == BITS else f"AWQ's format holds {BITS} bits only"

    def packed_bytes(self, scheme: AffineScheme, rows: int, columns: int) -> int:
        """See `pipeline.checkpoint.output.OutputFormat`."""
        groups = columns // scheme.group(columns)
        return rows * columns * BITS // 8 + rows * groups * (16 + BITS) // 8

    def state_part(self, weight: StoredWeight) -> str | None:
        """None: headers say all."""
        return None

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Never asked for."""
        raise NotImplementedError

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Dense `[N, out, in]` in the scales' dtype."""
        require_finite(parts["scales"], [weight.name for weight in weights], "scales")
        rows, columns = state.shape
        device = parts["qweight"].device
        out = torch.empty((len(weights), rows, columns), dtype=state.dtype, device=device)
        step = max(1, DECODE_ELEMENTS // (rows * columns))
        for start in range(0, len(weights), step):
            some = {part: values[start : start + step] for part, values in parts.items()}
            codes = _unpack(some["qweight"]).float()
            split = codes.unflatten(1, (state.details.groups, -1))
            split -= _unpack(some["qzeros"]).unsqueeze(2)
            split *= some["scales"].float().unsqueeze(2)
            out[start : start + step] = codes.transpose(1, 2)
        return out

    def quantized(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """See `pipeline.checkpoint.stored.PackedFormat`."""
        require_finite(parts["scales"], [weight.name for weight in weights], "scales")
        groups, columns = state.details.groups, state.shape[1]
        group = -1 if groups == 1 else columns // groups
        try:
            arrays = unpack(parts, AffineScheme(BITS, group, False)).arrays
        except CheckpointError as error:
            raise CheckpointError(f"{weights[0].name}: {error}") from error
        symmetric = bool((arrays["zeros"] == 1 << (BITS - 1)).all())
        return QuantizedTensor(AffineScheme(BITS, group, symmetric), arrays)

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """Whether bits, groups and scales are what config.json says."""
        settings = config.get("quantization_config") or {}
        sound = sound_scales(parts["scales"], _unpack(parts["qzeros"]) == 1 << (BITS - 1))
        found = []
        names = [weight.name.removesuffix(".weight") for weight in weights]
        said = settings_of_each(names, settings)
        for i, (weight, name) in enumerate(zip(weights, names, strict=True)):
            whats = _contradictions(weight, said[i], settings)
            if not sound[i]:
                whats.append(UNSOUND_SCALES)
            found += [Problem(weight.parts["qweight"].file, what, name) for what in whats]
        return found


def _contradictions(
    weight: StoredWeight, said: ModuleSettings, config: Mapping[str, Any]
) -> list[str]:
    if not said.quantized:
        return [f"is packed, but config.json leaves it dense ({said.because})"]
    state = weight.state
    assert state is not None
    columns, groups = state.shape[1], state.details.groups
    found = []
    if said.bits is not None and said.bits != BITS:
        found.append(f"is packed with {BITS} bits, config.json says {shown(said.bits, 40)}")
    if said.group_size is not None:
        group = columns if said.group_size == -1 else said.group_size
        if group * groups != columns:
            found.append(
                f"has {groups} groups of its {columns} inputs, config.json says group size"
                f" {said.group_size}"
            )
    if not config.get("zero_point", True):
        found.append("has zero points, config.json says zero_point: false")
    return found


FORMATS.register(Awq.name, Awq())
