"""bitsandbytes 8-bit (LLM.int8(), https://arxiv.org/abs/2208.07339): one scale a row.

Stored per module M: M.weight I8 [out, in], M.SCB F32 [out] (largest magnitude of each row),
M.weight_format U8 (0: rows as they are; other values were GPU-specific layouts and are refused).
weight = int8 * SCB / 127.  What the model computed in is in config.json only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
)
from pipeline.errors import CheckpointError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Bnb8:
    """int8 matrices with a scale a row."""

    name = "int8"
    rank = 20
    convertible = True

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """Weights by their SCB; CheckpointError for a part missing or left over."""
        said = str(config.get("dtype") or config.get("torch_dtype") or "float16")
        dtype = DTYPES.get(said.removeprefix("torch."), torch.float16)
        weights = [
            self._weight(name.removesuffix(".SCB"), entries, dtype)
            for name in entries
            if name.endswith(".SCB")
        ]
        claimed = {part.name for weight in weights for part in weight.parts.values()}
        for name, entry in entries.items():
            left = name.endswith(".weight_format") or (
                entry.dtype == "I8" and name.endswith(".weight")
            )
            if left and name not in claimed:
                raise missing_part(name.rpartition(".")[0], "SCB", entry.file)
        return weights

    def _weight(
        self, module: str, entries: Mapping[str, TensorEntry], dtype: torch.dtype
    ) -> StoredWeight:
        scales = entries[f"{module}.SCB"]
        weight = entries.get(f"{module}.weight")
        if weight is None:
            raise missing_part(module, "weight", scales.file)
        if weight.dtype != "I8" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: {weight.name} is {weight.dtype} {list(weight.shape)}; an I8 "
                "matrix was expected beside its SCB"
            )
        if scales.dtype != "F32" or math.prod(scales.shape) != weight.shape[0]:
            raise CheckpointError(
                f"{scales.file}: {scales.name} is {scales.dtype} {list(scales.shape)}; F32 "
                f"[{weight.shape[0]}] was expected"
            )
        parts = {"weight": weight, "SCB": scales}
        layout = entries.get(f"{module}.weight_format")
        if layout is not None:
            if layout.nbytes != 1:
                raise CheckpointError(f"{layout.file}: {layout.name} is not one byte")
            parts["weight_format"] = layout
        state = State(weight.shape, dtype)
        return StoredWeight(weight.name, self.name, parts, math.prod(weight.shape), state)

    def state_part(self, weight: StoredWeight) -> str | None:
        """None: headers say all."""
        return None

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Never asked for."""
        raise NotImplementedError

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Dense `[N, out, in]`, computed in float32 by bitsandbytes and rounded once."""

        names = [weight.name for weight in weights]
        if "weight_format" in parts:
            for weight, code in zip(
                weights, parts["weight_format"].flatten().tolist(), strict=True
            ):
                if code != 0:
                    entry = weight.parts["weight_format"]
                    raise CheckpointError(
                        f"{entry.file}: {entry.name} is {code}, a layout that only old GPU code "
                        "reads; save the model again with a current bitsandbytes"
                    )
        scales = parts["SCB"].reshape(len(weights), -1)
        require_finite(scales, names, "row scales", torch.finfo(state.dtype).max)
        rows = parts["weight"].reshape(-1, state.shape[1])
        dense: Tensor = functional().int8_vectorwise_dequant(rows, scales.reshape(-1))
        return dense.to(state.dtype).view(len(weights), *state.shape)

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """What decoding refuses."""
        return decoding_problems(self, weights, parts)


FORMATS.register(Bnb8.name, Bnb8())
