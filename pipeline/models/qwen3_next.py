"""Qwen3-Next: gated DeltaNet and gated attention layers, each followed by a sparse MoE block with
one shared expert (transformers `models/qwen3_next`).

Norms multiply by (1 + w).  The router is a softmax over all experts, then top-k, renormalised where
`norm_topk_prob` says so; the transformers module does that itself.  Multi-token-prediction tensors
(`mtp.*`) are no part of the causal model and are dropped, as transformers drops them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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


def _layer_kinds(config: Mapping[str, Any]) -> Sequence[str]:
    kinds: Sequence[str] | None = config.get("layer_types")
    if kinds is not None:
        return kinds
    interval = int(config.get("full_attention_interval", 4))
    numbers = range(1, int(config["num_hidden_layers"]) + 1)
    return ["linear_attention" if i % interval else "full_attention" for i in numbers]


def _geometry(config: Mapping[str, Any]) -> Geometry:
    return sparse_geometry(config, _layer_kinds(config))


def _gated_norm_channels(config: Mapping[str, Any]) -> Tensor:
    """Which weight of DeltaNet's gated norm each column of out_proj reads: one for all heads."""
    size = int(config["linear_value_head_dim"])
    return torch.arange(int(config["linear_num_value_heads"]) * size) % size


ARCHITECTURES.register(
    "qwen3_next",
    Architecture(
        model_type="qwen3_next",
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
            ModuleGroup("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ModuleGroup("attention", ("self_attn.o_proj",)),
            ModuleGroup("deltanet", ("linear_attn.in_proj_qkvz",)),
            ModuleGroup("deltanet", ("linear_attn.out_proj",)),
        ),
        shared_groups=(
            ModuleGroup(
                "shared_expert", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
            ),
            ModuleGroup("shared_expert", ("mlp.shared_expert.down_proj",)),
        ),
        never_quantized=("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_ba"),
        ignored=("mtp",),
        norm_form="1+w",
        geometry=_geometry,
        residual_norms=("input_layernorm", "post_attention_layernorm"),
        folds=(
            Fold(
                "input_norm",
                "input_layernorm",
                "1+w",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            Fold(
                "input_norm",
                "input_layernorm",
                "1+w",
                ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
            ),
            Fold(
                "value",
                "self_attn.v_proj",
                "rows",
                ("self_attn.o_proj",),
                channels=shared_value_channels,
            ),
            Fold(
                "gated_norm",
                "linear_attn.norm",
                "w",
                ("linear_attn.out_proj",),
                channels=_gated_norm_channels,
            ),
            Fold(
                "post_norm",
                "post_attention_layernorm",
                "1+w",
                (
                    "mlp.gate",
                    "mlp.experts.*.gate_proj",
                    "mlp.experts.*.up_proj",
                    "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj",
                    "mlp.shared_expert_gate",
                ),
            ),
            Fold("up", "mlp.experts.*.up_proj", "rows", ("mlp.experts.*.down_proj",)),
            Fold(
                "shared_up",
                "mlp.shared_expert.up_proj",
                "rows",
                ("mlp.shared_expert.down_proj",),
            ),
        ),
        call_layer=call_decoder_layer,
    ),
)
