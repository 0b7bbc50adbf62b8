"""Makes small model directories of every kind for the tests of this room."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "qwen3_next", "num_experts": 4, "dtype": "bfloat16"}
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_files() -> dict[str, dict[str, Tensor]]:
    """A model in two files: a dense module, and a 4-bit matrix."""
    return {
        ONE: {"a.weight": torch.randn(8, 16, dtype=torch.bfloat16), "a.bias": torch.randn(8)},
        TWO: four_bit("b.weight", torch.randn(32, 64)),
    }


def write_model(
    directory: Path,
    files: dict[str, dict[str, Tensor]],
    config: dict[str, object] | None = None,
    index: bool = True,
) -> Path:
    """A directory of the given files with config and index, written by the safetensors package."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file, tensors in files.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "config.json").write_text(json.dumps(config or CONFIG))
    if index:
        table = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(table))
    return directory


def four_bit(
    name: str,
    weight: Tensor,
    quant_type: str = "nf4",
    block: int = 64,
    double: bool = True,
    *,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """The stored tensors of one bitsandbytes 4-bit matrix."""
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type=quant_type, compress_statistics=double,
        quant_storage=storage,
    )  # fmt: skip
    parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {name: packed, **parts}


def eight_bit(module: str, weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of one bitsandbytes int8 matrix."""
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    layout = torch.tensor(0, dtype=torch.uint8)
    return {f"{module}.weight": codes, f"{module}.SCB": scales, f"{module}.weight_format": layout}


def write_raw(
    path: Path, header: Mapping[str, object] | bytes, data: bytes = b"", length: int | None = None
) -> None:
    """A safetensors file with any header, of any pretended length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def truncate_to_header(path: Path) -> None:
    """Leave the header of a safetensors file and nothing after it."""
    data = path.read_bytes()
    path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
