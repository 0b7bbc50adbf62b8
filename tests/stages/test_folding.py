"""Folding: the model stays the same whatever the scales are; and what refuses to be folded."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.errors import RecipeError
from pipeline.models import ARCHITECTURES
from pipeline.models.architecture import Fold
from pipeline.models.skeleton import geometry_of, model_config
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.experts import (
    DenseTile,
    LayerStatistics,
    TileJob,
    fold_tile,
    solve_tile,
    tile_output,
)
from pipeline.stages.folding import check_folds, fold_tensors, layer_folds
from pipeline.stages.routing import Routed

QWEN = ARCHITECTURES["qwen3_next"]
ALL = QWEN.module_classes
NAMES = ("input_norm", "value", "gated_norm", "post_norm", "up", "shared_up")


@pytest.fixture(scope="module")
def config(micro):
    return json.loads((micro / "config.json").read_text())


@pytest.fixture(scope="module")
def model(config):
    """A float32 model of random weights whose norms are far from neutral, some near -1."""
    torch.manual_seed(torch.seed() % 2**31)
    model = AutoModelForCausalLM.from_config(model_config(config)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
                if "layernorm" in name:
                    near = torch.randperm(len(parameter))[:12]
                    parameter[near[:4]] = -1 + 2.0**-8
                    parameter[near[4:8]] = -1 - 2.0**-7 * torch.rand(4)
                    parameter[near[8]] = -1.0
            elif parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model.requires_grad_(False)


def tokens(model):
    return torch.randint(0, model.config.vocab_size, (2, 48))


def random_scales(count):
    return torch.exp(torch.randn(count))


def names_of(config):
    """Every tensor's name as on disk, the routed experts' one by one."""
    model = AutoModelForCausalLM.from_config(model_config(config))
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp.experts."
        _, hidden, inner = names.pop(f"{stem}down_proj")
        del names[f"{stem}gate_up_proj"]
        for expert in range(config["num_experts"]):
            names[f"{stem}{expert}.gate_proj.weight"] = (inner, hidden)
            names[f"{stem}{expert}.up_proj.weight"] = (inner, hidden)
            names[f"{stem}{expert}.down_proj.weight"] = (hidden, inner)
    return names


def fold_model(model, config, chosen, dtype=torch.float32, modules=ALL):
    """A copy folded by random scales, and what each fold's channels were divided by.

    Dense tensors go through `fold_tensors`, the experts through `fold_tile`, as in a conversion.
    """
    folded = copy.deepcopy(model)
    shapes = names_of(config)
    tensors = dict(folded.named_parameters())
    effective = {}
    for layer in range(config["num_hidden_layers"]):
        experts = folded.model.layers[layer].mlp.experts
        for fold in layer_folds(QWEN, shapes, layer, modules):
            if fold.name not in chosen:
                continue
            made = shapes[QWEN.fold_module(layer, fold.producer) + ".weight"][0]
            into, inner = None, None
            if "*" in fold.producer:
                inner = random_scales(len(experts.down_proj) * made).view(-1, made)
            else:
                changed, divided = fold_tensors(
                    QWEN, fold, layer, tensors, random_scales(made), config, dtype
                )
                for name, tensor in changed.items():
                    tensors[name].copy_(tensor)
                effective[layer, fold.name] = divided
                if any("*" in consumer for consumer in fold.consumers):
                    into = divided
            if into is not None or inner is not None:
                tile = fold_tile(DenseTile(experts.gate_up_proj, experts.down_proj), into, inner)
                experts.gate_up_proj.copy_(tile.gate_up)
                experts.down_proj.copy_(tile.down)
    return folded, effective


@pytest.mark.parametrize("chosen", [*[(name,) for name in NAMES], NAMES], ids="+".join)
def test_logits_are_the_same_in_float32(model, config, chosen, one_thread):
    with torch.no_grad():
        folded, _ = fold_model(model, config, chosen)
        ids = tokens(model)
        expected, found = model(ids).logits, folded(ids).logits
    changed = [
        name
        for (name, a), b in zip(model.named_parameters(), folded.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert changed
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_experts_only_mode_folds_what_serves_the_experts(config):
    shapes = names_of(config)
    only = [[fold.name for fold in layer_folds(QWEN, shapes, i, ("experts",))] for i in (0, 1)]
    assert only == [["post_norm", "up"]] * 2
    whole = [[fold.name for fold in layer_folds(QWEN, shapes, i, ALL)] for i in (0, 1)]
    last = ["post_norm", "up", "shared_up"]
    assert whole == [["input_norm", "gated_norm", *last], ["input_norm", "value", *last]]


def test_consumers_are_all_that_read_the_channels(model, config, one_thread):
    """The declaration misses none: what is not declared never sees the producer's output."""
    seen = {}

    def note(name):
        def hook(_module, inputs, output=None):
            seen[name] = (inputs[0] if output is None else output).reshape(-1)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith((".gate", ".experts")):
            handles.append(module.register_forward_pre_hook(note(name)))
        elif name.endswith("layernorm"):
            handles.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        model(tokens(model))
    for handle in handles:
        handle.remove()
    shapes = names_of(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = QWEN.layer_prefix(layer)
        for fold in layer_folds(QWEN, shapes, layer, ALL):
            if fold.form != "1+w":
                continue
            made = seen[prefix + fold.producer]
            readers = {name for name, x in seen.items() if torch.equal(x, made)}
            readers.discard(prefix + fold.producer)
            declared = {prefix + name.partition(".*")[0] for name in fold.consumers}
            assert readers == declared


@pytest.mark.parametrize("modules", [("experts",), ALL], ids=["experts", "all"])
def test_stored_dtypes(model, config, modules, one_thread):
    """bf16: unquantised consumers keep their effective weight; the router chooses as before."""
    shapes = names_of(config)
    with torch.no_grad():
        plain = copy.deepcopy(model).bfloat16()
        folded, effective = fold_model(plain, config, NAMES, torch.bfloat16, modules)
        before, after = dict(plain.named_parameters()), dict(folded.named_parameters())
        for (layer, name), divided in effective.items():
            folds = layer_folds(QWEN, shapes, layer, modules)
            fold = next(f for f in folds if f.name == name)
            rows = {f.producer for f in folds if f.form == "rows"}  # divided on their other side
            prefix = QWEN.layer_prefix(layer)
            producer = f"{prefix}{fold.producer}.weight"
            if fold.form == "1+w":
                was, now = before[producer].double() + 1, after[producer].double() + 1
                assert torch.equal(was == 0, now == 0)
                assert torch.allclose(now * divided, was, rtol=1e-6, atol=0)
                assert bool((divided != 1).any())
            for consumer in fold.consumers:
                weight = f"{prefix}{consumer}.weight"
                if consumer not in rows and weight in before and fold.channels is None:
                    kept = after[weight].double() / divided
                    error = (kept - before[weight].double()).abs()
                    assert bool((error <= before[weight].double().abs() * 2**-8).all())
        layer = plain.model.layers[0]
        router, other = layer.mlp.gate, folded.model.layers[0].mlp.gate
        x = torch.randn(4000, config["hidden_size"], dtype=torch.bfloat16)
        norms = layer.post_attention_layernorm, folded.model.layers[0].post_attention_layernorm
        logits = [
            nn.functional.linear(norm(x).double(), gate.weight.double())
            for norm, gate in zip(norms, (router, other), strict=True)
        ]
        k = config["num_experts_per_tok"]
        ranked = logits[0].sort(dim=-1, descending=True).values
        clear = ranked[:, k - 1] - ranked[:, k] > 0.02 * ranked.std()
        chosen = [one.topk(k, dim=-1).indices.sort(-1).values for one in logits]
        assert bool(clear.float().mean() > 0.7)
        assert torch.equal(chosen[0][clear], chosen[1][clear])


def test_members_that_disagree_in_shape(config):
    shapes = names_of(config)
    geometry = geometry_of(QWEN, config, "m")
    check_folds(QWEN, geometry, config, shapes, ALL)
    wrong = shapes | {"model.layers.0.mlp.experts.0.up_proj.weight": (128, 96)}
    said = (
        r"^fold post_norm of layer 0: model.layers.0.mlp.experts.0.up_proj reads 96 channels,"
        r" model.layers.0.post_attention_layernorm makes \d+"
    )
    with pytest.raises(RecipeError, match=said):
        check_folds(QWEN, geometry, config, wrong, ("experts",))
    with pytest.raises(RecipeError, match=r"^fold value of layer 1: 3 key and value heads do not"):
        check_folds(QWEN, geometry, {**config, "num_key_value_heads": 3}, shapes, ALL)


def test_biases_of_folded_rows():
    fold = Fold("f", "a", "rows", ("b",))
    tensors = {
        "model.layers.3.a.weight": torch.randn(4, 5),
        "model.layers.3.a.bias": torch.randn(4),
        "model.layers.3.b.weight": torch.randn(6, 4),
    }
    x = torch.randn(7, 5)

    def output(t):
        inner = nn.functional.linear(x, t["model.layers.3.a.weight"], t["model.layers.3.a.bias"])
        return nn.functional.linear(inner, t["model.layers.3.b.weight"])

    folded, _ = fold_tensors(QWEN, fold, 3, tensors, torch.tensor([0.5, 3.0, 1.0, 9.0]), {})
    assert torch.allclose(output(folded), output(tensors), atol=1e-5)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_an_expert_without_tokens_keeps_the_neutral_scale(method, one_thread):
    """Its matrices are quantised all the same, and others' up and down are scaled together."""
    hidden, inner, counts = 64, 32, [200, 0, 90]
    loud = torch.exp(torch.linspace(-2, 2, inner)[torch.randperm(inner)])
    gate_up = torch.randn(3, 2 * inner, hidden) * 0.1
    gate_up[:, inner:] *= loud.unsqueeze(-1)
    tile = DenseTile(gate_up.bfloat16(), (torch.randn(3, hidden, inner) * 0.1).bfloat16())
    x = torch.randn(sum(counts), hidden).bfloat16()
    routed = Routed(x, torch.arange(len(x)), torch.ones(len(x)), (0, 200, 200, 290))
    job = TileJob(
        checkpoint=None,
        architecture=QWEN,
        layer=0,
        experts=range(3),
        device=torch.device("cpu"),
        quantizer=QUANTIZERS[method],
        scheme=AffineScheme(4, 32, False),
        options=SolverOptions(),
        inner=inner,
    )
    common = x.float().T @ x.float() / len(x)
    layer = LayerStatistics(
        common, x[:40], None, scale=torch.exp(torch.randn(hidden) / 3), folds_down=True
    )
    folded = dataclasses.replace(routed, inputs=(x / layer.scale).bfloat16())
    layer = dataclasses.replace(layer, common=common / torch.outer(layer.scale, layer.scale))
    layer = dataclasses.replace(layer, sample=folded.inputs[:40])
    solved = solve_tile(job, tile, folded, layer)
    up = solved.up.dequantize() / layer.scale
    ratio = (up.norm(dim=-1) / tile.gate_up[:, inner:].float().norm(dim=-1)).log().abs()
    assert float(ratio[1].median()) < 0.05  # not scaled
    assert float(ratio[0].median()) > 0.1
    for expert in range(3):
        outputs = []
        for weights, inputs in ((tile, x), (solved.dense, folded.inputs)):
            total = torch.zeros(len(x), hidden)
            tile_output(
                dataclasses.replace(job, experts=range(1)),
                DenseTile(weights.gate_up[expert : expert + 1], weights.down[expert : expert + 1]),
                Routed(inputs, torch.arange(len(x)), torch.ones(len(x)), (0, len(x))),
            ).add_to(total)
            outputs.append(total)
        assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.25
