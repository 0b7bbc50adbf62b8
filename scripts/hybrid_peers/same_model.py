"""Whether llama.cpp computes the same model from the file that `gguf_arrays.py` describes.

    PYTHONPATH=scripts:scripts/test_model .venv/bin/python -m hybrid_peers.same_model \
        .env-llama-cpp/bin/python

On the shipped, trained model and held-out text, logits of llama.cpp, token by token, against those
of transformers in float32: once with all weights in float32, and once with experts rounded to
symmetric 4 bits in groups of 32, which Q4_0 holds exactly.  Where transformers computes in bfloat16
the same experts are off by what is printed beside; llama.cpp rounds the inputs of Q4_0 products to
8 bits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import load
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from hybrid_peers.gguf_arrays import BLOCK, Experts, export
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "tests" / "models" / "qwen3-next-tiny-nf4"
TEXT = ROOT / "calibration" / "docs-eval.txt"
PASSAGES, LENGTH = 16, 128
SIDE = Path(__file__).with_name("llama_side.py")


def main() -> None:
    peer = sys.argv[1]
    torch.set_num_threads(1)
    ids = passages()
    model: Any = load(TRAINED, torch.float32)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        export(model, None, folder / "dense")
        compare("all float32", model(ids).logits, theirs(peer, folder / "dense", ids), ids)
        export(model, rounded(model), folder / "q4")
        exact = model(ids).logits
        compare("experts Q4_0", exact, theirs(peer, folder / "q4", ids), ids)
        compare("  transformers in bfloat16", exact, model.bfloat16()(ids).logits.float(), ids)


def passages() -> Tensor:
    """int64 [PASSAGES, LENGTH] of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    tokens = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8")[:60_000]).input_ids)
    return tokens[: PASSAGES * LENGTH].view(PASSAGES, LENGTH)


def rounded(model: Any) -> list[Experts]:  # noqa: ANN401
    """Its experts in Q4_0's groups; the model itself gets what they stand for."""
    result = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        pair = []
        for weight in (experts.gate_up_proj, experts.down_proj):
            pair.append(_round(weight.data))
            weight.data.copy_(pair[-1].dequantize())
        result.append((pair[0], pair[1]))
    return result


def _round(weights: Tensor) -> QuantizedTensor:
    options = SolverOptions(scale_search=True)
    scheme = AffineScheme(4, BLOCK, True)
    return QUANTIZERS["rtn"].quantize(weights.contiguous(), None, scheme, options).quantized


def theirs(peer: str, folder: Path, ids: Tensor) -> Tensor:
    """llama.cpp's logits, float32 [passages, length, vocabulary]."""
    np.save(folder / "ids.npy", ids.numpy().astype(np.int32))
    files = [str(folder / name) for name in ("ids.npy", "out.npy")]
    for command in (["write", str(folder)], ["logits", str(folder), *files]):
        subprocess.run([peer, str(SIDE), *command], check=True, stdout=subprocess.DEVNULL)
    return torch.from_numpy(np.load(folder / "out.npy"))


def compare(what: str, exact: Tensor, got: Tensor, ids: Tensor) -> None:
    """Print how far `got` is from `exact`, and what either makes of the text's next tokens."""
    error = float((got - exact).norm() / exact.norm())
    alike = float((got.argmax(-1) == exact.argmax(-1)).float().mean())
    spread = exact.log_softmax(-1)
    divergence = float((spread.exp() * (spread - got.log_softmax(-1))).sum(-1).mean())
    losses = [
        float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for logits in (exact, got)
    ]
    ratio = float(np.exp(losses[1] - losses[0]))
    print(
        f"{what}: logits {error:.6f} apart, top-1 alike {alike:.2%}, KL {divergence:.2e} nats, "
        f"perplexity times {ratio:.5f}"
    )


if __name__ == "__main__":
    main()
