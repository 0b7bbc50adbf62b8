"""What only a GPU has: streams in its memory or beside it, graphs, several devices."""

import pytest
import torch
from support.recipes import digests

from pipeline.stages import placement, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _converted(project, name):
    output = project.folder / name
    project.change(output={"path": str(output)}).run(until="shard")
    return digests(output)


def test_streams_in_host_memory_change_no_byte(project, monkeypatch):
    """With little GPU memory the streams live in host memory, without graphs."""
    inside = _converted(project, "inside")
    homes = []
    place = placement.place

    def small(context):
        found = place(context)
        homes.append(found.home.type)
        return found

    monkeypatch.setattr("pipeline.stages.requantize.place", small)
    monkeypatch.setattr(placement, "stream_bytes", lambda _context: 1 << 34)
    project.change(limits={"device_memory": "8GiB"})
    assert _converted(project, "beside") == inside
    assert homes == ["cpu"]


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
    monkeypatch.setattr("pipeline.plan.further_devices", lambda device: ())
    assert _converted(project, "alone") == shared
