"""What a recipe says to the solver, to the storage format, and of modules in its config."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.output import ModuleRules, OutputFormat
from pipeline.errors import RecipeError
from pipeline.models import Architecture
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme
from pipeline.recipe import Requantize

DEFAULT = "gptq"


def output_format(recipe: Requantize) -> OutputFormat:
    """The format that the recipe names; else the one named like the method, or else GPTQ's.

    RecipeError for a format that is unknown, or that cannot hold what the recipe asks for.
    """
    written = {name: FORMATS[name] for name in FORMATS if isinstance(FORMATS[name], OutputFormat)}
    found = written.get(recipe.format or recipe.method)
    if found is None and recipe.format is None:
        found = written[DEFAULT]
    if found is None:
        known = ", ".join(written)
        raise RecipeError(f"requantize.format {recipe.format!r} is unknown; known: {known}")
    assert isinstance(found, OutputFormat)
    scheme = AffineScheme(recipe.bits, recipe.group_size, recipe.symmetric)
    reason = found.refusal(scheme)
    if reason is not None:
        raise RecipeError(
            f"requantize.bits {recipe.bits} cannot be stored: {reason};"
            f" change it, or set requantize.format to {DEFAULT}"
        )
    return found


def solver_options(recipe: Requantize) -> SolverOptions:
    """What the recipe tells every quantiser."""
    return SolverOptions(
        damping=recipe.damping,
        activation_order=recipe.activation_order,
        scale_search=recipe.scale_search,
        negative_scales=recipe.negative_scales,
        refinement_passes=recipe.refinement_passes,
    )


def module_rules(architecture: Architecture, chosen: Collection[str]) -> ModuleRules:
    """Linear modules of a layer by whether a recipe's module classes quantise them."""
    groups = (*architecture.mixer_groups, *architecture.shared_groups)
    quantized = tuple(m for g in groups if g.module_class in chosen for m in g.modules)
    skipped = tuple(m for g in groups if g.module_class not in chosen for m in g.modules)
    return ModuleRules(
        experts=architecture.experts,
        expert_projections=(architecture.gate, architecture.up, architecture.down),
        quantized=quantized,
        skipped=(*skipped, *architecture.never_quantized),
        outside=(architecture.head,),
    )
