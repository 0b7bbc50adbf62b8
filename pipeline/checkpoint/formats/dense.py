"""Plain tensors: what no other format claimed, provided it is of a type that needs no decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.checkpoint.finite import require_finite
from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.problem import Problem
from pipeline.checkpoint.stored import (
    DTYPES,
    State,
    StoredWeight,
    TensorEntry,
    decoding_problems,
)
from pipeline.checkpoint.untrusted import shown
from pipeline.errors import CheckpointError

PLAIN = ("BF16", "F16", "F32", "F64", "I64", "BOOL")
"""Weights, and the buffers that some architectures keep (positions, masks)."""


class Dense:
    """BF16, F16, F32 and F64 tensors, matrices as well as stacked `[expert, ...]` ones."""

    name = "dense"
    rank = 100
    convertible = True

    def claim(
        self, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> list[StoredWeight]:
        """Everything; CheckpointError for what looks like a part of an unknown packed format."""
        return [self._weight(entry, config) for entry in entries.values()]

    def _weight(self, entry: TensorEntry, config: Mapping[str, Any]) -> StoredWeight:
        if entry.dtype not in PLAIN:
            method = (config.get("quantization_config") or {}).get("quant_method", "none")
            raise CheckpointError(
                f"{entry.file}: {entry.name} is {entry.dtype} and belongs to no weight of a known "
                f"format (config.json says quant_method: {shown(method, 40)}; "
                f"known: {', '.join(FORMATS)})"
            )
        return StoredWeight(
            entry.name,
            self.name,
            {"data": entry},
            math.prod(entry.shape),
            State(entry.shape, DTYPES[entry.dtype]),
        )

    def state_part(self, weight: StoredWeight) -> str | None:
        """None: headers say all."""
        return None

    def parse_state(self, weight: StoredWeight, data: bytes) -> State:
        """Never asked for."""
        raise NotImplementedError

    def decode(
        self, weights: Sequence[StoredWeight], state: State, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """The tensors themselves; NumericalError naming the first with NaN or Inf."""
        data = parts["data"]
        require_finite(data, [weight.name for weight in weights])
        return data

    def problems(
        self,
        weights: Sequence[StoredWeight],
        parts: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> list[Problem]:
        """What decoding refuses."""
        return decoding_problems(self, weights, parts)


FORMATS.register(Dense.name, Dense())
