"""compressed-tensors' pack-quantized directories as dense ones that `Checkpoint` reads.

Stored per module M with weight [out, in] of b bits in groups of g inputs, P = 32 / b:
  M.weight_packed      I32 [out, in / P]          code + 2^(b-1), lowest bits first, along inputs
  M.weight_scale       BF16/F16 [out, in / g]
  M.weight_zero_point  I32 [out / P, in / g]      packed alike along outputs; only if asymmetric
  M.weight_shape       I64 [2]                    out, in
weight[o, i] = scale[o, i // g] * (code[o, i] - zero[o, i // g]), codes and zeros signed
(compressed_tensors/compressors/pack_quantized of compressed-tensors 0.19.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
BITS = 4
"""What the benchmark asks for; at 4 bits no code is split over two words."""


def unpack(words: Tensor) -> Tensor:
    """int32 [..., n] -> signed codes, int32 [..., n * 8]."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    # The shift of a signed word drags its sign along; the mask cuts that off.
    codes = (words.unsqueeze(-1) >> shifts) & (2**BITS - 1)
    return codes.flatten(-2) - 2 ** (BITS - 1)


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """One matrix by its parts' names without the module's, as float32 [out, in]."""
    rows, columns = parts["weight_shape"].tolist()
    codes = unpack(parts["weight_packed"])[:, :columns].float()
    scales = parts["weight_scale"].float()
    group = columns // scales.shape[1]
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"].T)[:, :rows].T.float()
        codes = codes - zeros.repeat_interleave(group, dim=1)
    return codes * scales.repeat_interleave(group, dim=1)


def to_dense(packed: Path, dense: Path) -> None:
    """Write `packed` as float32 where it was packed and as stored elsewhere."""
    stored: dict[str, Tensor] = {}
    for file in sorted(packed.glob("*.safetensors")):
        stored |= load_file(file)
    result = {n: t for n, t in stored.items() if n.rpartition(".")[2] not in PARTS}
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            parts = {p: stored[f"{module}.{p}"] for p in PARTS if f"{module}.{p}" in stored}
            result[f"{module}.weight"] = decode(parts)
    dense.mkdir(exist_ok=True)
    save_file(result, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config, indent=2) + "\n")
