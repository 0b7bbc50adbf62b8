"""The micro model as other uploads would hold it: bf16 as transformers 5 writes it, block FP8."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.dense import source_model, source_state
from torch import Tensor

from pipeline.checkpoint.names import expert_of

SIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def bf16_source(micro: Path, folder: Path) -> Path:
    """The official form: saved by transformers itself from its fused experts."""
    source_model(micro, torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    for name in SIDE:
        shutil.copy(micro / name, folder)
    return folder


def fp8_parts(module: str, weight: Tensor, block: int = 128) -> dict[str, Tensor]:
    """The stored tensors of one matrix, a block at a time: largest magnitude to 448."""
    rows, columns = weight.shape
    scales = torch.empty(math.ceil(rows / block), math.ceil(columns / block))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].abs().max().float() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}


def fp8_source(micro: Path, folder: Path) -> Path:
    """Experts in FP8, everything else bf16, as config.json says it."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in source_state(micro).items():
        module = name.removesuffix(".weight")
        tensors |= fp8_parts(module, tensor) if expert_of(name) else {name: tensor.contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((micro / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in SIDE:
        shutil.copy(micro / name, folder)
    return folder
