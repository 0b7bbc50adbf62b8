"""Runs in AutoGPTQ's environment: packs the cases of a file by AutoGPTQ's own code.

For each case `QuantLinear.pack` of the weight, its scales and its zeros gives the packed parts, to
the bit, the trivial g_idx included.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from safetensors.torch import load_file

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def main() -> int:
    """Judge every case of the file named on the command line."""
    tensors = load_file(sys.argv[1])
    names = sorted({name.rpartition("|")[0] for name in tensors})
    packed = 0
    for name in names:
        weight = tensors[f"{name}|weight"]
        rows, columns = weight.shape
        scales, zeros = (tensors[f"{name}|true_{part}"].float() for part in ("scales", "zeros"))
        case = {part: tensors[f"{name}|{part}"] for part in PARTS}
        bits = case["qweight"].shape[0] * 32 // columns
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        made = QuantLinear(bits, columns // scales.shape[1], columns, rows, bias=False)
        index = made.g_idx
        made.pack(linear, scales, zeros, index)
        found = {"qweight": made.qweight, "qzeros": made.qzeros, "g_idx": index}
        found["scales"] = made.scales.half()
        packed += all(torch.equal(found[part].cpu(), case[part]) for part in PARTS)
    print(f"  auto-gptq {version('auto-gptq')}, transformers {version('transformers')}")
    print(f"  QuantLinear.pack gives our bits:     {packed} of {len(names)} matrices")
    return 0 if packed == len(names) and names else 1


if __name__ == "__main__":
    sys.exit(main())
