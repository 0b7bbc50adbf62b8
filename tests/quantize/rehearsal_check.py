"""What a rehearsal has compiled, beside what the same work launches, by Triton's own keys.

Triton is told of a GPU and asks before it compiles, so nothing is compiled, and no GPU needed.

python tests/quantize/rehearsal_check.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock

import torch
import triton
from triton.backends.compiler import GPUTarget

from pipeline.hybrid import delta_kernels
from pipeline.hybrid.fused_delta import Heads
from pipeline.models import ARCHITECTURES
from pipeline.models.architecture import Geometry
from pipeline.quantize import backend, cholesky
from pipeline.quantize.rehearsal import Rehearsal, _Zeros
from pipeline.recipe import parse_recipe
from pipeline.stages.warm_up import Problem

CPU = torch.device("cpu")
GEOMETRY = Geometry(1, (0,), 512, 10, 128, 96, 1000, ("linear attention",))


class Device:
    """A driver as far as one is asked before a launch."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def factors():
    """Which are done by blocks on a GPU only."""
    factor, _ = cholesky._factor_by_blocks(torch.eye(520).expand(16, -1, -1))
    cholesky._solve_by_blocks(factor, torch.randn(16, 96, 520))


def delta():
    for length in (64, 1024):
        sizes, texts = Heads(2, 4, 16, 32), torch.zeros(1, length, 320).bfloat16()
        mixed = delta_kernels.convolve(texts, torch.zeros(192, 1, 4).bfloat16(), sizes)
        decay, state = torch.zeros(1, length, 4), torch.zeros(1, 4, 16, 32)
        core = delta_kernels.chunked(mixed, decay, decay.bfloat16(), state, sizes)
        delta_kernels.gated_norm(core, texts, torch.ones(32).bfloat16(), 1e-6, sizes)


def work(method: str, bits: int) -> list[Callable[[], None]]:
    wanted = {"method": method, "bits": bits, "group_size": 32}
    plain = {"source": {"model": "a"}, "output": {"path": "b"}, "requantize": wanted}
    recipe = parse_recipe(plain, "here")
    problem = Problem(recipe, ARCHITECTURES["qwen3_next"], GEOMETRY, CPU)
    assert problem.experts == 16
    hidden, inner = GEOMETRY.hidden, GEOMETRY.inner
    return [
        lambda: problem.solve(2 * inner, hidden, last=False),
        lambda: problem.solve(hidden, inner, last=True),
        problem.outputs,
        factors,
        delta,
    ]


def main() -> None:
    triton.runtime.driver.set_active(Device())
    backend.rehearsing = lambda: True  # what is launched is asked for on this device too
    asked: Counter[tuple[str, str]] = Counter()
    lock = Lock()

    def skip(*, key, fn, **_):
        with lock:
            asked[fn.name, str(key)] += 1
        return True

    triton.knobs.runtime.jit_cache_hook = skip
    for method, bits in (("gptq", 4), ("awq", 4), ("rtn", 8)):
        parts = work(method, bits)
        asked.clear()
        with _Zeros():
            for part in parts:
                part()
        launched = Counter(asked)
        asked.clear()
        rehearsal = Rehearsal()
        for part in parts:
            with rehearsal.going_through():
                part()
        rehearsal.wait()
        assert not any(found.exception() for found in rehearsal._compiled.values())
        rehearsal.close()
        assert set(asked) == set(launched), set(asked) ^ set(launched)
        assert set(asked.values()) == {1}
        print(f"{method}: {launched.total()} launches of {len(launched)} kernels, each met once")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main()
