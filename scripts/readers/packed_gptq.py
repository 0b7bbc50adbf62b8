"""A GPTQ directory read without any reader's help: packed tensors to dense float32 weights.

This is the yardstick of `check_readers.py`, so it shares no code with the readers nor with the
package that wrote the directory: the layout below is AutoGPTQ's, spelled out once more.

  M.qweight I32 [in / P, out]       P = 32 / bits codes a word, lowest bits first, along the inputs
  M.qzeros  I32 [groups, out / P]   version 1 (`gptq`) stores zero - 1, version 2 (`gptq_v2`) zero
  M.scales  F16 [groups, out]
  M.g_idx   I32 [in]                the group of each input
  weight[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class PackedGptq:
    """The tensors of one output directory, by name."""

    def __init__(self, path: Path) -> None:
        """Reads config.json and the index only; OSError or KeyError where they are not there."""
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.quantization: dict[str, Any] = self.config["quantization_config"]
        self.files: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]

    def modules(self) -> set[str]:
        """Names of the modules that are stored packed."""
        return {n.removesuffix(".qweight") for n in self.files if n.endswith(".qweight")}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(module, float32 [out, in]) for every packed module, file by file."""
        for tensors in self._by_file():
            for name in sorted(tensors):
                if name.endswith(".qweight"):
                    module = name.removesuffix(".qweight")
                    yield module, self._decode({p: tensors[f"{module}.{p}"] for p in PARTS})

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the model under its dense name; decoded ones in float32."""
        state = {f"{module}.weight": weight for module, weight in self.weights()}
        for tensors in self._by_file():
            state |= {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in PARTS}
        return state

    def _by_file(self) -> Iterator[dict[str, Tensor]]:
        names = defaultdict(list)
        for name, file in self.files.items():
            names[file].append(name)
        for file in sorted(names):
            with safe_open(self.path / file, "pt") as tensors:
                yield {name: tensors.get_tensor(name) for name in names[file]}

    def _decode(self, parts: dict[str, Tensor]) -> Tensor:
        bits = int(self.quantization["bits"])
        form = self.quantization.get("checkpoint_format") or self.quantization.get("format", "gptq")
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        mask = (1 << bits) - 1
        # The shift of a signed word drags its sign along; the mask cuts that off.
        codes = ((parts["qweight"].unsqueeze(1) >> shifts[:, None]) & mask).flatten(0, 1)
        zeros = ((parts["qzeros"].unsqueeze(2) >> shifts) & mask).flatten(1)
        zeros = zeros + (0 if form == "gptq_v2" else 1)
        group = parts["g_idx"].long()
        return ((codes - zeros[group]).float() * parts["scales"].float()[group]).T.contiguous()
