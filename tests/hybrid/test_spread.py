"""Kernels of the GPU's roads, and models spread over all roads, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
