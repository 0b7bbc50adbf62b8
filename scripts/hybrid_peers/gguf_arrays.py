"""A Qwen3-Next model of ours as the arrays of a GGUF file, for `llama_side.py` to write.

Names, shapes and changes of value are those that llama.cpp's loader of the architecture
`qwen3next` asks for (ggml-org/llama.cpp, src/models/qwen3next.cpp): norms that multiply by (1 + w)
are stored as 1 + w, A_log as -exp(A_log), and the rows of in_proj_qkvz, which lie key head by key
head, as all q, all k, all v in one matrix and all z in another.

Experts in symmetric groups of 32 become blocks of Q4_0 with the very same codes and scales, 4.5
bits a weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.quantize.tensor import QuantizedTensor

ARRAYS, HEADER = "arrays.safetensors", "gguf.json"
BLOCK = 32
"""Weights of a Q4_0 block: one float16 scale, then 16 bytes of codes."""
Experts = tuple[QuantizedTensor, QuantizedTensor]
"""A layer's gate and up stacked, and down."""

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
_FLOAT32 = ("norm.weight", "ssm_conv1d.weight", "ssm_a", ".bias", "gate_inp.weight",
            "gate_inp_shexp.weight")  # fmt: skip
"""Ends of names that llama.cpp's own converter keeps in float32 (conversion/base.py)."""
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "vocab_size": "vocab_size",
}


def export(model: PreTrainedModel, experts: Sequence[Experts] | None, folder: Path) -> None:
    """Write `folder`'s ARRAYS and HEADER.

    experts: of each layer, in Q4_0's groups; None: those of the model itself, in its dtype.
    """
    arrays: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, value in _values(model):
        small = value.ndim == 1 or name.endswith(_FLOAT32)
        kept = value.float() if small else value
        kinds[name] = {torch.float32: "F32", torch.bfloat16: "BF16"}[kept.dtype]
        arrays[name] = kept.contiguous().view(torch.uint8) if kinds[name] == "BF16" else kept
    for number, (wide, narrow) in enumerate(experts or ()):
        half = wide.shape[-2] // 2
        parts = wide.rows(0, half), wide.rows(half, 2 * half), narrow
        for kind, part in zip(("gate", "up", "down"), parts, strict=True):
            name = f"blk.{number}.ffn_{kind}_exps.weight"
            kinds[name], arrays[name] = "Q4_0", q4_0(part)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in arrays.items()}, folder / ARRAYS)
    header = {"metadata": metadata(model.config.to_dict()), "kinds": kinds}
    (folder / HEADER).write_text(json.dumps(header))


def metadata(config: dict[str, Any]) -> dict[str, int | float | list[bool]]:
    """What the loader wants to know, without the architecture's name before each key."""
    rope = config["rope_parameters"]
    found: dict[str, int | float | list[bool]] = {key: config[name] for key, name in _KEYS.items()}
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    turned = int(config["head_dim"] * rope["partial_rotary_factor"])
    recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    return found | {
        "ssm.inner_size": values,
        "attention.recurrent_layers": recurrent,
        "rope.dimension_count": turned,
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }


def q4_0(matrices: QuantizedTensor) -> Tensor:
    """Blocks of symmetric groups of 32, bytes [..., out, in / 32 * 18].

    A block's value i is scale * (code - 8); its byte j holds code j low and code j + 16 high.
    """
    scheme = matrices.scheme
    if (scheme.bits, scheme.group_size, scheme.symmetric) != (4, BLOCK, True):
        raise ValueError(f"{scheme} are no blocks of Q4_0")
    codes = matrices.arrays["codes"].unflatten(-1, (-1, 2, BLOCK // 2))
    packed = codes[..., 0, :] | codes[..., 1, :] << 4
    scales = matrices.arrays["scales"].half().contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.cat([scales, packed], dim=-1).flatten(-2)


def _values(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """GGUF's name and value of every tensor; experts where the model has them dense."""
    for name, given in model.state_dict().items():
        value = given
        if name in _TOP:
            yield _TOP[name], value.float() + 1 if name == "model.norm.weight" else value
            continue
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        stem = f"blk.{number}."
        if rest == "mlp.experts.gate_up_proj":
            for kind, part in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                yield f"{stem}ffn_{kind}_exps.weight", part
        elif rest == "mlp.experts.down_proj":
            yield f"{stem}ffn_down_exps.weight", value
        elif rest == "linear_attn.in_proj_qkvz.weight":
            mixed, gate = split_qkvz(value, model.config)
            yield f"{stem}attn_qkv.weight", mixed
            yield f"{stem}attn_gate.weight", gate
        else:
            yield stem + _LAYER[rest], _changed(rest, value)


def _changed(rest: str, value: Tensor) -> Tensor:
    if rest == "linear_attn.A_log":
        return -value.float().exp()
    if rest.endswith("norm.weight") and rest != "linear_attn.norm.weight":
        return value.float() + 1
    return value.squeeze(1) if rest == "linear_attn.conv1d.weight" else value.squeeze(0)


def split_qkvz(rows: Tensor, config: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """[(2 K + 2 V r) heads, hidden], head by head -> all q, k and v; all z."""
    heads = config.linear_num_key_heads
    ratio = config.linear_num_value_heads // heads
    key, value = config.linear_key_head_dim, ratio * config.linear_value_head_dim
    parts = rows.unflatten(0, (heads, -1)).split([key, key, value, value], dim=1)
    query, keys, values, gate = (part.flatten(0, 1) for part in parts)
    return torch.cat([query, keys, values]), gate
