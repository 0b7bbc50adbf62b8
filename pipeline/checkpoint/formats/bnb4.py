"""bitsandbytes 4-bit: NF4 and FP4 blocks, with and without double quantisation.

Stored per matrix X (the layout of `bitsandbytes.functional.QuantState.as_dict(packed=True)`):
  X                                    U8 (or BF16/F16/F32 words) [bytes, 1], high nibble first
  X.absmax                             F32 [blocks], or U8 [blocks] when double quantised
  X.quant_map                          F32 [16], the table of the 16 values
  X.nested_absmax, X.nested_quant_map  F32 [ceil(blocks / nested blocksize)], F32 [256]
  X.quant_state.bitsandbytes__nf4      U8, JSON: quant_type, blocksize, dtype, shape, nested_*
Blocks run over the flattened matrix.  QLoRA, https://arxiv.org/abs/2305.14314.

Decoding goes through bitsandbytes' own functions, a whole stack in one call.  Two traps of
bitsandbytes 0.50 on CPUs with AVX512 are avoided by calling it on whole blocks as rows:
`dequantize_4bit` with the matrix's own shape takes wrong scales where a row is not a multiple of
the block size, and falls back to a `torch.compile`d path (12 s the first time) for blocks of 2048
and more.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.bnb import functional
from pipeline.checkpoint.finite import require_finite
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.stored import (
    State,
    StoredWeight,
    TensorEntry,
    decoding_problems,
    missing_part,
    present_parts,
)
from pipeline.checkpoint.untrusted import Limits, is_size, parse_table, shown
from pipeline.errors import CheckpointError

MARK = ".quant_state."
PREFIX = "bitsandbytes__"
QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PART_DTYPES = {
    "weight": ("U8", "BF16", "F16", "F32"),
    "quant_state": ("U8",),
    "quant_map": ("F32",),
    "nested_absmax": ("F32",),
    "nested_quant_map": ("F32",),
}
SIDE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SUFFIXES = tuple(f".{part}" for part in SIDE_PARTS)
KERNEL_BLOCK = 1024
"""Larger blocks are handed to bitsandbytes as several of this size with the same scale."""
STATE_LIMITS = Limits(4096, 64)
"""A quant_state has some 250 bytes and ten values."""
CALL_ELEMENTS = 1 << 30
"""bitsandbytes' CUDA kernels count elements in 32 bits."""

MAX_KNOWN = 1024
"""Descriptions kept; a model has a few."""

_OFFSET = re.compile(rb'"nested_offset": ?(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=[,}])')
_STAND_IN = b"1234567.25"


@dataclass(frozen=True)
class Blocks:
    """One matrix's quant_state."""

    quant_type: str
    block: int
    nested_block: int | None
    offset: float


