"""What a storage format must offer to be written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pipeline.quantize.tensor import AffineScheme, QuantizedTensor


@dataclass(frozen=True)
class ModuleRules:
    """The linear modules of a model, by whether they are quantised; names relative to a layer."""

    experts: str
    """What holds the routed experts, such as mlp.experts."""
    expert_projections: tuple[str, ...]
    """Last names of an expert's projections; routed experts are always quantised."""
    quantized: tuple[str, ...]
    """Others that are quantised, such as self_attn.q_proj."""
    skipped: tuple[str, ...]
    """Others that are not."""
    outside: tuple[str, ...]
    """Modules outside the layers that are not, such as lm_head."""


@runtime_checkable
class OutputFormat(Protocol):
    """A storage format that results can be written in."""

    name: str

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Stored parts of a batch `[N, out, in]`, each with the leading dimension N."""

    def quantization_config(
        self, scheme: AffineScheme, rules: ModuleRules, version: str
    ) -> dict[str, Any]:
        """What config.json says under `quantization_config`."""

    def refusal(self, scheme: AffineScheme) -> str | None:
        """Why the format cannot hold a scheme, in a few words with what it can; None: it can."""

    def packed_bytes(self, scheme: AffineScheme, rows: int, columns: int) -> int:
        """Stored bytes of one matrix [rows, columns]: codes, scales and all that goes with them."""
