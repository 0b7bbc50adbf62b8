"""Writes trained weights as a dense bf16 model directory of transformers 4: one matrix an expert.

Runs under transformers 4.57.6 (see make_env.sh), so that the configuration, too, is what that
version writes. transformers 5 trains with stacked experts: `gate_up_proj` [expert, 2 * inner,
hidden] holds gate above up, `down_proj` is [expert, hidden, inner].
"""

import argparse
from pathlib import Path

import torch
from shapes import tiny_config
from tokenizer import END_OF_TEXT
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from weights_file import read_pieces


def unstack(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Split stacked experts into `experts.N.{gate,up,down}_proj.weight`."""
    single: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            single[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            base = f"{prefix}.{expert}"
            if leaf == "gate_up_proj":
                gate, up = matrix.chunk(2, dim=0)
                single[f"{base}.gate_proj.weight"] = gate.contiguous()
                single[f"{base}.up_proj.weight"] = up.contiguous()
            else:
                single[f"{base}.down_proj.weight"] = matrix.contiguous()
    return single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights-*.bin")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = Qwen3NextConfig(**tiny_config())
    model = Qwen3NextForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    model.load_state_dict(unstack(read_pieces(args.weights)), strict=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(args.output, max_shard_size="40MB")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(args.tokenizer)),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=config.max_position_embeddings,
    )
    wrapped.save_pretrained(args.output)


if __name__ == "__main__":
    main()
