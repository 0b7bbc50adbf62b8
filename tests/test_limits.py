"""Memory and disk that do not suffice: refused, or stopped with all finished layers kept."""

import dataclasses
import resource

import pytest
import torch
from support.recipes import digests

from pipeline.errors import OutputError, ResourceError
from pipeline.plan import _check_limits, prepare
from pipeline.recipe import parse_recipe
from pipeline.stages import tiles
from pipeline.stages.order import STAGES
from pipeline.stages.placement import place, retreat, smallest, stream_bytes

MIB = 1 << 20


def _on_gpu(project, limit):
    """The recipe's context as a machine with a GPU would have it."""
    project.change(limits={"device_memory": limit})
    context = prepare(project.recipe, project.text)
    return dataclasses.replace(context, device=torch.device("cuda"))


def test_less_memory_means_less_in_flight_and_at_last_a_refusal(project):
    roomy = place(_on_gpu(project, "24GiB"))
    assert not roomy.beside
    assert roomy.ahead > 1
    need = roomy.device_bytes
    fewer = place(_on_gpu(project, need - MIB))
    assert not fewer.beside
    assert fewer.ahead == roomy.ahead - 1
    context = _on_gpu(project, smallest(_on_gpu(project, "24GiB")).device_bytes)
    beside = place(context)
    assert beside.beside
    assert beside.host_bytes >= stream_bytes(context)
    _check_limits(STAGES["requantize"].jobs(context), context)
    context = _on_gpu(project, beside.device_bytes - 1)
    with pytest.raises(ResourceError, match=r"one tile of experts .* raise the limit"):
        _check_limits(STAGES["requantize"].jobs(context), context)


def _no_memory():
    """torch's own words for more than the machine has."""
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error


def _failing(error, layer):
    solve = tiles.solve_tile

    def failing(job, *rest):
        if job.layer == layer:
            raise error
        return solve(job, *rest)

    return failing


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            r"memory ran out .*; finished .*raise",
        ),
        (torch.AcceleratorError("CUDA error: gone\nmore"), r"the GPU failed \(CUDA error: gone\)"),
        (MemoryError(), "the machine's memory ran out; finished layers are kept, free some"),
        (_no_memory(), "the machine's memory ran out; finished layers are kept, free some"),
    ],
)
def test_a_device_that_fails_keeps_what_is_finished(
    project, finished, one_thread, cpu_only, monkeypatch, error, said
):
    with monkeypatch.context() as patched:
        patched.setattr(tiles, "solve_tile", _failing(error, 1))
        with pytest.raises(ResourceError, match=rf"requantize, layer 1: .*{said}") as caught:
            project.run(until="shard")
    assert "\n" not in str(caught.value)
    project.run(until="shard")
    assert project.said == ["resuming: 2 of 5 units are done"]
    assert digests(project.output) == digests(finished.output)


def test_less_is_put_on_a_device_that_was_full(
    project, finished, one_thread, cpu_only, monkeypatch
):
    """As on a GPU, where there is less to put there; the bytes are those of a run with room."""
    full = [torch.OutOfMemoryError("CUDA out of memory")]
    solve = tiles.solve_tile

    def solving(job, *rest):
        if job.layer == 1 and full:
            raise full.pop()
        return solve(job, *rest)

    monkeypatch.setattr(tiles, "solve_tile", solving)
    monkeypatch.setattr("pipeline.run.retreat", lambda _context: True)
    project.run(until="shard")
    assert not full
    assert project.said == [
        "the GPU's memory ran out; going on with less in flight, 1 layers are done"
    ]
    assert digests(project.output) == digests(finished.output)


def test_steps_back_end_with_the_smallest(project):
    context = _on_gpu(project, "24GiB")
    placements = [place(context)]
    while retreat(context):
        placements.append(place(context))
    assert [p.ahead for p in placements] == [placements[0].ahead, 1, 1]
    assert [p.beside for p in placements] == [False, False, True]
    assert placements[-1] == smallest(context)


def test_a_full_disk_keeps_what_is_finished(project, finished, one_thread, cpu_only):
    """The system refuses files above a size: those of the experts, after the dense tensors."""
    project.run(only="dequantize")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot be written .*make room and give the same"):
            project.run(until="shard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(project.partial.rglob("*.tmp"))
    project.run(until="shard")
    assert project.said[0].startswith("resuming: 1 of")
    assert digests(project.output) == digests(finished.output)


def test_a_gpu_limit_without_a_gpu_is_remarked_on(project, cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    remark = "no GPU was found: the conversion runs on the CPU, limits.device_memory limits nothing"
    assert cli("plan", project.write()).err == ""
    limit = ("--set", "limits.device_memory=8GiB")
    assert cli("plan", project.write(), *limit).err == remark + "\n"
    answer = cli("run", project.write(), *limit, "--until", "dequantize")
    assert answer.code == 0 and answer.err.splitlines().count(remark) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_limit_holds_on_a_gpu(project, monkeypatch):
    monkeypatch.setattr("pipeline.plan._check_limits", lambda *_: None)
    project.change(limits={"device_memory": "24MiB"})
    torch.cuda.empty_cache()
    with pytest.raises(ResourceError, match="memory ran out with one tile in flight"):
        project.run(until="shard")
    context = project.change(limits={"device_memory": "4GiB"}).run(until="shard")
    assert parse_recipe(project.data, "recipe").limits.device_memory == 4 << 30
    assert (context.output / "SHA256SUMS").is_file()
