"""What a storage format must offer to be written, and how its config names what is quantised.

Readers look for skipped modules in different places (docs/other-readers.md), and each place has
rules of its own:
  dynamic                       GPTQModel, vLLM, SGLang: regular expressions, matched from the start
                                of a full name or of a name inside a layer; "-:" takes out
  modules_in_block_to_quantize  optimum: endings of full names, in a list of lists; also vLLM
  modules_to_not_convert        AWQ readers and transformers: parts or endings of names
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pipeline.quantize.tensor import QuantizedTensor


@dataclass(frozen=True)
class ModuleRules:
    """The linear modules of a model, by whether they are quantised; names relative to a layer."""

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
        self, *, bits: int, group_size: int, symmetric: bool, rules: ModuleRules, version: str
    ) -> dict[str, Any]:
        """What config.json says under `quantization_config`."""


def dynamic_rules(rules: ModuleRules) -> dict[str, Mapping[str, Any]]:
    """`dynamic` with one "-:" rule for each part of a layer that stays dense.

    A whole block (self_attn) gets one rule, since vLLM asks for fused names such as qkv_proj that
    are in no checkpoint; a block of which a part is quantised gets one rule a module.
    """
    kept = {name.rpartition(".")[0] for name in rules.quantized}
    holders = _holders(rules)
    patterns: list[str] = []
    for name in rules.skipped:
        block = name.rpartition(".")[0]
        # A block that also holds the experts (mlp) is never skipped whole.
        whole = block not in kept and block not in holders
        patterns.append(re.escape(block) + r"\..*" if whole else re.escape(name) + "$")
    patterns += [re.escape(name) + "$" for name in rules.outside]
    return {f"-:.*{pattern}": {} for pattern in dict.fromkeys(patterns)}


def block_endings(rules: ModuleRules) -> list[list[str]]:
    """`modules_in_block_to_quantize`: endings that match what is quantised and nothing else.

    A routed expert's linear ends in its number and projection, so ten digits times the projections
    cover any number of experts, and never the shared expert's modules of the same name.
    """
    endings = [f"{digit}.{name}" for digit in range(10) for name in rules.expert_projections]
    return [[*endings, *rules.quantized]]


def _holders(rules: ModuleRules) -> set[str]:
    """Blocks that hold other blocks: mlp holds mlp.shared_expert and the experts."""
    blocks = {name.rpartition(".")[0] for name in (*rules.skipped, *rules.quantized)}
    return {block.rpartition(".")[0] for block in blocks if "." in block}
