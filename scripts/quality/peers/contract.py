"""What a peer's script is given, and what it leaves behind.

    python -m quality.peers.NAME MODEL TOKENS OUTPUT METHOD GROUP

MODEL    dense bf16 directory
TOKENS   safetensors with `tokens`, int64 [sequences, length]: all there is to calibrate on
OUTPUT   directory that the peer writes, in whatever format it has
METHOD   gptq, awq, gptq-all, autoround or autoround-light: what the peer is asked for
GROUP    inputs that share one scale; 4 bits always

Routed experts are quantised and nothing else.  Beside OUTPUT it leaves OUTPUT.own.safetensors: a
few experts' weights [out, in] as the peer itself dequantises what it wrote, by which our reading
of its format is checked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CHECKED_EXPERTS = (0, 13, 31)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Task:
    """The arguments."""

    model: Path
    tokens: torch.Tensor
    output: Path
    method: str
    group: int

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return int(json.loads((self.model / "config.json").read_text())["num_hidden_layers"])

    @property
    def sequences(self) -> list[dict[str, torch.Tensor]]:
        """Tokens as batches of one, with a mask that masks nothing."""
        rows = self.tokens.unsqueeze(1)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]

    def keep(self, weights: dict[str, torch.Tensor]) -> None:
        """Leave the peer's own dequantised weights for the check."""
        plain = {name: weight.detach().float().contiguous() for name, weight in weights.items()}
        save_file(plain, self.output.with_name(self.output.name + ".own.safetensors"))


def task() -> Task:
    """From the command line."""
    model, tokens, output, method, group = sys.argv[1:]
    return Task(Path(model), load_file(tokens)["tokens"], Path(output), method, int(group))


def checked_modules(layers: Iterable[int]) -> list[str]:
    """Names of the experts' matrices that are compared."""
    return [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
        for layer in layers
        for expert in CHECKED_EXPERTS
        for projection in PROJECTIONS
    ]
