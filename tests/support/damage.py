"""Ways to spoil a copy of a model directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def header_end(data: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def flip_first_bit(file: Path) -> bytes:
    """Change the lowest bit of the first tensor; returns the file as it was."""
    data = file.read_bytes()
    start = header_end(data)
    file.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    return data


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file by a function that changes its table in place."""
    table = json.loads(file.read_text())
    edit(table)
    file.write_text(json.dumps(table))


def edit_tensors(model: Path, edit: Callable[[str, Tensor], Tensor | None], part: str) -> None:
    """Replace every stored tensor whose name ends in `part` by what `edit` makes of it; None
    removes it, from the index too."""
    removed = set()
    for file in sorted(model.glob("model-*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(part)]:
            new = edit(name, tensors.pop(name))
            if new is None:
                removed.add(name)
            else:
                tensors[name] = new.contiguous()
        save_file(tensors, file, {"format": "pt"})

    def forget(index: dict[str, Any]) -> None:
        for name in removed:
            del index["weight_map"][name]

    edit_json(model / "model.safetensors.index.json", forget)


def dense_experts(model: Path, inner: int) -> None:
    """Make the routed experts plain bf16 ones of another inner dimension, as transformers 5 leaves
    them beside quantised attention."""

    def widen(name: str, tensor: Tensor) -> Tensor | None:
        if ".experts." not in name:
            return tensor
        if not name.endswith("_proj.weight"):
            return None
        hidden = 128
        shape = (hidden, inner) if "down_proj" in name else (inner, hidden)
        return (0.05 * torch.randn(shape)).to(torch.bfloat16)

    edit_tensors(model, widen, "")
    edit_json(model / "config.json", lambda config: config.update(moe_intermediate_size=inner))
