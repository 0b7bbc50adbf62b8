"""A peer's result with what it did wrong put right, to see whether that was the reason.

Two faults are known, both of norms that multiply by 1 + w and of what reads them:
  - a fold divides 1 + w by s, and the router, which reads the same norm, is not multiplied by s
    (llm-compressor's AWQ: its mappings leave the router out);
  - 1 + w is rounded to bf16 and brought back to w, though nothing was folded (llm-compressor, which
    takes every such norm for a plain one while it calibrates).
Mended, a norm that differs by rounding alone is the source's again, and the router of a layer whose
norm was folded is multiplied by what the norm was divided by.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint.reader import Checkpoint

ROUNDING = 0.02
"""Relative change of 1 + w up to which it is rounding: twice what bf16 can do where w is near -1
and far more where it is not."""


def mend(result: Path, source: Path, mended: Path) -> None:
    """Write `result`, readable by `Checkpoint`, as a dense float32 directory without the faults."""
    theirs, ours = Checkpoint.open(result), Checkpoint.open(source)
    tensors = {name: theirs.load(name).float() for name in theirs.weights}
    for name in list(tensors):
        if not name.endswith("norm.weight") or ".linear_attn." in name:
            continue  # DeltaNet's own norm multiplies by w
        scale = fold(ours.load(name).float(), tensors[name])
        if bool(((scale - 1).abs() < ROUNDING).all()):
            tensors[name] = ours.load(name).float()
        elif name.endswith("post_attention_layernorm.weight"):
            router = name.replace("post_attention_layernorm", "mlp.gate")
            tensors[router] = ours.load(router).float() * scale
    mended.mkdir(parents=True)
    save_file(tensors, mended / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in theirs.config.items() if k != "quantization_config"}
    (mended / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fold(before: Tensor, after: Tensor) -> Tensor:
    """What 1 + w was divided by, channel by channel; 1 where it was and is nothing."""
    whole = 1 + after
    return torch.where(whole == 0, 1.0, (1 + before) / whole)
