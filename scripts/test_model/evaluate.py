"""Perplexity of the test model and of the Kneser-Ney yardstick, over the very same tokens.

Runs under transformers 5 on CPU. A directory may be dense or NF4: NF4 matrices are dequantised
with bitsandbytes and put into the dense model, since transformers 5 does not load this layout.
Windows do not overlap, and the first token of each is given; the yardstick's log-probabilities
(kneser_ney.py --scores) are averaged over exactly the tokens that the model predicts.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM

STATE = ".quant_state.bitsandbytes__nf4"
KN_CONTEXT = 4  # the yardstick's first prediction is the fifth token


def read_dense(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a directory by name, NF4 ones dequantised to their stored dtype."""
    raw: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            raw |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in raw.items():
        if ".weight." in name:
            continue  # a part of a quantised matrix
        if name + STATE in raw:
            parts = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", STATE[1:])
            stored = {part: raw[f"{name}.{part}"] for part in parts}
            state = bnb.QuantState.from_dict(stored, device=torch.device("cpu"))
            dense[name] = bnb.dequantize_4bit(tensor, state)
        else:
            dense[name] = tensor
    return dense


def load(folder: Path, dtype: torch.dtype) -> Qwen3NextForCausalLM:
    """The model of a directory in transformers 5, experts stacked by hand, all keys matched."""
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    config = Qwen3NextConfig(**raw)
    dense = read_dense(folder)
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}.mlp.experts"

        def stack(kind: str, base: str = base) -> torch.Tensor:
            names = [f"{base}.{n}.{kind}_proj.weight" for n in range(config.num_experts)]
            return torch.stack([dense.pop(name) for name in names])

        dense[f"{base}.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], dim=1)
        dense[f"{base}.down_proj"] = stack("down")
    model = Qwen3NextForCausalLM(config)
    model.load_state_dict(dense, strict=True)
    nn.Module.to(model, dtype)
    return model.eval()


@torch.no_grad()
def token_losses(model: Qwen3NextForCausalLM, tokens: np.ndarray, length: int) -> np.ndarray:
    """-log P of every token; NaN where none is predicted (the first of each window)."""
    losses = np.full(len(tokens), np.nan, dtype=np.float64)
    for at in range(0, len(tokens) - 1, length):
        ids = torch.from_numpy(tokens[at : at + length].astype(np.int64))[None]
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses[at + 1 : at + ids.shape[1]] = loss.double().numpy()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--scores", type=Path, help="folder of TEXT.bin.kn")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for path in args.texts:
        text = path.read_text(encoding="utf-8")
        tokens = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
        losses = token_losses(model, tokens, args.length)
        figures = {"model": args.model.name, "dtype": args.dtype, "text": path.name}
        figures |= {"tokens": len(tokens), "perplexity": round(math.exp(np.nanmean(losses)), 4)}
        if args.scores:
            scores = np.fromfile(args.scores / f"{path.name}.bin.kn", np.float32).astype(float)
            both = ~np.isnan(losses[KN_CONTEXT:])
            if len(scores) != len(both):
                raise ValueError(f"{path.name}: the yardstick saw other tokens")
            kn = math.exp(-scores[both].mean())
            own = math.exp(losses[KN_CONTEXT:][both].mean())
            figures |= {"kneser_ney": round(kn, 4), "ratio": round(own / kn, 4)}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
