"""Runs in AutoAWQ's environment: unpacks and packs the cases of a file by AutoAWQ's own code.

For each case: `dequantize_gemm` of the packed parts is the float16 weight, to the bit; and
`WQLinear_GEMM.from_linear` of the weight gives the packed parts, to the bit.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file


def main() -> int:
    """Judge every case of the file named on the command line."""
    tensors = load_file(sys.argv[1])
    names = sorted({name.rpartition("|")[0] for name in tensors})
    unpacked = packed = 0
    for name in names:
        case = {part: tensors[f"{name}|{part}"] for part in ("qweight", "qzeros", "scales")}
        weight = tensors[f"{name}|weight"]
        group = weight.shape[1] // case["scales"].shape[0]
        dense = dequantize_gemm(case["qweight"], case["qzeros"], case["scales"], 4, group)
        unpacked += torch.equal(dense.t(), weight.half())
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        scales, zeros = (tensors[f"{name}|true_{part}"].float() for part in ("scales", "zeros"))
        made = WQLinear_GEMM.from_linear(
            linear, 4, group, False, scales.t().contiguous(), zeros.t().contiguous()
        )
        packed += all(torch.equal(getattr(made, part), case[part]) for part in case)
    print(f"  autoawq {version('autoawq')}, transformers {version('transformers')}")
    print(f"  dequantize_gemm gives our weights:   {unpacked} of {len(names)} matrices")
    print(f"  WQLinear_GEMM packs to our bits:     {packed} of {len(names)} matrices")
    return 0 if unpacked == packed == len(names) and names else 1


if __name__ == "__main__":
    sys.exit(main())
