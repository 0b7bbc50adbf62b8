"""GPTQModel's GPTQ (7.6.0) and AWQ (7.7.0, whose AWQ runs without a GPU), with its own defaults.

Its architecture file keeps the router, `shared_expert_gate` and `in_proj_ba` out already; `dynamic`
rules keep out the rest of what is no routed expert.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

from quality.peers.contract import Task, checked_modules, task

LEFT_OUT = (r"self_attn\.", r"linear_attn\.", r"mlp\.shared_expert\.")


def settings(given: Task) -> QuantizeConfig:
    """Bits, group and what is left out; everything else is GPTQModel's choice."""
    awq = given.method == "awq"
    return QuantizeConfig(
        bits=4,
        group_size=given.group,
        sym=not awq,
        quant_method=METHOD.AWQ if awq else METHOD.GPTQ,
        format=FORMAT.GEMM if awq else FORMAT.GPTQ,
        dynamic={f"-:.*{part}.*": {} for part in LEFT_OUT},
        device="cpu",
    )


def own_reading(output: Path, awq: bool, layers: int) -> dict[str, torch.Tensor]:
    """Some weights as GPTQModel's plain kernel dequantises them."""
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(output), backend=backend, device="cpu", dtype=torch.float16).model
    read = {}
    for name in checked_modules(range(layers)):
        kernel = model.get_submodule(name)
        # Both kernels hold [in, out]; the AWQ one has no method of its own that takes no input.
        weight = dequantized_awq(kernel) if awq else kernel.dequantize_weight()
        read[name] = weight.T
    return read


def dequantized_awq(kernel: torch.nn.Module) -> torch.Tensor:
    """[in, out] in the scales' type."""
    return dequantize_gemm(
        qweight=kernel.qweight,
        qzeros=kernel.qzeros,
        scales=kernel.scales,
        bits=4,
        group_size=kernel.group_size,
    )


def main() -> None:
    """See contract.py."""
    given = task()
    model = GPTQModel.load(str(given.model), settings(given), dtype=torch.bfloat16)
    rows = [{k: v[0] for k, v in sequence.items()} for sequence in given.sequences]
    model.quantize(rows, batch_size=1)
    model.save(str(given.output))
    given.keep(own_reading(given.output, given.method == "awq", given.layers))


if __name__ == "__main__":
    main()