class Bnb4:
    """NF4 and FP4."""

    name = "bnb4"
    rank = 10
    convertible = True

    def __init__(self) -> None:
        self._described: dict[tuple[Any, ...], State] = {}
        """By what describes matrices and their parts, `nested_offset` left out."""

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """Weights by their quant_state; CheckpointError for a part missing or left over."""
        sound: set[tuple[str, ...]] = set()
        weights = [self._weight(name, entries, sound) for name in entries if MARK in name]
        claimed = {weight.name for weight in weights}
        if len(claimed) != len(weights):
            twice = next(name for name, n in Counter(w.name for w in weights).items() if n > 1)
            raise CheckpointError(f"{twice} has two quant_states; the files are not of one model")
        for name, entry in entries.items():
            if name.endswith(SUFFIXES) and name.rpartition(".")[0] not in claimed:
                base = name.rpartition(".")[0]
                raise missing_part(base, "quant_state", entry.file)
        return weights

    def _weight(
        self, mark: str, entries: Mapping[str, TensorEntry], sound: set[tuple[str, ...]]
    ) -> StoredWeight:
        """`sound`: types of parts that have been checked; thousands of matrices have the same."""
        name, _, kind = mark.partition(MARK)
        entry = entries[mark]
        parts = {"quant_state": entry}
        packed = entries.get(name)
        if packed is not None:
            parts["weight"] = packed
        parts |= present_parts(name, SIDE_PARTS, entries)
        types = (kind, *parts, *[part.dtype for part in parts.values()])
        if types not in sound:
            self._check_parts(name, kind, parts)
            sound.add(types)
        if entry.nbytes > STATE_LIMITS.nbytes:
            raise CheckpointError(
                f"{entry.file}: {mark} has {entry.nbytes:,} bytes, more than any quant_state;"
                " refused"
            )
        quant_type = kind.removeprefix(PREFIX)
        return StoredWeight(name, quant_type, parts, 2 * parts["weight"].nbytes)

    def _check_parts(self, name: str, kind: str, parts: Mapping[str, TensorEntry]) -> None:
        """CheckpointError for parts missing or of other types than the quantisation has."""
        quant_type = kind.removeprefix(PREFIX)
        file = parts["quant_state"].file
        if kind == quant_type or quant_type not in QUANT_TYPES:
            raise CheckpointError(
                f"{file}: {name} has the unknown quantisation type {kind}; "
                f"known: {', '.join(QUANT_TYPES)}"
            )
        nested = "nested_absmax" in parts or "nested_quant_map" in parts
        for part in ("weight", *(SIDE_PARTS if nested else SIDE_PARTS[:2])):
            if part not in parts:
                raise missing_part(name, part, file)
        scales = ("U8",) if nested else ("F32",)
        for part, entry in parts.items():
            expected = scales if part == "absmax" else PART_DTYPES[part]
            if entry.dtype not in expected:
                raise CheckpointError(
                    f"{entry.file}: {entry.name} is {entry.dtype}; "
                    f"{' or '.join(expected)} was expected"
                )

    def state_part(self, weight: StoredWeight) -> str | None:
        """The quant_state, always."""
        return "quant_state"

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Checks the JSON against the sizes of the parts; CheckpointError naming the tensor."""
        offset = _OFFSET.search(data)
        if offset is None or not math.isfinite(float(offset[1])):
            return self._state(weight, data)
        # Thousands of matrices are described alike, but for this one number.
        text = b"%b%b%b" % (data[: offset.start(1)], _STAND_IN, data[offset.end(1) :])
        parts = weight.parts
        kinds = [entry[2:4] for entry in parts.values()]  # type and shape
        layout = (text, weight.format, *parts, *kinds)
        known = self._described.get(layout)
        if known is None:
            known = self._state(weight, text)
            if known.details.offset != float(_STAND_IN) or len(self._described) >= MAX_KNOWN:
                return self._state(weight, data)
            self._described[layout] = known
        same: Blocks = known.details
        details = Blocks(same.quant_type, same.block, same.nested_block, float(offset[1]))
        return State(known.shape, known.dtype, known.stack_key, details)

    def _state(self, weight: StoredWeight, data: bytes) -> State:
        entry = weight.parts["quant_state"]
        where = f"{entry.file}: {entry.name} is malformed"
        table = parse_table(data, where, STATE_LIMITS)
        try:
            shape, block = table["shape"], table["blocksize"]
            kind, dtype = table["quant_type"], DTYPES[table["dtype"]]
            nested_block, offset = None, 0.0
            if "nested_absmax" in weight.parts:
                nested_block, offset = table["nested_blocksize"], float(table["nested_offset"])
                if table["nested_dtype"] != "float32":
                    raise ValueError("nested_dtype is not float32")
            counts = [*shape, block, 1 if nested_block is None else nested_block]
            if not all(is_size(n) and n > 0 for n in counts) or not math.isfinite(offset):
                raise ValueError("impossible numbers")
            if kind != weight.format:
                raise ValueError(f"quant_type is {shown(kind, 30)}")
            if block not in BLOCK_SIZES:
                raise ValueError(f"blocksize is {block}")
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            reason = f"no proper {shown(error)}" if isinstance(error, KeyError) else shown(error)
            raise CheckpointError(f"{where} ({reason}); download the file again") from error
        self._check_sizes(weight, tuple(shape), block, nested_block)
        details = Blocks(kind, block, nested_block, offset)
        return State(tuple(shape), dtype, (kind, block, nested_block), details)

    def _check_sizes(
        self, weight: StoredWeight, shape: tuple[int, ...], block: int, nested_block: int | None
    ) -> None:
        parts = weight.parts
        packed = parts["weight"]
        elements = math.prod(shape)
        item = 1 if packed.dtype == "U8" else 4 if packed.dtype == "F32" else 2
        blocks = -(-elements // block)
        sizes = {"absmax": blocks, "quant_map": 16}
        if nested_block is not None:
            sizes |= {"nested_absmax": -(-blocks // nested_block), "nested_quant_map": 256}
        found = {part: math.prod(parts[part].shape) for part in sizes}
        if not 0 <= 2 * packed.nbytes - elements < 2 * item:
            wrong, has = "weight", f"{packed.nbytes:,} bytes"
        elif wrong := next((part for part in sizes if found[part] != sizes[part]), ""):
            has = f"{found[wrong]:,} values"
        else:
            return
        raise CheckpointError(
            f"{parts[wrong].file}: {parts[wrong].name} has {has}, which is not what its "
            f"quant_state (shape {list(shape)}, blocksize {block}) needs; download the file again"
        )

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Dense `[N, *shape]`, the values of `bitsandbytes.functional.dequantize_4bit`."""

        names = [weight.name for weight in weights]
        blocks: Blocks = state.details
        table = functional().get_4bit_type(blocks.quant_type, device="cpu")
        maps = parts["quant_map"].cpu()
        require_finite(maps, names, "quant_map values")
        for name, values in zip(names, (maps - table).abs().amax(1).tolist(), strict=True):
            if values > 1e-3:
                raise CheckpointError(f"{name}.quant_map is not the table of {blocks.quant_type}")
        absmax = self._absmax(weights, blocks, parts)
        require_finite(absmax, names, "block scales", torch.finfo(state.dtype).max)
        elements = math.prod(state.shape)
        packed = parts["weight"].reshape(len(weights), -1).view(torch.uint8)
        padding = absmax.shape[1] * blocks.block // 2 - packed.shape[1]
        if padding:
            packed = torch.nn.functional.pad(packed, (0, padding))
        dense = _decode_blocks(packed.reshape(-1), absmax.reshape(-1), blocks, state.dtype)
        return dense.view(len(weights), -1)[:, :elements].reshape(len(weights), *state.shape)

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """What decoding refuses."""
        return decoding_problems(self, weights, parts)

    def _absmax(
        self, weights: Sequence[StoredWeight], blocks: Blocks, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Block scales float32 `[N, blocks]`; nested ones are decoded for all matrices at once."""
        absmax = parts["absmax"].reshape(len(weights), -1)
        if blocks.nested_block is None:
            return absmax

        maps = parts["nested_quant_map"]
        count = absmax.shape[1]
        nested = parts["nested_absmax"].reshape(len(weights), -1)
        # Each matrix's scales are padded to whole nested blocks, so that none is shared by two.
        codes = torch.nn.functional.pad(absmax, (0, nested.shape[1] * blocks.nested_block - count))
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        one_map = bool((maps == maps[0]).all())
        for rows in [slice(None)] if one_map else [slice(i, i + 1) for i in range(len(weights))]:
            values[rows] = (
                functional()
                .dequantize_blockwise(
                    codes[rows].reshape(-1),
                    absmax=nested[rows].reshape(-1),
                    code=maps[rows][0],
                    blocksize=blocks.nested_block,
                )
                .view(-1, codes.shape[1])
            )
        offsets = [w.state.details.offset for w in weights if w.state is not None]
        values += torch.tensor(offsets, dtype=torch.float32, device=values.device)[:, None]
        # bitsandbytes takes addresses and asks for no strides
        return values[:, :count].contiguous()


def _decode_blocks(packed: Tensor, absmax: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Values `[count * block]` of uint8 `packed [count * block / 2]` and float32 `absmax [count]`.

    bitsandbytes is given rows of whole blocks (the CPU code shares rows among threads and finds
    the scale of a column as column // blocksize within the row).
    """

    bnb = functional()
    split = max(1, blocks.block // KERNEL_BLOCK)
    block = blocks.block // split
    absmax = absmax.repeat_interleave(split) if split > 1 else absmax
    out: list[Tensor] = []
    for start in range(0, absmax.numel(), CALL_ELEMENTS // block):
        scales = absmax[start : start + CALL_ELEMENTS // block]
        row = math.gcd(scales.numel(), 64)
        state = bnb.QuantState(
            absmax=scales,
            shape=torch.Size((scales.numel() // row, row * block)),
            blocksize=block,
            quant_type=blocks.quant_type,
            dtype=dtype,
        )
        part = packed[start * block // 2 : (start + scales.numel()) * block // 2]
        out.append(bnb.dequantize_4bit(part.view(-1, 1), state).reshape(-1))
    return out[0] if len(out) == 1 else torch.cat(out)


FORMATS.register(Bnb4.name, Bnb4())
