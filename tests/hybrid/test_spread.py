"""Kernels of the GPU's roads, and models spread over all roads, under Triton's interpreter."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.hybrid.placing import ROADS
from pipeline.quantize.tensor import AffineScheme

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("check", "part"),
    [
        ("spread", "products"),
        ("spread", "models"),
        ("spread", "visiting"),
        ("delta", "prompts"),
        ("spread", "trained"),
        ("fused", "steps"),
        ("fused", "moving"),
        ("fused", "counted"),
        ("handover", "calls"),
    ],
)
def test_under_the_interpreter(check, part, tmp_path):
    """In a process of its own: Triton reads the variable once, when it is imported."""
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    run = subprocess.run(
        [sys.executable, str(HERE / f"{check}_check.py"), part, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) >= 1


def test_a_benchmarks_parts_are_every_expert_once():
    """Of 5 experts three parts would be 2 each, were each rounded by itself."""
    pytest.importorskip("triton")
    hybrid_model = importlib.import_module("hybrid_model")
    device, shares = torch.device("cpu"), {"resident": 0.3, "zero-copy": 0.4, "cpu": 0.3}
    block = hybrid_model.random_records(5, 64, 32, AffineScheme(4, 32, True))
    split = hybrid_model._layer(block, 0, shares, device, pinned=False, native=True)
    counts = [split.roads(device).tolist().count(road) for road in range(3)]
    assert counts == [2, 2, 1]
    assert [held.records.count for held in split.device_roads.values()] == counts[:2]
    assert split.host.experts.num_experts == counts[2]
    for held in split.device_roads.values():
        assert torch.equal(held.records.data, block.data[torch.tensor(held.experts)])
    alone = hybrid_model._layer(block, 0, {"cpu": 1.0}, device, pinned=False, native=True)
    left = split.roads(device).tolist().index(ROADS.index("cpu"))
    call = torch.randn(6, 64).bfloat16(), torch.full((6, 1), left), torch.ones(6, 1)
    assert torch.equal(split.host(*call), alone(*call))


def test_a_benchmarks_random_weights_have_no_mean():
    """Codes lie evenly around the zero, or all experts would have a part in common."""
    hybrid_model = importlib.import_module("hybrid_model")
    block = hybrid_model.random_records(40, 256, 128, AffineScheme(4, 32, True))
    for quantized in block.unpack():
        codes = quantized.arrays["codes"].float()
        assert (codes.min(), codes.max()) == (1, 15)
        assert abs(codes.mean() - 8) < 0.05
