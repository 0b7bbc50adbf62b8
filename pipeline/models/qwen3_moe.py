"""Qwen3-MoE, such as Qwen3-30B-A3B: attention layers, each followed by a sparse MoE block without a
shared expert (transformers `models/qwen3_moe`).

Norms multiply by w.  The router is a softmax over all experts, then top-k, renormalised where
`norm_topk_prob` says so; the transformers module does that itself.  Layers that config.json makes
dense (`mlp_only_layers`, `decoder_sparse_step`) are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.models import ARCHITECTURES
from pipeline.models.architecture import (
    Architecture,
    Fold,
    Geometry,
    ModuleGroup,
    call_decoder_layer,
    shared_value_channels,
    sparse_geometry,
)


def _geometry(config: Mapping[str, Any]) -> Geometry:
    if config.get("use_sliding_window"):  # no published model has it on; the layer call has no mask
        raise ValueError("attention in a sliding window is not supported")
    return sparse_geometry(config, ("full_attention",) * int(config["num_hidden_layers"]))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

ARCHITECTURES.register(
    "qwen3_moe",
    Architecture(
        model_type="qwen3_moe",
        layer="model.layers.{layer}",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        router="mlp.gate",
        experts="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        activation=torch.nn.functional.silu,
        mixer_groups=(
            ModuleGroup("attention", _QKV),
            ModuleGroup("attention", ("self_attn.o_proj",)),
        ),
        shared_groups=(),
        never_quantized=("mlp.gate", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        ignored=(),
        norm_form="w",
        geometry=_geometry,
        residual_norms=("input_layernorm", "post_attention_layernorm"),
        folds=(
            Fold("input_norm", "input_layernorm", "w", _QKV),
            Fold(
                "value",
                "self_attn.v_proj",
                "rows",
                ("self_attn.o_proj",),
                channels=shared_value_channels,
            ),
            Fold(
                "post_norm",
                "post_attention_layernorm",
                "w",
                ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
            ),
            Fold("up", "mlp.experts.*.up_proj", "rows", ("mlp.experts.*.down_proj",)),
        ),
        call_layer=call_decoder_layer,
    ),
)
