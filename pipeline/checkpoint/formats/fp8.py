"""Block-scaled FP8, as DeepSeek-V3 and Qwen publish it (config.json: quant_method fp8, with
weight_block_size [128, 128]; read by transformers' FineGrainedFP8 and by vLLM).

Stored per module M: M.weight F8_E4M3 [out, in], M.weight_scale_inv F32 (or BF16, F16)
[ceil(out / rows), ceil(in / columns)] for blocks of rows x columns.  In spite of its name the scale
is what a weight is multiplied by: weight[o, i] = code[o, i] * scale[o // rows, i // columns].
Blocks at the lower and right edge may be cut short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.finite import require_finite
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.stored import (
    State,
    StoredWeight,
    TensorEntry,
    decoding_problems,
    missing_part,
)
from pipeline.checkpoint.untrusted import is_size, shown
from pipeline.errors import CheckpointError

SCALE = ".weight_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16")
DEFAULT_BLOCK = (128, 128)
"""Where config.json names none; what all known uploads use."""


class Fp8:
    """FP8 matrices with a scale a block."""

    name = "fp8"
    rank = 25
    convertible = True

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """Weights by their scales; CheckpointError for a part missing, left over or misshapen."""
        modules = [name.removesuffix(SCALE) for name in entries if name.endswith(SCALE)]
        block = _block(config) if modules else DEFAULT_BLOCK
        weights = [self._weight(module, entries, block) for module in modules]
        if modules:
            claimed = {weight.name for weight in weights}
            for name, entry in entries.items():
                if entry.dtype == "F8_E4M3" and name not in claimed:
                    raise missing_part(name.removesuffix(".weight"), SCALE[1:], entry.file)
        return weights

    def _weight(
        self, module: str, entries: Mapping[str, TensorEntry], block: tuple[int, int]
    ) -> StoredWeight:
        scales = entries[f"{module}{SCALE}"]
        weight = entries.get(f"{module}.weight")
        if weight is None:
            raise missing_part(module, "weight", scales.file)
        if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: {weight.name} is {weight.dtype} {list(weight.shape)}; an F8_E4M3"
                " matrix was expected beside its weight_scale_inv"
            )
        rows, columns = weight.shape
        wanted = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        if scales.dtype not in SCALE_DTYPES or scales.shape != wanted:
            raise CheckpointError(
                f"{scales.file}: {scales.name} is {scales.dtype} {list(scales.shape)}; F32 or BF16"
                f" {list(wanted)} was expected for blocks of {block[0]} x {block[1]}"
            )
        # The models were trained and published in bfloat16; the stored codes do not say.
        state = State(weight.shape, torch.bfloat16, block, block)
        parts = {"weight": weight, "scale": scales}
        return StoredWeight(weight.name, self.name, parts, math.prod(weight.shape), state)

    def state_part(self, weight: StoredWeight) -> str | None:
        """None: headers and config.json say all."""
        return None

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Never asked for."""
        raise NotImplementedError

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Dense bf16 `[N, out, in]`: the product in float32, rounded once.

        Raises NumericalError for NaN among codes or scales.
        """
        names = [weight.name for weight in weights]
        require_finite(parts["scale"], names, "block scales")
        rows, columns = state.shape
        height, width = state.details
        dense = parts["weight"].float()
        for top, scale in zip(
            range(0, rows, height), parts["scale"].float().unbind(1), strict=True
        ):
            wide = scale.repeat_interleave(width, dim=1)[:, None, :columns]
            dense[:, top : top + height] *= wide
        result = dense.to(state.dtype)
        require_finite(result, names)
        return result

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """What decoding refuses."""
        return decoding_problems(self, weights, parts)


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, from config.json."""
    quantization = config.get("quantization_config") or {}
    block = quantization.get("weight_block_size") or DEFAULT_BLOCK
    if not (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(is_size(size) and size > 0 for size in block)
    ):
        raise CheckpointError(
            f"config.json: weight_block_size is {shown(block)}; two sizes, such as [128, 128], were"
            " expected"
        )
    return block[0], block[1]


FORMATS.register(Fp8.name, Fp8())
