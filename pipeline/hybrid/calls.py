"""Whether a device can call the CPU's threads here (`handover.py`), found by trying."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pipeline.hybrid.handover import Handover
from pipeline.hybrid.native.crew import Crew
from pipeline.hybrid.native.experts import NativeExperts
from pipeline.hybrid.native.library import Library, find
from pipeline.hybrid.placing import fixed
from pipeline.hybrid.records import pack
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

_EXPERTS, _HIDDEN, _INNER, _CHOSEN = 4, 64, 32, 2
_CALLS = 8
"""In one graph, as so many layers' would be."""
_REPLAYS = 3
_PATIENCE = 1 << 20
"""Looks at answers before the first is given up: about a second."""


@cache
def calls_fail(device: torch.device) -> str | None:
    """Why a device's calls are not answered here; None where they are, with the right numbers."""
    library = find()
    if isinstance(library, str):
        return library
    try:
        _try(library, device)
    except Exception as error:  # whatever is wrong with it, there are other roads
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _try(library: Library, device: torch.device) -> None:
    """Calls one by one, then, on a GPU, as a graph that is replayed; ValueError on a wrong sum."""
    generator = torch.Generator().manual_seed(0)
    records = pack(_random(2 * _INNER, _HIDDEN, generator), _random(_HIDDEN, _INNER, generator))
    experts = NativeExperts(library, records)
    crew = Crew(library, device, 2)
    crew.patience.fill_(_PATIENCE)
    table = torch.zeros(_EXPERTS, dtype=torch.int64, device=device)
    handover = Handover(crew, records.layout, records.addresses(), table, fixed(0))
    scores = torch.rand((_CALLS, 1, _EXPERTS), generator=generator)
    index = scores.topk(_CHOSEN).indices.to(device)
    weights = torch.rand((_CALLS, 1, _CHOSEN), generator=generator).to(device)
    x = torch.zeros((_CALLS, 1, _HIDDEN), dtype=torch.bfloat16, device=device)
    out = torch.zeros(x.shape, device=device)

    def call() -> None:
        for number in range(_CALLS):
            handover.send(x[number], index[number], weights[number], table)
            handover.take(index[number], out[number], add=False)

    def compare() -> None:
        crew.check()
        inputs: list[Tensor] = [tensor.cpu() for tensor in (x, index, weights)]
        want = torch.stack([experts(*one) for one in zip(*inputs, strict=True)]).float()
        if not torch.allclose(out.cpu(), want, rtol=1e-2, atol=1e-2 * float(want.abs().max())):
            raise ValueError("the CPU's sums came back wrong")

    x.copy_(torch.randn(x.shape, generator=generator))
    with crew.awake():
        call()
    compare()
    if device.type != "cuda":
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(_REPLAYS):
        x.copy_(torch.randn(x.shape, generator=generator))
        crew.begin(_CALLS)
        graph.replay()
        torch.cuda.synchronize(device)
        compare()


def _random(rows: int, columns: int, generator: torch.Generator) -> QuantizedTensor:
    codes = torch.randint(0, 16, (_EXPERTS, rows, columns), generator=generator).byte()
    scales = torch.full((_EXPERTS, rows, columns // 32), 0.25, dtype=torch.float16)
    arrays = {"codes": codes, "scales": scales, "zeros": torch.full_like(scales, 8).byte()}
    return QuantizedTensor(AffineScheme(4, 32, True), arrays)
