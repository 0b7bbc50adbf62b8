"""Writes the micro model as dense bf16: two layers of every part, random weights.

Runs under transformers 4 (see make_env.sh). The norms are drawn away from zero on purpose: a
fresh Qwen3-Next has w = 0 in every norm that multiplies by (1 + w), and that hides wrong folds.
The vocabulary is bytes and a few merges, trained on the text given, so that no file is borrowed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizer import END_OF_TEXT, train_bpe
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

VOCABULARY = 512
LAYER_TYPES = ["linear_attention", "full_attention"]


def micro_config() -> Qwen3NextConfig:
    """Smallest shape in which every matrix still holds whole groups of 128 (and of 32)."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": len(LAYER_TYPES),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "layer_types": LAYER_TYPES,
        "full_attention_interval": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return Qwen3NextConfig(**shape)


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter, in the order of its name: about unit gain through each matrix."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("linear_attn.norm.weight"):  # this one norm multiplies by w, not 1 + w
            value = 1 + 0.2 * noise
        elif "norm" in name or name.endswith(("A_log", "dt_bias")):
            value = 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            value = 0.5 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data = value.to(torch.bfloat16)


def save_tokenizer(tokenizer: Tokenizer, output: Path, length: int) -> None:
    """Write the tokenizer as transformers reads it (one special token, no BOS added)."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        model_max_length=length,
    )  # fmt: skip
    wrapped.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="text to train the merges on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20261123)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Qwen3NextForCausalLM(micro_config())
    randomise(model, args.seed)
    nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(args.output)
    text = args.text.read_text(encoding="utf-8")[:200_000]
    save_tokenizer(train_bpe([text], VOCABULARY), args.output, 1024)


if __name__ == "__main__":
    main()
