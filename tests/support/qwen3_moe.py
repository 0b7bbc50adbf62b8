"""A micro Qwen3-MoE (layer 1 dense, layers 0 and 2 of 8 experts) with random weights, as a
bitsandbytes 4-bit upload holds it: made anew in every session, since nothing of it is learned."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from layout import four_bit, write_model
from support.recipes import MICRO
from support.variants import SIDE
from torch import Tensor, nn

from pipeline.models.skeleton import build_skeleton, model_config

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
    "mlp_only_layers": [1],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def micro_moe(folder: Path) -> Path:
    """Write the source directory: every linear module but the head in NF4, the router too."""
    model = build_skeleton(model_config(CONFIG), torch.bfloat16)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears -= {"lm_head.weight"}
    dense: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = _drawn(name, tuple(parameter.shape))
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                stored |= _matrix(f"{stem}.{expert}.gate_proj.weight", gate)
                stored |= _matrix(f"{stem}.{expert}.up_proj.weight", up)
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            for expert, matrix in enumerate(value):
                stored |= _matrix(f"{stem}.{expert}.down_proj.weight", matrix)
        elif name in linears or name.endswith("mlp.gate.weight"):
            stored |= _matrix(name, value)
        else:
            dense[name] = value.to(torch.bfloat16)
    files = {"model-00001-of-00002.safetensors": dense, "model-00002-of-00002.safetensors": stored}
    write_model(folder, files, CONFIG | {"quantization_config": BNB})
    for name in SIDE:
        shutil.copy(MICRO / name, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """About unit gain through each matrix; norms far enough from 1 that a wrong fold shows."""
    noise = torch.randn(shape)
    if "norm" in name:
        return 1 + 0.3 * noise
    return noise * (0.5 if "embed" in name else shape[-1] ** -0.5)


def _matrix(name: str, weight: Tensor) -> dict[str, Tensor]:
    return four_bit(name, weight.to(torch.bfloat16).contiguous())
