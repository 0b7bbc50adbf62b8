"""GPTQ's part of config.json: what is written there, and what others' mean.

`dynamic` maps regular expressions to exceptions, the first that matches a module's name wins:
"-:expression" leaves the module dense, "+:expression" or a bare one overrides bits, group_size or
sym (GPTQModel's rules, read by vLLM and SGLang too).  `modules_in_block_to_quantize` is optimum's:
endings of the names of quantised modules, in a list of lists.  `modules_to_not_convert` is what
transformers and the AWQ readers look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from pipeline.checkpoint.output import ModuleRules
from pipeline.checkpoint.untrusted import shown
from pipeline.errors import CheckpointError
from pipeline.quantize.tensor import AffineScheme

RULE_SECONDS = 1.0
"""For one rule and one name; sane ones take microseconds."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_BLIND = re.compile(r"[-+]?:?(?:[A-Za-z_]|\\\.|\.\*|\^|\$)*")
"""Rules of letters, dots and `.*`: whether one matches a name does not depend on numbers in it."""


def quantization_config(scheme: AffineScheme, rules: ModuleRules, version: str) -> dict[str, Any]:
    """The `quantization_config` of config.json, telling every reader what is left dense.

    Each reader looks at one of the three lists and ignores the others (docs/other-readers.md);
    vLLM and SGLang insist on bits, group_size, sym and desc_act.  `version`: of this program.
    """
    return {
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": _dynamic(rules),
        "modules_in_block_to_quantize": _endings(rules),
        "modules_to_not_convert": [*rules.skipped, *rules.outside],
        "meta": {"quantizer": [f"requant:{version}"]},
    }


def _dynamic(rules: ModuleRules) -> dict[str, dict[str, Any]]:
    """One "-:" rule for each part of a layer that stays dense.

    A whole block (self_attn) gets one rule, since vLLM asks for fused names such as qkv_proj that
    are in no checkpoint; a block of which a part is quantised, or that holds the experts, gets one
    rule a module.  Rules are matched from the start of full names and of names inside a layer.
    """
    blocks = {name.rpartition(".")[0] for name in (*rules.skipped, *rules.quantized)}
    shared = {block.rpartition(".")[0] for block in (*blocks, rules.experts) if "." in block}
    shared |= {name.rpartition(".")[0] for name in rules.quantized}
    patterns = []
    for name in rules.skipped:
        block = name.rpartition(".")[0]
        patterns.append(re.escape(name) + "$" if block in shared else re.escape(block) + r"\..*")
    patterns += [re.escape(name) + "$" for name in rules.outside]
    return {f"-:.*{pattern}": {} for pattern in dict.fromkeys(patterns)}


def _endings(rules: ModuleRules) -> list[list[str]]:
    """Endings of names that match what is quantised and nothing else.

    A routed expert's module ends in its number and projection, so ten digits times the projections
    cover any number of experts, and never the shared expert's modules of the same name.
    """
    experts = [f"{digit}.{name}" for digit in range(10) for name in rules.expert_projections]
    return [[*experts, *rules.quantized]]


@dataclass(frozen=True)
class ModuleSettings:
    """What config.json says of one module."""

    quantized: bool
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool = False
    because: str = ""
    """The rule by which it is left dense."""


def _matches(rule: str, module: str) -> bool:
    """Whether a dynamic rule means a module; it is a stranger's expression, so with a time limit.

    Raises CheckpointError for one that is no expression, or takes longer than any sane one.
    """
    try:
        expression = rule.removeprefix("-:").removeprefix("+:")
        return regex.match(expression, module, timeout=RULE_SECONDS) is not None
    except regex.error as error:
        raise CheckpointError(
            f"config.json: dynamic rule '{shown(rule)}' is not a regular expression"
            f" ({shown(error)})"
        ) from error
    except TimeoutError:
        raise CheckpointError(
            f"config.json: dynamic rule '{shown(rule)}' takes forever to match; refused"
        ) from None


def settings_of_each(modules: Iterable[str], config: Mapping[str, Any]) -> list[ModuleSettings]:
    """As `settings_of` for many modules, of which most differ in the number of an expert alone.

    They are asked for once for all that differ so, where the rules cannot tell them apart.
    """
    dynamic, names = config.get("dynamic") or {}, _left_dense(config)
    rules = list(dynamic) if isinstance(dynamic, Mapping) else [""]
    numbered = any(part.isdigit() for name in names for part in str(name).split("."))
    blind = not numbered and all(_BLIND.fullmatch(rule) for rule in rules)
    known: dict[str, ModuleSettings] = {}
    found = []
    for module in modules:
        kind = _NUMBER.sub("0", module) if blind else module
        if kind not in known:
            known[kind] = settings_of(module, config)
        found.append(known[kind])
    return found


def _left_dense(config: Mapping[str, Any]) -> list[str]:
    names = config.get("modules_to_not_convert") or []
    if not isinstance(names, list):
        raise CheckpointError("config.json: modules_to_not_convert is not a list of names")
    return names


def settings_of(module: str, config: Mapping[str, Any]) -> ModuleSettings:
    """What `config` (a quantization_config) says of a module; what it does not say is None.

    Raises CheckpointError for a rule or a number that makes no sense.
    """
    table = dict(config)
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError("config.json: quantization_config.dynamic is not a table of rules")
    for rule, override in dynamic.items():
        matches = _matches(rule, module)
        if matches and rule.startswith("-:"):
            return ModuleSettings(False, because=f"the dynamic rule {rule}")
        if matches:
            table |= override if isinstance(override, Mapping) else {}
            break
    for name in _left_dense(config):
        if module == name or module.endswith(f".{name}"):
            return ModuleSettings(False, because=f"modules_to_not_convert, {name}")
    group = table.get("group_size")
    if group is not None and (type(group) is not int or (group < 1 and group != -1)):
        raise CheckpointError(
            f"config.json: group_size {shown(repr(group), 40)} is neither -1 nor positive"
        )
    return ModuleSettings(
        True, table.get("bits"), group, table.get("sym"), bool(table.get("desc_act", False))
    )
