"""Triton kernels against plain torch, on a GPU; and what happens where there is none."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from problems import fresh, problem

import pipeline.quantize.backend as backend_module
import pipeline.quantize.methods.gptq as gptq_module
from pipeline.errors import ResourceError
from pipeline.quantize.backend import solver_backend
from pipeline.quantize.grid import fit_grid
from pipeline.quantize.hessian import routed_hessians
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme

CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_plain_torch_on_a_cpu():
    assert solver_backend(torch.device("cpu")) == "torch"


def test_kernels_that_do_not_work_are_not_used(monkeypatch):
    class Broken:
        @staticmethod
        def self_test(device):
            raise RuntimeError(f"no compiler for {device}\nlong story")

    monkeypatch.setattr(backend_module.importlib, "import_module", lambda _name: Broken)
    with pytest.warns(UserWarning, match="plain torch is slower: no compiler for cuda:7$"):
        assert solver_backend(torch.device("cuda", 7)) == "torch"
    backend_module._tested.cache_clear()


def test_a_full_gpu_says_nothing_of_triton(monkeypatch):
    """One line, and the question is asked anew when there is room."""
    asked: list[torch.device] = []

    def full(device):
        asked.append(device)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Fine:
        self_test = staticmethod(full)

    monkeypatch.setattr(backend_module, "KERNELS", ("one",))
    monkeypatch.setattr(backend_module.importlib, "import_module", lambda _name: Fine)
    with pytest.raises(ResourceError, match="memory is full"):
        solver_backend(torch.device("cuda", 7))
    assert solver_backend(torch.device("cuda", 7)) == "triton"
    backend_module._tested.cache_clear()


def test_threads_that_ask_at_once_share_one_test(monkeypatch):
    tested: list[torch.device] = []

    class Fine:
        self_test = staticmethod(tested.append)

    monkeypatch.setattr(backend_module.importlib, "import_module", lambda _name: Fine)
    devices = [torch.device("cuda"), torch.device("cuda", 0)] * 4
    backend_module._tested.cache_clear()  # where there is a GPU, it has been tested before
    try:
        with ThreadPoolExecutor(len(devices)) as pool:
            assert set(pool.map(solver_backend, devices)) == {"triton"}
    finally:
        backend_module._tested.cache_clear()
    assert tested == [CUDA] * len(backend_module.KERNELS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_under_the_interpreter():
    """In a process of its own: Triton reads the variable once, when it is imported."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    run = subprocess.run(
        [sys.executable, str(here / "kernels_check.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "sums"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 128), (3, 130, 384), (2, 256, 2048)])
def test_triton_solves_as_torch_does(monkeypatch, shape, symmetric, group):
    weight, hessian = (t.to(CUDA) for t in problem(fresh(), *shape))
    scheme, options = AffineScheme(4, group, symmetric), SolverOptions()
    assert solver_backend(CUDA) == "triton"
    kernels = QUANTIZERS["gptq"].quantize(weight, hessian, scheme, options)
    again = QUANTIZERS["gptq"].quantize(weight, hessian, scheme, options)
    assert torch.equal(kernels.quantized.arrays["codes"], again.quantized.arrays["codes"])
    monkeypatch.setattr(gptq_module, "solver_backend", lambda _device: "torch")
    plain = QUANTIZERS["gptq"].quantize(weight, hessian, scheme, options)
    assert torch.allclose(kernels.loss, plain.loss, rtol=1e-2)
    same = kernels.quantized.arrays["scales"] == plain.quantized.arrays["scales"]
    assert float(same.float().mean()) > 0.95
    rows = same.all(-1)
    codes = kernels.quantized.arrays["codes"][rows] == plain.quantized.arrays["codes"][rows]
    assert float(codes.float().mean()) > 0.99


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_triton_scale_search(bits):
    weight = torch.randn((2, 50, 320), generator=fresh()).to(CUDA)
    importance = torch.rand((2, 320), device=CUDA)
    scheme = AffineScheme(bits, 64, symmetric=False)
    plain, kernel = (
        fit_grid(weight, scheme, search=True, importance=importance, backend=backend)
        for backend in ("torch", "triton")
    )
    assert float((plain.scales == kernel.scales).float().mean()) > 0.95
    assert float((plain.zeros == kernel.zeros).float().mean()) > 0.95


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_hessians(dtype):
    offsets = torch.tensor([0, 0, 5, 300, 301, 1000])
    x = torch.randn((1000, 200), generator=fresh()).to(dtype)
    there = routed_hessians(x.to(CUDA), offsets).cpu()
    assert torch.allclose(there, routed_hessians(x, offsets), rtol=1e-4, atol=1e-3)
    assert torch.equal(there, there.transpose(1, 2))


@pytest.mark.gpu
@needs_gpu
def test_kernels_pass_their_own_test():
    for name in backend_module.KERNELS:
        importlib.import_module(f"pipeline.quantize.{name}").self_test(CUDA)
