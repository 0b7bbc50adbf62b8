"""True geometries of mixture-of-experts models, and what their tensors are called on disk.

Sizes and names are those of the published config.json and index of each model (Qwen3-Next-80B-A3B,
Qwen3-30B-A3B, Mixtral-8x7B-v0.1 on the Hugging Face Hub); no weight of theirs is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, ...]

BNB_CONFIG: dict[str, Any] = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


@dataclass(frozen=True)
class Model:
    """One architecture at its true size; layers and experts may be cut."""

    name: str
    config: dict[str, Any]
    layers: int
    experts: int
    hidden: int
    inner: int
    vocabulary: int
    experts_key: str
    """The key of config.json that says how many experts there are."""
    experts_module: str
    """Below the layer, such as mlp.experts."""
    projections: tuple[str, str, str]
    """Gate, up and down, as named on disk."""
    router: str
    matrices: Callable[[int], dict[str, Shape]]
    """Layer -> linear modules outside the experts and the router, [out, in]; stored as NF4."""
    plain: Callable[[int], dict[str, Shape]]
    """Layer -> other tensors, by their whole name below the layer; stored as BF16."""
    norm: float
    """What a norm's weights lie around: 0 where it multiplies by (1 + w), 1 where by w."""

    def cut(self, layers: int | None, experts: int | None) -> Model:
        """The same model with fewer (or more) layers and experts; ValueError below its top-k."""
        made = replace(self, layers=layers or self.layers, experts=experts or self.experts)
        if made.experts < self.config["num_experts_per_tok"]:
            raise ValueError(f"{self.name} sends every token to more than {made.experts} experts")
        changed = {"num_hidden_layers": made.layers, self.experts_key: made.experts}
        return replace(made, config=self.config | changed)

    def expert_matrices(self) -> dict[str, Shape]:
        """One expert's matrices, below `experts_module.NUMBER`."""
        gate, up, down = self.projections
        wide = (self.inner, self.hidden)
        return {gate: wide, up: wide, down: (self.hidden, self.inner)}


def _qwen3_next() -> Model:
    hidden, inner, keys, values = 2048, 512, 16 * 128, 32 * 128

    def full(layer: int) -> bool:
        return (layer + 1) % 4 == 0

    def matrices(layer: int) -> dict[str, Shape]:
        mixer: dict[str, Shape] = {
            "linear_attn.in_proj_qkvz": (2 * keys + 2 * values, hidden),
            "linear_attn.in_proj_ba": (2 * 32, hidden),
            "linear_attn.out_proj": (hidden, values),
        }
        if full(layer):
            mixer = {
                "self_attn.q_proj": (2 * 16 * 256, hidden),
                "self_attn.k_proj": (2 * 256, hidden),
                "self_attn.v_proj": (2 * 256, hidden),
                "self_attn.o_proj": (hidden, 16 * 256),
            }
        return mixer | {
            "mlp.shared_expert_gate": (1, hidden),
            "mlp.shared_expert.gate_proj": (inner, hidden),
            "mlp.shared_expert.up_proj": (inner, hidden),
            "mlp.shared_expert.down_proj": (hidden, inner),
        }

    def plain(layer: int) -> dict[str, Shape]:
        norms: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if full(layer):
            return norms | {"self_attn.q_norm.weight": (256,), "self_attn.k_norm.weight": (256,)}
        return norms | {
            "linear_attn.conv1d.weight": (2 * keys + values, 1, 4),
            "linear_attn.A_log": (32,),
            "linear_attn.dt_bias": (32,),
            "linear_attn.norm.weight": (128,),
        }

    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": inner,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
    return Model(
        name="qwen3-next-80b",
        config=config,
        layers=48,
        experts=512,
        hidden=hidden,
        inner=inner,
        vocabulary=151936,
        experts_key="num_experts",
        experts_module="mlp.experts",
        projections=("gate_proj", "up_proj", "down_proj"),
        router="mlp.gate",
        matrices=matrices,
        plain=plain,
        norm=0.0,
    )


def _qwen3_moe() -> Model:
    hidden = 2048

    def matrices(_layer: int) -> dict[str, Shape]:
        return {
            "self_attn.q_proj": (32 * 128, hidden),
            "self_attn.k_proj": (4 * 128, hidden),
            "self_attn.v_proj": (4 * 128, hidden),
            "self_attn.o_proj": (hidden, 32 * 128),
        }

    def plain(_layer: int) -> dict[str, Shape]:
        return {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_norm.weight": (128,),
            "self_attn.k_norm.weight": (128,),
        }

    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
    return Model(
        name="qwen3-30b-a3b",
        config=config,
        layers=48,
        experts=128,
        hidden=hidden,
        inner=768,
        vocabulary=151936,
        experts_key="num_experts",
        experts_module="mlp.experts",
        projections=("gate_proj", "up_proj", "down_proj"),
        router="mlp.gate",
        matrices=matrices,
        plain=plain,
        norm=1.0,
    )


def _mixtral() -> Model:
    hidden = 4096

    def matrices(_layer: int) -> dict[str, Shape]:
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (8 * 128, hidden),
            "self_attn.v_proj": (8 * 128, hidden),
            "self_attn.o_proj": (hidden, hidden),
        }

    def plain(_layer: int) -> dict[str, Shape]:
        return {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}

    config = {
        "architectures": ["MixtralForCausalLM"],
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    return Model(
        name="mixtral-8x7b",
        config=config,
        layers=32,
        experts=8,
        hidden=hidden,
        inner=14336,
        vocabulary=32000,
        experts_key="num_local_experts",
        experts_module="block_sparse_moe.experts",
        projections=("w1", "w3", "w2"),
        router="block_sparse_moe.gate",
        matrices=matrices,
        plain=plain,
        norm=1.0,
    )


MODELS = {model.name: model for model in (_qwen3_next(), _qwen3_moe(), _mixtral())}
