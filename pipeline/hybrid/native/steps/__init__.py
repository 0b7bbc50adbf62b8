"""Modules whose decode steps the compiled kernels compute, one file per architecture.

An architecture without a file here is computed as transformers does it, but for its linear layers
(`pipeline.hybrid.native.dense`) and its experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from pipeline.hybrid.native.library import find
from pipeline.registry import Registry

Replacements = Mapping[type[nn.Module], type[nn.Module]]
"""transformers' own classes, and those that take their places: subclasses that add no state."""

MODULES: Registry[Replacements] = Registry("pipeline.hybrid.native.steps", "native decode step")
"""By the `model_type` of config.json."""


def use_in(model: PreTrainedModel) -> None:
    """Let the kernels, if they are there, serve a model's decode steps on the CPU.

    Modules stay the same objects, with the same parameters and hooks, and become of another class.
    """
    known = MODULES.get(model.config.model_type)
    if known is None or isinstance(find(), str):
        return
    for module in model.modules():
        module.__class__ = known.get(type(module), type(module))
