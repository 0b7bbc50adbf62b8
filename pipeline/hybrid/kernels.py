"""Whether Triton's kernels for experts work here.

With TRITON_INTERPRET=1 in the environment when it is imported, Triton runs them on a CPU, slowly.
"""

from __future__ import annotations

import torch
import triton

from pipeline.hybrid.grouped import Groups, grouped
from pipeline.hybrid.matvec import down, gate_up
from pipeline.hybrid.records import pack
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)


def runs_on(device: torch.device) -> bool:
    """Whether these kernels can be tried on `device` at all."""
    return device.type == "cuda" or _INTERPRETED


def self_test(device: torch.device) -> None:
    """Run all kernels on a few numbers; ValueError on a wrong result."""
    codes = torch.arange(2 * 64 * 32).remainder(16).byte().view(2, 64, 32)
    scales = torch.full((2, 64, 1), 0.25, dtype=torch.float16)
    arrays = {"codes": codes, "scales": scales, "zeros": torch.full_like(scales, 8).byte()}
    wide = QuantizedTensor(AffineScheme(4, 32, True), arrays)
    narrow = wide.rows(0, 32)
    records = pack(wide, narrow)
    moved = records.to(device)
    table = torch.tensor([0, int(moved.addresses()[0]), 0], device=device)
    x = torch.eye(32, device=device)[:3].bfloat16()
    index = torch.tensor([1, 0, 1], device=device)
    got = torch.zeros((2, 3, 32), dtype=torch.bfloat16, device=device)
    gate_up(x, index, table, moved.layout.gate_up, got[0])
    grouped(x, Groups(index, 3), table, moved.layout.gate_up, got[1], gated=True)
    gate, up = (wide.dequantize()[0] @ x.cpu().float().t()).t().chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up
    want[1] = 0
    if not torch.allclose(got.cpu().float(), want.expand_as(got), rtol=1e-2):
        raise ValueError("a kernel returned wrong numbers")
    total = torch.zeros((1, 32), device=device)
    inner = x.float().contiguous()
    down(inner, index, table, torch.ones(3, device=device), moved.layout.down, total)
    want = narrow.dequantize()[0] @ inner[[0, 2]].sum(0).cpu()
    if not torch.allclose(total[0].cpu(), want):
        raise ValueError("a kernel returned wrong numbers")
