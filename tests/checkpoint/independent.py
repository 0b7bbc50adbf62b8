"""A second reader of the source formats, written from their descriptions alone, in numpy.

It shares nothing with the package: own header parse, own code tables, own unpacking, everything
in float32 or float64, one matrix at a time.  Sources:
  safetensors   its own documentation (8 bytes length, JSON, data)
  NF4           QLoRA, https://arxiv.org/abs/2305.14314, appendix E
  FP4           bitsandbytes' documentation of the type: sign, two exponent bits, one mantissa bit,
                values {0, 0.0625, 8, 12, 4, 6, 2, 3} / 12 in the order of the three lower bits
  double quant  scale = map[code] * nested_absmax[block] + offset
  int8          weight = int8 * SCB / 127
  GPTQ          words along the input dimension, lowest bits first, version 1 zeros less one
"""

import json
import struct
from pathlib import Path

import numpy as np

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
FP4 = np.concatenate([_HALF, -_HALF])
TABLES = {"nf4": NF4, "fp4": FP4}
NUMPY = {
    "F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8, "I32": np.int32,
    "I64": np.int64, "BF16": np.uint16,
}  # fmt: skip


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_files(directory: Path) -> dict[str, tuple[str, np.ndarray]]:
    """All stored tensors: name -> (dtype name, array; bfloat16 as uint16)."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, info in header.items():
            begin, end = (8 + length + n for n in info["data_offsets"])
            array = np.frombuffer(data[begin:end], dtype=NUMPY[info["dtype"]])
            found[name] = (info["dtype"], array.reshape(info["shape"]))
    return found


def dense_of(tensors: dict[str, tuple[str, np.ndarray]], name: str) -> np.ndarray:
    """The logical tensor `name` in float32, before any rounding to the model's dtype."""
    module = name.removesuffix(".weight")
    if any(key.startswith(f"{name}.quant_state.") for key in tensors):
        return _four_bit(tensors, name)
    if f"{module}.SCB" in tensors:
        scale = tensors[f"{module}.SCB"][1].astype(np.float64)
        return tensors[name][1].astype(np.float64) * scale[:, None] / 127
    dtype, array = tensors[name]
    return widen(array) if dtype == "BF16" else array


def _four_bit(tensors: dict[str, tuple[str, np.ndarray]], name: str) -> np.ndarray:
    key = next(k for k in tensors if k.startswith(f"{name}.quant_state."))
    state = json.loads(tensors[key][1].tobytes())
    table = TABLES[key.rpartition("__")[2]]
    assert state["quant_type"] == key.rpartition("__")[2]
    scales = tensors[f"{name}.absmax"][1]
    if f"{name}.nested_absmax" in tensors:
        outer = tensors[f"{name}.nested_absmax"][1]
        codes = tensors[f"{name}.nested_quant_map"][1]
        block = np.arange(scales.size) // state["nested_blocksize"]
        scales = codes[scales] * outer[block] + np.float32(state["nested_offset"])
    packed = np.frombuffer(tensors[name][1].tobytes(), dtype=np.uint8)
    nibbles = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    count = int(np.prod(state["shape"]))
    values = table[nibbles[:count]] * scales[np.arange(count) // state["blocksize"]]
    return values.astype(np.float32).reshape(state["shape"])


def gptq_dense(parts: dict[str, np.ndarray], bits: int, version: int) -> np.ndarray:
    """Weight `[out, in]` in float64 from qweight, qzeros, scales and g_idx of one matrix."""
    per_word = 32 // bits
    words = parts["qweight"].view(np.uint32)
    columns, rows = words.shape[0] * per_word, words.shape[1]
    stored = parts["qzeros"].view(np.uint32)
    dense = np.empty((rows, columns))
    for i in range(columns):
        group = int(parts["g_idx"][i])
        code = (words[i // per_word] >> np.uint32(bits * (i % per_word))) & (2**bits - 1)
        outputs = np.arange(rows)
        shift = (bits * (outputs % per_word)).astype(np.uint32)
        zero = (stored[group, outputs // per_word] >> shift) & (2**bits - 1)
        zero = zero.astype(np.int64) + (1 if version == 1 else 0)
        dense[:, i] = parts["scales"][group].astype(np.float64) * (code.astype(np.int64) - zero)
    return dense


def awq_dense(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Weight `[out, in]` in float64 from qweight, qzeros and scales of one matrix."""
    words, stored = parts["qweight"].view(np.uint32), parts["qzeros"].view(np.uint32)
    scales = parts["scales"].astype(np.float64)
    columns, rows = words.shape[0], scales.shape[1]
    group = columns // scales.shape[0]
    dense = np.empty((rows, columns))
    for output in range(rows):
        place = [0, 4, 1, 5, 2, 6, 3, 7][output % 8]
        shift = np.uint32(4 * place)
        code = (words[:, output // 8] >> shift).astype(np.int64) & 15
        zero = (stored[:, output // 8] >> shift).astype(np.int64) & 15
        index = np.arange(columns) // group
        dense[output] = scales[index, output] * (code - zero[index])
    return dense
