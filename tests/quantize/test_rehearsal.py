"""Work gone through without its launches; its kernels here are Python's, or only asked for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.rehearsal import Launchable, Rehearsal, rehearsing

CPU = torch.device("cpu")


class Kernel:
    """Notes what it is launched with."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launched.append((grid, arguments, constants))


@pytest.fixture
def rehearsal():
    found = Rehearsal()
    yield found
    found.close()


def test_each_kernel_is_met_once_with_little_of_its_arguments(rehearsal):
    kernel = Kernel()
    launchable, large = Launchable(kernel), torch.ones(1000, 1000)
    with rehearsal.going_through():
        for number in (32, 48, 33, 1, 1 << 31):
            launchable[7, 8](large, number, 0.5, ROWS=64)
        launchable[7, 8](large.bfloat16(), 32, 0.5, ROWS=64)
        launchable[7, 8](large.view(-1)[1:], 32, 0.5, ROWS=64)
        launchable[7, 8](large, 32, 0.25, ROWS=32)
    rehearsal.wait()
    assert {grid for grid, *_ in kernel.launched} == {(0,)}
    met = [
        (x.dtype, x.data_ptr() % 16, number, constants["ROWS"])
        for _, (x, number, _), constants in kernel.launched
    ]
    full = torch.float32, 0
    assert sorted(met, key=str) == sorted(
        [
            *[(*full, number, 64) for number in (32, 33, 1, 1 << 31)],
            (torch.bfloat16, 0, 32, 64),
            (torch.float32, 4, 32, 64),
            (*full, 32, 32),
        ],
        key=str,
    )
    assert max(x.untyped_storage().nbytes() for _, (x, *_), _ in kernel.launched) <= 64
    launchable[7, 8](large, 32, 0.5, ROWS=64)
    grid, (given, *_), _ = kernel.launched[-1]
    assert grid == (7, 8)
    assert given is large


def test_what_kernels_would_write_is_zero_and_triton_is_there(rehearsal):
    like = torch.ones(50)
    with rehearsal.going_through():
        assert rehearsing()
        assert solver_backend(CPU) == "triton"
        for made in (torch.empty(50), torch.empty_like(like), like.new_empty(50)):
            assert not made.any()
        assert torch.equal(like.clone(), torch.ones(50))
    assert not rehearsing()
    assert solver_backend(CPU) == "torch"


def test_a_kernel_that_cannot_be_compiled_stops_nothing(rehearsal):
    class Broken:
        def __getitem__(self, _grid):
            return self.launch

        def launch(self):
            raise RuntimeError("no compiler")

    with rehearsal.going_through():
        Launchable(Broken())[3,]()
    rehearsal.wait()


def test_an_end_leaves_out_what_has_not_begun():
    begun, ended = Event(), Event()

    class Slow:
        def __getitem__(self, _grid):
            return self.launch

        def launch(self, number, **_):
            begun.set()
            assert ended.wait(60)

    rehearsal = Rehearsal()
    kernel = Launchable(Slow())
    with rehearsal.going_through():
        for rows in range(200):  # more than threads
            kernel[3,](1, ROWS=rows)
    compiled = list(rehearsal._compiled.values())
    assert begun.wait(60)
    rehearsal._pool.shutdown(wait=False, cancel_futures=True)
    ended.set()
    rehearsal.wait()  # does not wait for what nobody does any more
    rehearsal.close()
    assert any(future.cancelled() for future in compiled)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_solver_launches_what_its_rehearsal_meets():
    """In a process of its own, whose Triton has a GPU of paper."""
    here = Path(__file__).parent
    paths = [str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    run = subprocess.run(
        [sys.executable, str(here / "rehearsal_check.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1].startswith("rtn: ")
