"""The headers of a full Qwen3-Next-80B-A3B as Unsloth uploaded it: files that end where their
tensors would begin.  Written as text, since 443,000 dictionaries would take too long."""

import json
import struct
from pathlib import Path

LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 48, 512, 2048, 512, 151_936
SHARDS = 9
STATE_BYTES = 190
CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 5120,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000_000,
    "max_position_embeddings": 262_144,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": INNER,
    "shared_expert_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}
ATTENTION = {
    "self_attn.q_proj": (2 * 16 * 256, HIDDEN),
    "self_attn.k_proj": (2 * 256, HIDDEN),
    "self_attn.v_proj": (2 * 256, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 16 * 256),
}
DELTANET = {
    "linear_attn.in_proj_qkvz": (2 * 16 * 128 + 2 * 32 * 128, HIDDEN),
    "linear_attn.in_proj_ba": (2 * 32, HIDDEN),
    "linear_attn.out_proj": (HIDDEN, 32 * 128),
}
EVERY_LAYER = {
    "mlp.gate": (EXPERTS, HIDDEN),
    "mlp.shared_expert_gate": (1, HIDDEN),
    "mlp.shared_expert.gate_proj": (INNER, HIDDEN),
    "mlp.shared_expert.up_proj": (INNER, HIDDEN),
    "mlp.shared_expert.down_proj": (HIDDEN, INNER),
}
PLAIN_ATTENTION = {"self_attn.q_norm.weight": (256,), "self_attn.k_norm.weight": (256,)}
PLAIN_DELTANET = {
    "linear_attn.conv1d.weight": (2 * 16 * 128 + 32 * 128, 1, 4),
    "linear_attn.A_log": (32,),
    "linear_attn.dt_bias": (32,),
    "linear_attn.norm.weight": (128,),
}
NORMS = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}


class _File:
    """The header of one shard, growing."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.names: list[str] = []
        self.end = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        numbers = ",".join(map(str, shape))
        span = f"[{self.end},{self.end + nbytes}]"
        self.entries.append(
            f'"{name}":{{"dtype":"{dtype}","shape":[{numbers}],"data_offsets":{span}}}'
        )
        self.names.append(name)
        self.end += nbytes

    def nf4(self, module: str, rows: int, columns: int) -> None:
        """One matrix with double quantised block scales."""
        weight, elements = f"{module}.weight", rows * columns
        blocks = -(-elements // 64)
        nested = -(-blocks // 256)
        self.add(weight, "U8", (elements // 2, 1), elements // 2)
        self.add(f"{weight}.absmax", "U8", (blocks,), blocks)
        self.add(f"{weight}.nested_absmax", "F32", (nested,), 4 * nested)
        self.add(f"{weight}.nested_quant_map", "F32", (256,), 1024)
        self.add(f"{weight}.quant_map", "F32", (16,), 64)
        self.add(f"{weight}.quant_state.bitsandbytes__nf4", "U8", (STATE_BYTES,), STATE_BYTES)

    def plain(self, name: str, shape: tuple[int, ...]) -> None:
        elements = 1
        for length in shape:
            elements *= length
        self.add(name, "BF16", shape, 2 * elements)

    def write(self, path: Path) -> None:
        text = ("{" + ",".join(self.entries) + "}").encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)


def write_headers(directory: Path) -> Path:
    """The whole directory: 9 shards without data, index, config."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [_File() for _ in range(SHARDS)]
    files[0].plain("model.embed_tokens.weight", (VOCABULARY, HIDDEN))
    files[-1].plain("model.norm.weight", (HIDDEN,))
    files[-1].plain("lm_head.weight", (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        file, prefix = files[layer * SHARDS // LAYERS], f"model.layers.{layer}."
        full = (layer + 1) % 4 == 0
        for name, (rows, columns) in {**(ATTENTION if full else DELTANET), **EVERY_LAYER}.items():
            file.nf4(prefix + name, rows, columns)
        for name, shape in {**NORMS, **(PLAIN_ATTENTION if full else PLAIN_DELTANET)}.items():
            file.plain(prefix + name, shape)
        for expert in range(EXPERTS):
            for name, shape in (("gate", 0), ("up", 0), ("down", 1)):
                rows, columns = (HIDDEN, INNER) if shape else (INNER, HIDDEN)
                file.nf4(f"{prefix}mlp.experts.{expert}.{name}_proj", rows, columns)
    mapped = []
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        file.write(directory / name)
        mapped += [f'"{tensor}":"{name}"' for tensor in file.names]
    index = '{"metadata":{},"weight_map":{' + ",".join(mapped) + "}}"
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory
