"""The whole source as a plain transformers model, decoded by bitsandbytes itself, matrix by matrix:
what the pipeline's own reading and streaming is measured against."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.models.skeleton import model_config

MARK = ".quant_state.bitsandbytes__nf4"


def source_state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an NF4 checkpoint in bf16, by its dense name."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    matrices = [name.removesuffix(MARK) for name in stored if name.endswith(MARK)]
    dense = {}
    for name in matrices:
        parts = {k: stored.pop(k) for k in list(stored) if k.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        dense[name] = bnb.dequantize_4bit(stored.pop(name), state)
    return dense | stored


def source_model(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The causal model of a source directory, its experts fused as transformers 5 holds them."""
    state = source_state(path)
    config = model_config(json.loads((path / "config.json").read_text()))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts."
        if f"{stem}0.gate_proj.weight" not in state:
            continue  # a dense layer
        expert = {
            part: torch.stack(
                [state.pop(f"{stem}{e}.{part}.weight") for e in range(config.num_experts)]
            )
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        state[f"{stem}gate_up_proj"] = torch.cat([expert["gate_proj"], expert["up_proj"]], dim=1)
        state[f"{stem}down_proj"] = expert["down_proj"]
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
