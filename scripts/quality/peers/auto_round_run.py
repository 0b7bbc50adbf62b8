"""AutoRound's signed gradient descent, symmetric, stored as GPTQ: by its defaults (200 steps a
layer), or by the settings of its `auto-round-light` command (50), a quarter of the time.

The tokens come as a registered data set, not as tensors: for tensors it makes an attention mask,
keeps the one that the first layer saw (two-dimensional, for a DeltaNet layer) and hands it to the
full attention layers, which stop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calib_dataset import register_dataset
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quality.peers.contract import Task, checked_modules, task

NAME = "given-tokens"
STEPS: dict[str, dict[str, Any]] = {
    "autoround": {},
    "autoround-light": {"iters": 50, "lr": 5e-3},
}
DENSE = (r".*self_attn.*", r".*linear_attn.*", r".*shared_expert.*", r".*mlp\.gate$")


def register(given: Task) -> None:
    """Make the tokens known to AutoRound under NAME."""
    rows = given.tokens.tolist()
    data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    register_dataset(NAME)(lambda **_settings: Dataset.from_dict(data))


def own_reading(output: Path, group: int, layers: int) -> dict[str, torch.Tensor]:
    """Some weights by AutoRound's plain kernel: what it makes of the unit matrix."""
    stored = load_file(output / "model.safetensors")
    read = {}
    for name in checked_modules(range(layers)):
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        columns, rows = parts["qweight"].shape[0] * 8, parts["scales"].shape[1]
        kernel = QuantLinear(4, group, columns, rows, bias=False)
        kernel.load_state_dict(parts)
        read[name] = kernel(torch.eye(columns)).T
    return read


def main() -> None:
    """See contract.py."""
    given = task()
    register(given)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        scheme={"bits": 4, "group_size": given.group, "sym": True, "data_type": "int"},
        layer_config={pattern: {"bits": 16} for pattern in DENSE},
        dataset=NAME,
        nsamples=len(given.tokens),
        seqlen=given.tokens.shape[1],
        alg_configs=SignRoundConfig(**STEPS[given.method]),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(str(given.output), format="auto_gptq")
    (written,) = given.output.iterdir()  # a folder named after the model and the scheme
    for file in written.iterdir():
        file.rename(given.output / file.name)
    written.rmdir()
    given.keep(own_reading(given.output, given.group, given.layers))


if __name__ == "__main__":
    main()
