"""Output directories for tests, and the dense model they stand for, read by other code.

`write_output` rounds a source checkpoint's matrices and writes them in the pipeline's layout.
`dequantised` reads such a directory with numpy and safetensors alone and gives the plain
transformers model of it: what the hybrid model's logits are measured against.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.formats.gptq import pack
from pipeline.checkpoint.index import build_index
from pipeline.checkpoint.names import expert_of
from pipeline.checkpoint.writer import write_json, write_safetensors
from pipeline.models.skeleton import model_config
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme

MODELS = Path(__file__).parents[1] / "models"
EVERYTHING = re.compile(r"(self_attn|linear_attn|shared_expert)\.\w+_proj(_qkvz)?\.weight$")
EXPERTS_ONLY = re.compile(r"(?!)")


def write_output(source: Path, out: Path, scheme: AffineScheme, also=EXPERTS_ONLY) -> Path:
    """Round the experts of `source`, and linear layers whose names match `also`, into `out`."""
    checkpoint = Checkpoint.open(source)
    files: dict[str, dict[str, torch.Tensor]] = {}
    rounding = QUANTIZERS["rtn"]
    for name in checkpoint.weights:
        expert = expert_of(name)
        file = "model-nonexpert-00001-of-00001.safetensors"
        if expert is not None:
            file = f"model-experts-layer-{expert.layer:03d}.safetensors"
        tensors = files.setdefault(file, {})
        if expert is None and not also.search(name):
            tensors[name] = checkpoint.load(name)
            continue
        weight = checkpoint.load(name, dtype=torch.float32)
        solved = rounding.quantize(weight, None, scheme, SolverOptions())
        module = name.removesuffix(".weight")
        parts = pack(solved.quantized)
        tensors.update({f"{module}.{part}": value for part, value in parts.items()})
    out.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        write_safetensors(out / file, tensors)
    sizes = {f: {name: t.nbytes for name, t in tensors.items()} for f, tensors in files.items()}
    write_json(out / "model.safetensors.index.json", build_index(sizes))
    config = dict(checkpoint.config)
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    write_json(out / "config.json", config)
    return out


def _unpack_rows(words, bits):
    """int32 [n, m] -> codes [n * 32 / bits, m], lowest bits first."""
    fields = [(words.astype(np.int64) >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)]
    return np.stack(fields, axis=1).reshape(-1, words.shape[1])


def _dense(parts, bits):
    codes = _unpack_rows(parts["qweight"], bits)  # [in, out]
    zeros = _unpack_rows(parts["qzeros"].T, bits).T + 1  # [groups, out]
    group = parts["g_idx"]
    scales = parts["scales"].astype(np.float32)
    return torch.from_numpy((scales[group] * (codes - zeros[group])).T.astype(np.float32).copy())


def dequantised_state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an output directory as float32, by its dense name."""
    config = json.loads((path / "config.json").read_text())
    bits = config["quantization_config"]["bits"]
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        if "reference" in file.name:
            continue
        packed = [k for k in load_torch(file) if k.endswith(".qweight")]
        if packed:
            arrays = _numpy(file)
            for name in packed:
                module = name.removesuffix(".qweight")
                parts = {
                    p: arrays[f"{module}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")
                }
                state[f"{module}.weight"] = _dense(parts, bits)
        for name, tensor in load_torch(file).items():
            if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
                state[name] = tensor.float()
    return state


def _numpy(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except TypeError:  # numpy has no bfloat16
        tensors = load_torch(file)
        return {k: v.numpy() for k, v in tensors.items() if v.dtype != torch.bfloat16}


def dequantised(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The plain transformers model that an output directory stands for."""
    state = dequantised_state(path)
    config = model_config(json.loads((path / "config.json").read_text()))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts."
        expert = {
            p: torch.stack([state.pop(f"{stem}{e}.{p}.weight") for e in range(config.num_experts)])
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        state[f"{stem}gate_up_proj"] = torch.cat([expert["gate_proj"], expert["up_proj"]], dim=1)
        state[f"{stem}down_proj"] = expert["down_proj"]
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
