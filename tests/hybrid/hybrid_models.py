"""Output directories for tests, and the dense model they stand for, read by other code.

`write_output` rounds a source checkpoint's matrices and writes them in the pipeline's layout.
`dequantised` reads such a directory with numpy and safetensors alone and gives the plain
transformers model of it: what the hybrid model's logits are measured against.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import PreTrainedModel

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.formats import awq, gptq
from pipeline.checkpoint.index import build_index
from pipeline.checkpoint.names import expert_of
from pipeline.checkpoint.writer import write_json, write_safetensors
from pipeline.models.skeleton import build_skeleton, model_config, rotary_embedding
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme

MODELS = Path(__file__).parents[1] / "models"
EVERYTHING = re.compile(r"(self_attn|linear_attn|shared_expert)\.\w+_proj(_qkvz)?\.weight$")
NONEXPERT = "model-nonexpert-00001-of-00001.safetensors"
EXPERTS_ONLY = re.compile(r"(?!)")


def write_output(
    source: Path, out: Path, scheme: AffineScheme, also=EXPERTS_ONLY, method="gptq"
) -> Path:
    """Round the experts of `source`, and linear layers whose names match `also`, into `out`."""
    pack = {"gptq": gptq.pack, "awq": awq.pack}[method]
    checkpoint = Checkpoint.open(source)
    files: dict[str, dict[str, torch.Tensor]] = {}
    stacks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in checkpoint.weights:
        expert = expert_of(name)
        if expert is not None:
            file = f"model-experts-layer-{expert.layer:03d}.safetensors"
            stacks[file, expert.rest].append(name)
        elif also.search(name):
            stacks[NONEXPERT, name].append(name)
        else:
            files.setdefault(NONEXPERT, {})[name] = checkpoint.load(name)
    for (file, _), names in stacks.items():
        weights = checkpoint.load_stack(names, dtype=torch.float32)
        options = SolverOptions(scale_search=False)
        parts = pack(QUANTIZERS["rtn"].quantize(weights, None, scheme, options).quantized)
        for index, name in enumerate(names):
            module = name.removesuffix(".weight")
            tensors = {f"{module}.{part}": value[index] for part, value in parts.items()}
            files.setdefault(file, {}).update(tensors)
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
    if method == "awq":
        config["quantization_config"] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
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


def _dense_awq(parts):
    places = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each output of a word

    def outputs(words):
        fields = [(words.astype(np.int64) >> (4 * place)) & 15 for place in places]
        return np.stack(fields, axis=2).reshape(len(words), -1)

    codes, zeros = outputs(parts["qweight"]), outputs(parts["qzeros"])  # [in, out], [groups, out]
    group = np.arange(len(codes)) // (len(codes) // len(zeros))
    scales = parts["scales"].astype(np.float32)
    return torch.from_numpy((scales[group] * (codes - zeros[group])).T.astype(np.float32).copy())


def dequantised_state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an output directory as float32, by its dense name."""
    config = json.loads((path / "config.json").read_text())
    bits = config["quantization_config"]["bits"]
    awq = config["quantization_config"]["quant_method"] == "awq"
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        if "reference" in file.name:
            continue
        packed = [k for k in load_torch(file) if k.endswith(".qweight")]
        if packed:
            arrays = _numpy(file)
            for name in packed:
                module = name.removesuffix(".qweight")
                names = ("qweight", "qzeros", "scales", *([] if awq else ["g_idx"]))
                parts = {p: arrays[f"{module}.{p}"] for p in names}
                dense = _dense_awq(parts) if awq else _dense(parts, bits)
                state[f"{module}.weight"] = dense
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


def plain_model(path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a directory, given all its tensors by their dense names."""
    config = model_config(json.loads((path / "config.json").read_text()))
    model = build_skeleton(config, dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in state.items()}
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts."
        if f"{stem}0.gate_proj.weight" not in tensors:
            continue  # a dense layer
        expert = {
            p: torch.stack(
                [tensors.pop(f"{stem}{e}.{p}.weight") for e in range(config.num_experts)]
            )
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{stem}gate_up_proj"] = torch.cat([expert["gate_proj"], expert["up_proj"]], dim=1)
        tensors[f"{stem}down_proj"] = expert["down_proj"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.model.rotary_emb = rotary_embedding(model, torch.device("cpu"))
    return model


def dequantised(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The plain transformers model that an output directory stands for."""
    return plain_model(path, dequantised_state(path), dtype)
