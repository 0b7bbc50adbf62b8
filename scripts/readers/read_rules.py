"""Step: which modules each reader takes for quantised, asked of the reader's own matching code.

Nothing is loaded: the model is built without memory, its experts unfused as both readers do it.
"""

from __future__ import annotations

import json
from typing import Any

import defuser
import torch
from findings import arguments
from gptqmodel import QuantizeConfig
from gptqmodel.models.auto import MODEL_MAP
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from optimum.gptq import GPTQQuantizer
from packed_gptq import PackedGptq
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module


def gptqmodel(path: str, model: PreTrainedModel, names: set[str]) -> set[str]:
    """GPTQModel's loader: names of its module tree that no `-:` rule meets, relative and full."""
    settings = QuantizeConfig.from_pretrained(path)
    definition = MODEL_MAP[model.config.model_type]
    prefixes = tuple(definition.extract_layers_node())
    outside = (definition.lm_head, *definition.get_base_modules(model))
    # By the last two components, or 512 experts a layer cost a product of names.
    inside: dict[str, list[str]] = {}
    for block in definition.simple_layer_modules(model.config, settings):
        for name in block:
            inside.setdefault(_tail(name), []).append(name)
    return {
        name
        for name in names
        if name.startswith(prefixes)
        and not name.startswith(outside)
        and name.endswith(tuple(inside.get(_tail(name), ())))
        and settings.dynamic_get(name) is not False
    }


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def not_skipped(settings: dict[str, Any], names: set[str]) -> set[str]:
    """transformers' rule for those of its quantisers that read `modules_to_not_convert`."""
    skipped = settings.get("modules_to_not_convert")
    return {name for name in names if should_convert_module(name, skipped)}


def optimum(settings: dict[str, Any], model: PreTrainedModel) -> set[str]:
    """What optimum replaces when transformers hands it the model; it changes `model`."""
    asked = GPTQConfig.from_dict({**settings, "backend": "gptq_torch"})
    quantizer = GPTQQuantizer.from_dict(asked.to_dict_optimum())
    converted = quantizer.convert_model(model, device_map={"": "cpu"})
    return {n for n, m in converted.named_modules() if isinstance(m, BaseQuantLinear)}


PATH, WORK, _ = arguments()
stored = PackedGptq(PATH)
config = AutoConfig.from_pretrained(PATH)
del config.quantization_config
defuser.replace_fused_blocks(config.model_type)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
# The exact type: routers are a module of their own, and no reader quantises them.
names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
rules = {
    "GPTQModel (dynamic)": gptqmodel(str(PATH), model, names),
    "transformers (modules_to_not_convert)": not_skipped(stored.quantization, names),
    "optimum (modules_in_block_to_quantize)": optimum(stored.quantization, model),
}
found = {"linears": len(names), "rules": {rule: sorted(said) for rule, said in rules.items()}}
(WORK / "rules.json").write_text(json.dumps(found))
