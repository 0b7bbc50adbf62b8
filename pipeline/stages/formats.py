"""Which storage format a method writes, and which modules its config must name."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.output import ModuleRules, OutputFormat
from pipeline.models import Architecture

DEFAULT = "gptq"


def output_format(method: str) -> OutputFormat:
    """The format named like the method if there is one, GPTQ's layout otherwise."""
    found = FORMATS.get(method) or FORMATS[DEFAULT]
    assert isinstance(found, OutputFormat)
    return found


def module_rules(architecture: Architecture, chosen: Collection[str]) -> ModuleRules:
    """Linear modules of a layer by whether a recipe's module classes quantise them."""
    groups = (*architecture.mixer_groups, *architecture.shared_groups)
    quantized = tuple(m for g in groups if g.module_class in chosen for m in g.modules)
    skipped = tuple(m for g in groups if g.module_class not in chosen for m in g.modules)
    return ModuleRules(
        expert_projections=(architecture.gate, architecture.up, architecture.down),
        quantized=quantized,
        skipped=(*skipped, *architecture.never_quantized),
        outside=(architecture.head,),
    )
