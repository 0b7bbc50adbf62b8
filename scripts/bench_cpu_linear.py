"""Time the compiled kernel for linear layers on the CPU against torch's product.

    .venv/bin/python scripts/bench_cpu_linear.py

A bfloat16 matrix of 12,288 x 2,048 (Qwen3-Next's largest outside the experts) in large pages, cold
as in decoding: three in turns.  Milliseconds of one thread's processor time, the median of 21.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.hybrid.native import dense
from pipeline.hybrid.native.library import find

ROWS, COLUMNS, MATRICES, TIMES = 12288, 2048, 3, 21

Call = Callable[[Tensor], Tensor]


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    library = find()
    if isinstance(library, str):
        raise SystemExit(f"no native kernel: {library}")
    model = nn.ModuleList(
        nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(MATRICES)
    )
    dense.use_in(model)
    weights = list(model.parameters())
    now = time.strftime("%Y-%m-%d %H:%MZ", time.gmtime())
    print(now, f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print("tokens, then torch's product, AVX2 if there is, plain C")
    kernels = [replace(library, kind=kind) for kind in range(min(library.kind, 1), -1, -1)]
    for tokens in (1, 2, 3, 4, 5, 6, 8):
        x = torch.randn(tokens, COLUMNS).bfloat16()
        calls: list[Call] = [partial(nn.functional.linear, x)]
        calls += [partial(dense.multiply, x, library=kernel) for kernel in kernels]
        times = [_milliseconds(call, weights) for call in calls]
        print(tokens, *(f"{t:8.2f}" for t in times))


def _milliseconds(call: Call, weights: list[nn.Parameter]) -> float:
    taken = []
    for number in range(TIMES):
        started = time.thread_time()
        call(weights[number % len(weights)])
        taken.append(time.thread_time() - started)
    return statistics.median(taken) * 1e3


if __name__ == "__main__":
    main()
