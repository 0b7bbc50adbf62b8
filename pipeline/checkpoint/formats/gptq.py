"""GPTQ as AutoGPTQ laid it out: integer words packed along the input dimension.

Stored per module M with weight [out, in], `bits` b, groups G and P = 32 / b codes a word:
  M.qweight  I32 [in / P, out]   word r of a column holds inputs r*P ... r*P+P-1, lowest bits first
  M.scales   F16 [G, out]
  M.qzeros   I32 [G, out / P]    packed along out; version 1 stores zero - 1, version 2 the zero
  M.g_idx    I32 [in]            group of each input; i // group size unless act-order was used
weight[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o])

A symmetric group's scale may lie below 0 (`pipeline.quantize.grid`).

Version 1 (`checkpoint_format: gptq`) cannot hold the zero 0: the subtraction would borrow from the
neighbouring code.  A stored 2**bits - 1 means the zero 2**bits, on which readers disagree (some
mask the sum).  So zeros 1 ... 2**bits - 1 are written; the other is understood when read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.finite import UNSOUND_SCALES, require_finite, sound_scales
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.gptq_settings import ModuleSettings, quantization_config, settings_of_each
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

BITS = (2, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
DECODE_ELEMENTS = 1 << 26
"""Elements decoded at a time (four float32 temporaries of this size)."""


@dataclass(frozen=True)
class Packing:
    """How one GPTQ matrix is packed."""

    bits: int
    groups: int
    version: int
    """1: qzeros hold zero - 1; 2: the zero."""


def pack(quantized: QuantizedTensor, version: int = 1) -> dict[str, Tensor]:
    """Parts of one matrix or of a batch: leading dimensions of the arrays stay in front.

    Arrays as AffineScheme says (`codes [..., out, in]`); in and out must be multiples of
    32 / bits, group sizes divide in.  Raises ValueError for zeros the version cannot hold.
    """
    scheme = quantized.scheme
    codes, scales, zeros = (quantized.arrays[k] for k in ("codes", "scales", "zeros"))
    *batch, rows, columns = codes.shape
    group = scheme.group(columns)
    low, high = (1 if version == 1 else 0), 2**scheme.bits - 1
    if zeros.numel() and (int(zeros.min()) < low or int(zeros.max()) > high):
        raise ValueError(f"GPTQ version {version} stores zeros {low} to {high} only")
    words = 32 // scheme.bits
    if rows % words or columns % words:
        raise ValueError(f"[{rows}, {columns}] cannot be packed into words of {words} codes")
    index = torch.arange(columns, dtype=torch.int32, device=codes.device) // group
    stored = zeros.transpose(-1, -2) - (1 if version == 1 else 0)
    return {
        "qweight": pack_words(codes.contiguous(), scheme.bits).transpose(-1, -2).contiguous(),
        "qzeros": pack_words(stored.contiguous(), scheme.bits),
        "scales": scales.transpose(-1, -2).to(torch.float16).contiguous(),
        "g_idx": index.expand(*batch, columns).contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], scheme: AffineScheme, version: int = 1) -> QuantizedTensor:
    """Inverse of `pack`, for one matrix or a batch with leading dimensions.

    Raises CheckpointError where g_idx is not i // group (act-order: such matrices can be decoded,
    see `Gptq.decode`, but are no AffineScheme) scales are not
    representable in float16, or a zero is out of range.
    """
    codes = unpack_words(parts["qweight"].transpose(-1, -2), scheme.bits)
    columns = codes.shape[-1]
    group = scheme.group(columns)
    if "g_idx" in parts:
        trivial = torch.arange(columns, device=codes.device) // group
        if not bool((parts["g_idx"] == trivial).all()):
            raise CheckpointError(
                "g_idx is not in order (the model was quantised with act-order storage); it can "
                "be decoded, not kept packed"
            )
    zeros = unpack_words(parts["qzeros"], scheme.bits)
    if version == 1:
        if scheme.bits == 8 and bool((zeros == 255).any()):
            raise CheckpointError(
                "qzeros hold 255 in version 1, the zero 256; no zero is that large"
            )
        zeros = zeros + 1
    stored = parts["scales"]
    scales = stored.to(torch.float16)
    if stored.dtype != torch.float16 and not torch.equal(scales.to(stored.dtype), stored):
        raise CheckpointError(f"scales of type {stored.dtype} do not fit into float16")
    arrays = {
        "codes": codes,
        "scales": scales.transpose(-1, -2).contiguous(),
        "zeros": zeros.transpose(-1, -2).contiguous(),
    }
    return QuantizedTensor(scheme, arrays)


class Gptq:
    """AutoGPTQ versions 1 and 2, at 2, 4 and 8 bits."""

    name = "gptq"
    rank = 30
    convertible = False

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """Weights by their qweight where config.json says gptq; CheckpointError for loose parts."""
        settings = config.get("quantization_config") or {}
        if settings.get("quant_method") != "gptq":
            return []
        version = 2 if settings.get("checkpoint_format") == "gptq_v2" else 1
        bits = settings.get("bits")
        weights = packed_weights(
            *(entries, PARTS, self.name),
            lambda module, parts: self._state(module, parts, bits, version),
        )
        refuse_loose(entries, (".qzeros", ".scales", ".g_idx"), "qweight")
        return weights

    def _state(
        self,
        module: str,
        parts: Mapping[str, TensorEntry],
        said_bits: Any,  # noqa: ANN401  (as the config has it)
        version: int,
    ) -> State:
        """What a module's parts make; CheckpointError where they do not fit together."""
        packed = parts["qweight"]
        for part in ("qzeros", "scales"):
            if part not in parts:
                raise missing_part(module, part, packed.file)
        if any(len(parts[part].shape) != 2 for part in PARTS[:3]):
            raise CheckpointError(f"{packed.file}: {module} is packed in no known way")
        words, rows = packed.shape
        bits = said_bits
        if "g_idx" in parts and words:  # the tensors know better than the config: it has exceptions
            bits = words * 32 / parts["g_idx"].nbytes * 4
        if bits not in BITS:
            raise CheckpointError(
                f"{packed.file}: {module} is packed with {shown(bits, 40)} bits; {BITS} can be read"
            )
        bits = int(bits)
        columns = words * 32 // bits
        groups = parts["scales"].shape[0]
        expected = {
            "qweight": (("I32",), (words, rows)),
            "qzeros": (("I32",), (groups, rows * bits // 32)),
            "scales": (("F16", "BF16", "F32"), (groups, rows)),
            "g_idx": (("I32",), (columns,)),
        }
        for part, entry in parts.items():
            dtypes, shape = expected[part]
            if entry.dtype not in dtypes or entry.shape != shape or not groups:
                raise CheckpointError(
                    f"{entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}; "
                    f"{dtypes[0]} {list(shape)} was expected"
                )
        if "g_idx" not in parts and columns % groups:
            raise CheckpointError(
                f"{packed.file}: {module} has {groups} groups for {columns} inputs and no g_idx"
            )
        dtype = DTYPES[parts["scales"].dtype]
        details = Packing(bits, groups, version)
        return State((rows, columns), dtype, (bits, groups, version), details)

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """See `pipeline.checkpoint.output.OutputFormat`; version 1, which every reader knows."""
        return pack(quantized)

    def quantization_config(
        self, scheme: AffineScheme, rules: ModuleRules, version: str
    ) -> dict[str, Any]:
        """See `pipeline.checkpoint.output.OutputFormat`."""
        return quantization_config(scheme, rules, version)

    def refusal(self, scheme: AffineScheme) -> str | None:
        """See `pipeline.checkpoint.output.OutputFormat`; every affine scheme of a recipe fits."""
        return None

    def packed_bytes(self, scheme: AffineScheme, rows: int, columns: int) -> int:
        """See `pipeline.checkpoint.output.OutputFormat`."""
        groups = columns // scheme.group(columns)
        codes = rows * columns * scheme.bits // 8
        return codes + rows * groups * (16 + scheme.bits) // 8 + 4 * columns

    def state_part(self, weight: StoredWeight) -> str | None:
        """None: headers and config say all."""
        return None

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Never asked for."""
        raise NotImplementedError

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Dense `[N, out, in]` in the scales' dtype, for any g_idx, in or out of order."""
        require_finite(parts["scales"], [weight.name for weight in weights], "scales")
        packing: Packing = state.details
        rows, columns = state.shape
        device = parts["qweight"].device
        out = torch.empty((len(weights), rows, columns), dtype=state.dtype, device=device)
        step = max(1, DECODE_ELEMENTS // (rows * columns))
        for start in range(0, len(weights), step):
            some = {part: values[start : start + step] for part, values in parts.items()}
            self._check_groups(weights[start : start + step], packing.groups, some)
            out[start : start + step] = _dense(some, packing)
        return out

    def quantized(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """See `pipeline.checkpoint.stored.PackedFormat`; refuses columns out of order."""
        require_finite(parts["scales"], [weight.name for weight in weights], "scales")
        packing: Packing = state.details
        columns = state.shape[1]
        if columns % packing.groups:
            raise CheckpointError(
                f"{weights[0].name}: {packing.groups} groups do not divide {columns} inputs"
            )
        group = -1 if packing.groups == 1 else columns // packing.groups
        scheme = AffineScheme(packing.bits, group, False)
        try:
            arrays = unpack(parts, scheme, packing.version).arrays
        except CheckpointError:
            for i, weight in enumerate(weights):  # the batch does not tell which one it is
                try:
                    unpack({k: v[i] for k, v in parts.items()}, scheme, packing.version)
                except CheckpointError as error:
                    raise CheckpointError(f"{weight.name}: {error}") from error
            raise
        symmetric = bool((arrays["zeros"] == 1 << (packing.bits - 1)).all())
        return QuantizedTensor(AffineScheme(packing.bits, group, symmetric), arrays)

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """Whether bits, groups, zeros, scales and g_idx are what config.json says."""
        settings = config.get("quantization_config") or {}
        values = _Values(parts, _packing(weights[0]))
        found = []
        names = [weight.name.removesuffix(".weight") for weight in weights]
        said = settings_of_each(names, settings)
        for i, (weight, name) in enumerate(zip(weights, names, strict=True)):
            whats = self._contradictions(weight, said[i], values, i)
            if not values.sound[i]:
                whats.append(UNSOUND_SCALES)
            found += [Problem(weight.parts["qweight"].file, what, name) for what in whats]
        return found

    def _contradictions(
        self, weight: StoredWeight, said: ModuleSettings, values: _Values, i: int
    ) -> list[str]:
        if not said.quantized:
            return [f"is packed, but config.json leaves it dense ({said.because})"]
        packing = _packing(weight)
        assert weight.state is not None
        columns = weight.state.shape[1]
        found = []
        if said.bits is not None and said.bits != packing.bits:
            found.append(
                f"is packed with {packing.bits} bits, config.json says {shown(said.bits, 40)}"
            )
        group = -(-columns // packing.groups)
        if said.group_size is not None:
            group = columns if said.group_size == -1 else said.group_size
            if -(-columns // group) != packing.groups:
                found.append(
                    f"has {packing.groups} groups of its {columns} inputs, config.json says group "
                    f"size {said.group_size}"
                )
                return found
        if not said.act_order and not values.in_order(group)[i]:
            found.append("g_idx is not in order, config.json says desc_act: false")
        if said.symmetric and not values.central[i]:
            found.append("zeros are not all in the middle, config.json says sym: true")
        elif packing.version == 1 and values.overflowing[i]:
            found.append(f"holds the zero {2**packing.bits}, on which readers disagree")
        return found

    def _check_groups(
        self, weights: Sequence[StoredWeight], groups: int, parts: Mapping[str, Tensor]
    ) -> None:
        if "g_idx" not in parts:
            return
        index = parts["g_idx"]
        wrong = ((index < 0) | (index >= groups)).any(1).tolist()
        if any(wrong):
            entry = weights[wrong.index(True)].parts["g_idx"]
            raise CheckpointError(f"{entry.file}: {entry.name} names groups beyond the {groups}")


class _Values:
    """What is to be said of the values of a batch `[N, ...]`, matrix by matrix.

    Asked of the whole batch at once: matrix by matrix it would take longer than reading them.
    """

    def __init__(self, parts: Mapping[str, Tensor], packing: Packing) -> None:
        middle = 2 ** (packing.bits - 1) - (2 - packing.version)
        words, scales = parts["qzeros"], parts["scales"]
        self.overflowing: Sequence[bool] = [False] * len(words)
        if _all_are(words, _repeated(middle, packing.bits)):  # as in any symmetric model
            self.sound = sound_scales(scales, torch.ones(1, dtype=torch.bool))
            self.central: Sequence[bool] = [True] * len(words)
        else:
            zeros = unpack_words(words, packing.bits)
            central = zeros == middle
            self.sound = sound_scales(scales, central)
            self.central = central.flatten(1).all(1).tolist()
            self.overflowing = (zeros == 2**packing.bits - 1).flatten(1).any(1).tolist()
        self._index = parts.get("g_idx")
        self._in_order: dict[int, Sequence[bool]] = {}

    def in_order(self, group: int) -> Sequence[bool]:
        """Whether g_idx counts groups of that size, for each matrix."""
        if self._index is None:
            return [True] * len(self.sound)
        if group not in self._in_order:
            plain = torch.arange(self._index.shape[1], dtype=self._index.dtype) // group
            self._in_order[group] = (self._index == plain).all(1).tolist()
        return self._in_order[group]


def _all_are(words: Tensor, word: int) -> bool:
    if not words.numel():
        return False
    low, high = torch.aminmax(words)  # in one pass that allocates nothing
    return int(low) == int(high) == word


def _repeated(code: int, bits: int) -> int:
    """The int32 word that holds a code as often as fits."""
    word = sum(code << shift for shift in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word


def _packing(weight: StoredWeight) -> Packing:
    assert weight.state is not None
    packing: Packing = weight.state.details
    return packing


def _dense(parts: Mapping[str, Tensor], packing: Packing) -> Tensor:
    """float32 `[n, out, in]`."""
    codes = unpack_words(parts["qweight"].transpose(-1, -2), packing.bits)
    count, rows, columns = codes.shape
    zeros = unpack_words(parts["qzeros"], packing.bits).float() + (2 - packing.version)
    scales = parts["scales"].float()
    if "g_idx" in parts:
        index = parts["g_idx"].long()
    else:
        index = torch.arange(columns, device=codes.device) // (columns // packing.groups)
        index = index.expand(count, columns)
    index = index[:, :, None].expand(count, columns, rows)
    scales, zeros = (values.gather(1, index).transpose(1, 2) for values in (scales, zeros))
    return (codes.float() - zeros) * scales


FORMATS.register(Gptq.name, Gptq())
