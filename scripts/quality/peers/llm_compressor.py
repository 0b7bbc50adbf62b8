"""llm-compressor's GPTQ and AWQ, as its examples for mixtures of experts call them.

Experts are calibrated on the tokens that are routed to them, as by all others; by `gptq-all` on all
tokens, which is its default and takes eight times the work here.  AWQ's mappings are its own for
this architecture, less those whose layers stay unquantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from quality.peers.contract import Task, checked_modules, task

ALL_TOKENS = "gptq-all"
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"


def recipe(method: str, weights: QuantizationArgs) -> list[Any]:
    """The modifiers of one method."""
    groups = {"experts": QuantizationScheme(targets=[EXPERTS], weights=weights)}
    if method != "awq":
        return [GPTQModifier(config_groups=groups)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups)]


def without_pinning() -> None:
    """AWQ of 0.14.0.1 pins memory whether or not there is an accelerator to pin it for, and stops.

    Pinning speeds up copies and changes no number.
    """
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None


def quantize(given: Task, weights: QuantizationArgs) -> None:
    """Load, calibrate, save."""
    # `load_quantizable_moe` would import every image processor of transformers, and so torchvision;
    # this is what it falls back to for models that are stored stacked.
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    linearize_moe(model)
    loader = DataLoader(given.sequences, batch_size=None)  # type: ignore[arg-type, var-annotated]
    oneshot(
        model=model,
        dataset=loader,
        recipe=recipe(given.method, weights),
        num_calibration_samples=len(given.tokens),
        max_seq_length=given.tokens.shape[1],
        moe_calibrate_all_experts=given.method == ALL_TOKENS,
    )
    model.save_pretrained(given.output, save_compressed=True)


def own_reading(output: Path, weights: QuantizationArgs, layers: int) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of some of the saved matrices."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        stored |= load_file(file)
    scheme = QuantizationScheme(targets=[EXPERTS], weights=weights)
    read = {}
    for module in checked_modules(range(layers)):
        prefix = f"{module}."
        parts = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        read[module] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return read


def main() -> None:
    """See contract.py."""
    given = task()
    without_pinning()
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=given.group,
        symmetric=given.method != "awq",
    )
    quantize(given, weights)
    given.keep(own_reading(given.output, weights, given.layers))


if __name__ == "__main__":
    main()
