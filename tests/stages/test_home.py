"""Where streams live: memory that is used again, and streams beside the device."""

from dataclasses import replace

import pytest
import torch
from support.recipes import digests

from pipeline.errors import ResourceError
from pipeline.hybrid.host import seen_from
from pipeline.stages import home as home_module
from pipeline.stages import placement, requantize
from pipeline.stages.home import Home

CPU = torch.device("cpu")


def test_another_tensor_of_the_same_memory():
    data = torch.arange(10, dtype=torch.int32)
    seen = seen_from(data, CPU)
    assert seen.dtype == torch.uint8
    assert seen.shape == (40,)
    seen.view(torch.int32)[3] = 77
    assert data[3] == 77
    where = data.data_ptr()
    del data
    assert seen.data_ptr() == where
    assert seen.view(torch.int32).tolist() == [0, 1, 2, 77, 4, 5, 6, 7, 8, 9]


def test_memory_that_was_given_back_is_used_again():
    home = Home(CPU, beside=True)
    first = home.empty((3, 8), torch.bfloat16)
    room = first.data_ptr()
    part = first.view(torch.int64)[1:]
    del first
    assert home.empty((24,), torch.float16).data_ptr() != room  # a view is still there
    del part
    assert home.empty((3, 4), torch.float32).data_ptr() == room


def test_a_copy_keeps_form_and_values():
    wanted = torch.randn(5, 7, dtype=torch.bfloat16)
    for beside in (False, True):
        kept = Home(CPU, beside=beside).keep(wanted)
        assert kept.data_ptr() != wanted.data_ptr()
        assert torch.equal(kept, wanted)


def test_beside_the_devices_all_reach_the_same_memory():
    home = Home(CPU, beside=True)
    stream = home.keep(torch.randn(4, 6))
    assert home.reach(stream, CPU).data_ptr() == stream.data_ptr()


def test_memory_that_cannot_be_pinned_is_told_in_one_line(monkeypatch):
    def refused(nbytes, *, pin):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(home_module, "host_memory", refused)
    with pytest.raises(ResourceError, match=r"^3\.00 GiB .* \(CUDA error: out of memory\); free"):
        Home(CPU, beside=True).empty((3, 1 << 30), torch.uint8)


@pytest.mark.parametrize("crew", [1, 2])
def test_streams_beside_the_device_change_no_byte(
    project, finished, one_thread, cpu_only, monkeypatch, crew
):
    """With one worker, and with several whose outputs wait for each other."""
    monkeypatch.setattr(
        requantize,
        "place",
        lambda context: replace(placement.place(context), beside=True, crew=crew),
    )
    project.run(until="shard")
    assert digests(project.output) == digests(finished.output)
