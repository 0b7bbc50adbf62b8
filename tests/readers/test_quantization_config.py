"""Every reader must take exactly the modules that are packed for quantised, whatever is chosen.

transformers' own rule and configuration class are called; those of GPTQModel, optimum and vLLM,
which are not installed beside this package, are restated in one line each (docs/other-readers.md
says where they stand).  scripts/readers/check_readers.py asks the real ones.
"""

import json
import re
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch
from safetensors.torch import save_file
from support.qwen3_moe import CONFIG as QWEN3_MOE
from support.recipes import MICRO
from torch import nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from pipeline import __version__
from pipeline.models import ARCHITECTURES
from pipeline.models.skeleton import build_skeleton, model_config
from pipeline.quantize.tensor import AffineScheme
from pipeline.recipe import Requantize
from pipeline.stages.formats import module_rules, output_format

QWEN3_NEXT = json.loads((MICRO / "config.json").read_text())
CONFIGS = {"qwen3_next": QWEN3_NEXT, "qwen3_moe": QWEN3_MOE}


def choices(architecture):
    """Every set of module classes that a recipe may name."""
    extras = sorted(set(architecture.module_classes) - {"experts"})
    return [("experts", *more) for n in range(len(extras) + 1) for more in combinations(extras, n)]


CASES = [
    pytest.param(ARCHITECTURES[name], chosen, id=f"{name}-{'+'.join(chosen)}")
    for name in ARCHITECTURES
    for chosen in choices(ARCHITECTURES[name])
]
EXPERTS = (0, 7, 10, 100, 511)
"""Numbers of one to three digits: the lists must not depend on how many experts there are."""
VLLM_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def settings(architecture, chosen, method="gptq"):
    """`quantization_config` as the pipeline writes it, after a trip through JSON."""
    rules = module_rules(architecture, chosen)
    written = output_format(Requantize(method=method)).quantization_config(
        AffineScheme(bits=4, group_size=128, symmetric=True), rules, __version__
    )
    return json.loads(json.dumps(written))


@cache
def linears(architecture):
    """Names of all linear modules: transformers' own, and the experts one by one."""
    config = CONFIGS[architecture.model_type]
    model = build_skeleton(model_config(config), torch.bfloat16)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return names + [
        architecture.expert_module(layer, expert, projection)
        for layer in architecture.geometry(config).moe_layers
        for expert in EXPERTS
        for projection in (architecture.gate, architecture.up, architecture.down)
    ]


def packed(architecture, chosen):
    """What the pipeline packs, from the architecture's declaration."""
    names = linears(architecture)
    groups = (*architecture.mixer_groups, *architecture.shared_groups)
    ends = tuple(m for g in groups if g.module_class in chosen for m in g.modules)
    return {n for n in names if ".mlp.experts." in n or n.endswith(ends)}


def inside_layer(name):
    return re.sub(r"^model\.layers\.\d+\.", "", name)


def dynamic_skips(config, name):
    return any(re.match(rule.removeprefix("-:"), name) for rule in config["dynamic"])


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("architecture", "chosen"), CASES)
def test_transformers_rule(architecture, chosen, method):
    skipped = settings(architecture, chosen, method)["modules_to_not_convert"]
    converted = {name for name in linears(architecture) if should_convert_module(name, skipped)}
    assert converted == packed(architecture, chosen)


@pytest.mark.parametrize(("architecture", "chosen"), CASES)
def test_optimum_rule(architecture, chosen):
    """Endings of names below model.layers; a list of lists, since optimum adds them up."""
    config = settings(architecture, chosen)
    (ends,) = config["modules_in_block_to_quantize"]
    found = {
        n for n in linears(architecture) if n.startswith("model.layers") and n.endswith(tuple(ends))
    }
    assert found == packed(architecture, chosen)


@pytest.mark.parametrize(("architecture", "chosen"), CASES)
def test_gptqmodel_rule(architecture, chosen):
    """The expressions meet the name inside the layer as well as the full one; both must agree."""
    config = settings(architecture, chosen)
    assert all(rule.startswith("-:") and not value for rule, value in config["dynamic"].items())
    for name in linears(architecture):
        full, relative = dynamic_skips(config, name), dynamic_skips(config, inside_layer(name))
        assert full == relative == (name not in packed(architecture, chosen)), name


@pytest.mark.parametrize(("architecture", "chosen"), CASES)
def test_vllm_rule(architecture, chosen):
    """vLLM asks for fused names, which no list holds: the expressions must cover them too."""
    config = settings(architecture, chosen)
    (parts,) = config["modules_in_block_to_quantize"]
    expected = packed(architecture, chosen)
    for fused, shards in VLLM_FUSED.items():
        for name in linears(architecture):
            block, _, last = name.rpartition(".")
            if last == shards[0] and ".mlp.experts." not in name:
                asked = f"{block}.{fused}"
                listed = {any(p in f"{block}.{s}" for p in parts) for s in shards}
                assert listed == {name in expected}, "shards of one matrix must be treated alike"
                if block.endswith(".mlp"):  # a dense layer: here the list alone says it
                    assert name not in expected and listed == {False}
                else:
                    assert dynamic_skips(config, asked) == (name not in expected), asked
    # The routed experts are one module there, and only `dynamic` is asked.
    assert not dynamic_skips(config, "model.layers.0.mlp.experts")


@pytest.mark.parametrize(("architecture", "chosen"), CASES)
def test_awq_rule_of_the_servers(architecture, chosen):
    """vLLM, SGLang and AutoAWQ look for entries anywhere in a name; of a fused matrix vLLM asks
    for each part, and of the routed experts for their one module."""
    skipped = settings(architecture, chosen, "awq")["modules_to_not_convert"]
    expected = packed(architecture, chosen)
    assert {
        n for n in linears(architecture) if not any(entry in n for entry in skipped)
    } == expected
    assert not any(entry in "model.layers.0.mlp.experts" for entry in skipped)


def test_transformers_reads_the_awq_fields():
    config = settings(ARCHITECTURES["qwen3_next"], ("experts",), "awq")
    parsed = AwqConfig.from_dict({k: v for k, v in config.items() if k != "meta"})
    assert (parsed.bits, parsed.group_size, parsed.zero_point) == (4, 128, True)
    assert str(parsed.format) in {"gemm", "AwqFormat.GEMM"}
    assert parsed.modules_to_not_convert == config["modules_to_not_convert"]


def test_transformers_and_the_servers_find_the_fields_they_insist_on():
    config = settings(ARCHITECTURES["qwen3_next"], ("experts",))
    # This one key makes transformers look for optimum, see the next test.
    parsed = GPTQConfig.from_dict(
        {k: v for k, v in config.items() if k != "modules_in_block_to_quantize"}
    )
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act) == (4, 128, True, False)
    assert parsed.format == "gptq"
    assert config["quant_method"] == "gptq"
    assert config["lm_head"] is False
    # GPTQModel reads a claim to have made the file as a promise about its zero points.
    assert not any(maker.startswith("gptqmodel") for maker in config["meta"]["quantizer"])


@pytest.mark.skipif(find_spec("optimum") is not None, reason="optimum is installed here")
def test_plain_transformers_stops_for_want_of_optimum(tmp_path):
    """Better than what it does with optimum but without unfusing: experts at random."""
    config = QWEN3_NEXT | {
        "quantization_config": settings(ARCHITECTURES["qwen3_next"], ("experts",))
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {"model.norm.weight": torch.zeros(128)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises((ImportError, PackageNotFoundError), match="optimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
