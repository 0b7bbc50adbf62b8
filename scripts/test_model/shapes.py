"""The shape of the trained test model, as keyword arguments that transformers 4.57 and 5 share."""

from typing import Any

VOCABULARY = 3072
LAYER_TYPES = ["linear_attention"] * 3 + ["full_attention", "linear_attention", "full_attention"]


def tiny_config() -> dict[str, Any]:
    """35.1M parameters; every matrix of an expert holds whole groups of 128 (3 in, 1 inner)."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 384,
        "intermediate_size": 768,  # of dense layers; there are none
        "num_hidden_layers": len(LAYER_TYPES),
        "layer_types": LAYER_TYPES,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def smoke_config() -> dict[str, Any]:
    """The same parts, small enough for a few steps on a laptop."""
    return tiny_config() | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "layer_types": LAYER_TYPES[2:4],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
