"""What only a GPU has: streams in its memory or beside it, graphs, several devices."""

import contextlib
import sys

import pytest
import torch
from support.recipes import digests

from pipeline import run
from pipeline.quantize.routed import add_rows
from pipeline.stages import placement, stream, tiles
from pipeline.stages.home import Home

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _converted(project, name):
    output = project.folder / name
    project.change(output={"path": str(output)}).run(until="shard")
    return digests(output)


def test_streams_in_host_memory_change_no_byte(project, monkeypatch):
    """With little GPU memory the streams live in host memory, where kernels work on them."""
    inside = _converted(project, "inside")
    homes = []
    place = placement.place

    def small(context):
        found = place(context)
        homes.append(found.beside)
        return found

    monkeypatch.setattr("pipeline.stages.requantize.place", small)
    monkeypatch.setattr(placement, "stream_bytes", lambda _context: 1 << 34)
    project.change(limits={"device_memory": "8GiB"})
    assert _converted(project, "beside") == inside
    assert homes == [True]


def test_replayed_graphs_give_the_bytes_of_plain_launches(project, monkeypatch):
    project.change(calibration={"samples": 32}, requantize={"modules": ["experts", "attention"]})
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", 512)
    replayed = _converted(project, "replayed")
    runs = []
    monkeypatch.setattr(
        stream.Graphs, "run", lambda self, module, call, x: runs.append(1) or call(x)
    )
    assert _converted(project, "launched") == replayed
    assert runs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_bytes_of_one(project, monkeypatch):
    monkeypatch.setattr("pipeline.stages.tiling.TILE_EXPERTS", 3)
    shared = _converted(project, "shared")
    with monkeypatch.context() as little:
        little.setattr(placement, "stream_bytes", lambda _context: 1 << 34)
        project.change(limits={"device_memory": "8GiB"})
        assert _converted(project, "both beside") == shared
    monkeypatch.setattr("pipeline.plan.further_devices", lambda device: ())
    assert _converted(project, "alone") == shared


def test_a_gpu_works_on_host_memory_in_place():
    home = Home(torch.device("cuda"), beside=True)
    before = torch.cuda.memory_allocated()
    stream = home.empty((4096, 256), torch.bfloat16)
    table = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16)
    index = torch.randperm(4096, device="cuda")[:1000]
    stream.copy_(table)
    del table
    rows = stream.index_select(0, index)
    total = home.empty((4096, 256), torch.float32).zero_()
    add_rows(total, index, rows.float())
    assert total.is_cuda
    assert torch.equal(total[index], stream[index].float())
    assert torch.equal(total.cpu()[index.cpu()], rows.float().cpu())
    assert torch.cuda.memory_allocated() - before < 1 << 21
    room = total.data_ptr()
    del total
    assert home.empty((4096, 256), torch.float32).data_ptr() == room


def test_memory_that_really_runs_out_changes_no_byte(project, monkeypatch):
    """In the middle of layer 1 all that the limit allows is taken; it is given back when the run
    has noticed, and goes on with less on the device."""
    project.change(limits={"device_memory": "4GiB"})
    whole = _converted(project, "whole")
    taken: list[torch.Tensor] = []
    causes = []
    solve, step_back = tiles.solve_tile, run.retreat

    def solving(job, *rest):
        if job.layer == 1 and not causes:
            _take_all(job.device, taken)
        return solve(job, *rest)

    def retreating(context):
        causes.append(sys.exc_info()[1].__cause__)
        taken.clear()
        return step_back(context)

    monkeypatch.setattr(tiles, "solve_tile", solving)
    monkeypatch.setattr(run, "retreat", retreating)
    assert _converted(project, "full") == whole
    assert [type(cause) for cause in causes] == [torch.OutOfMemoryError]
    assert any("the GPU's memory ran out" in line for line in project.said)


def _take_all(device, taken):
    """Allocate until not even 512 bytes are to be had."""
    for power in range(30, 8, -1):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(1 << power, dtype=torch.uint8, device=device))
