"""Tiles in flight, several devices, and files written tile by tile: no byte depends on them."""

import queue
import threading
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from support.recipes import digests

from pipeline.checkpoint.pieces import pack_tile, write_experts
from pipeline.checkpoint.writer import write_safetensors
from pipeline.errors import OutputError
from pipeline.stages import output, placement, requantize, tiles
from pipeline.stages.output import LayerOutput
from pipeline.stages.streams import SavePolicy
from pipeline.stages.units import streams_file


def _converted(project, name):
    """The digests of a conversion into a directory of its own."""
    folder = project.folder / name
    project.change(output={"path": str(folder)}).run(until="shard")
    return digests(folder)


@pytest.mark.parametrize("others", [1, 2])
def test_several_devices_give_the_bytes_of_one(project, one_thread, cpu_only, monkeypatch, others):
    monkeypatch.setattr("pipeline.stages.tiling.TILE_EXPERTS", 3)  # 8 experts: 3 tiles
    alone = _converted(project, "alone")
    used = set()
    work = tiles.TileCrew._work

    def seen(self, reader, *rest):
        used.add(id(reader))
        return work(self, reader, *rest)

    monkeypatch.setattr(tiles.TileCrew, "_work", seen)
    monkeypatch.setattr(
        "pipeline.plan.further_devices", lambda device: (torch.device("cpu"),) * others
    )
    assert _converted(project, "shared") == alone
    assert len(used) == 1 + others


def test_threads_of_a_cpu_share_the_tiles(project, cpu_only, monkeypatch):
    """A thread each; with memory for one tile at a time the bytes are the same."""
    monkeypatch.setattr("pipeline.stages.tiling.TILE_EXPERTS", 2)  # 8 experts: 4 tiles
    seen = set()
    work = tiles.TileCrew._work

    def noted(*args):
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return work(*args)

    monkeypatch.setattr(tiles.TileCrew, "_work", noted)
    project.change(limits={"threads": 3})
    shared = _converted(project, "shared")
    assert seen == {(f"solver-{i}_0", 1) for i in range(3)}
    assert torch.get_num_threads() == 3
    seen.clear()
    monkeypatch.setattr(
        requantize, "place", lambda context: replace(placement.place(context), crew=1)
    )
    assert _converted(project, "alone") == shared
    assert seen == {("solver-0_0", 1)}


def test_limits_change_no_byte(project, one_thread, cpu_only):
    roomy = _converted(project, "roomy")
    project.change(limits={"host_memory": "1400MiB"})
    assert _converted(project, "tight") == roomy


def test_file_written_by_tiles_equals_one_written_whole(tmp_path):
    def parts(experts, rows, columns):
        return {
            "qweight": torch.randint(-(2**31), 2**31, (experts, columns // 8, rows)).int(),
            "scales": torch.rand(experts, columns // 32, rows).half(),
            "g_idx": torch.arange(columns, dtype=torch.int32).repeat(experts, 1),
            "wide": torch.rand(experts, rows, dtype=torch.float64),
        }

    shapes = {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    stacks = {name: parts(11, *shape) for name, shape in shapes.items()}
    cut = [range(0, 4), range(4, 8), range(8, 11)]
    packed = (
        pack_tile({n: {k: v[t.start : t.stop] for k, v in p.items()} for n, p in stacks.items()})
        for t in cut
    )
    record = write_experts(tmp_path / "tiles", 11, lambda e, p: f"layer.experts.{e}.{p}", packed)
    whole = write_safetensors(
        tmp_path / "whole",
        {
            f"layer.experts.{e}.{projection}.{part}": values[e]
            for projection, stack in stacks.items()
            for part, values in stack.items()
            for e in range(11)
        },
    )
    assert (record.size, record.sha256) == (whole.size, whole.sha256)
    assert (tmp_path / "tiles").read_bytes() == (tmp_path / "whole").read_bytes()


def test_too_few_tiles_leave_no_file(tmp_path):
    tile = pack_tile({"up": {"qweight": torch.zeros(2, 4, 4, dtype=torch.int32)}})
    with pytest.raises(ValueError, match="bytes were given"):
        write_experts(tmp_path / "file", 3, lambda e, p: f"{e}.{p}", iter([tile]))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_failed_stops_the_solver():
    output = LayerOutput(0, queue.Queue(1))
    output.written = Future()
    output.put(None)  # fills the queue
    output.written.set_exception(OutputError("disk full"))
    with pytest.raises(OutputError, match="disk full"):
        output.put(None)


def test_an_error_in_mid_layer_leaves_no_half_file(project, one_thread, cpu_only, monkeypatch):
    monkeypatch.setattr("pipeline.stages.tiling.TILE_EXPERTS", 4)
    monkeypatch.setattr(tiles, "solve_tile", _failing_at(tiles.solve_tile, 4))
    with pytest.raises(RuntimeError, match="lost"):
        project.run(until="shard")
    assert not list(project.partial.glob("model-experts-layer-001*"))
    assert not list(project.partial.rglob("*.tmp"))
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.stages.tiling.TILE_EXPERTS", 4)
    project.run(until="shard")
    resumed = digests(project.output)
    assert any("resuming" in line for line in project.said)
    assert _converted(project, "at-once") == resumed


def _failing_at(function, call):
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("the device was lost")
        return function(*args)

    return counted


def test_layers_without_saved_streams_are_done_again(project, one_thread, cpu_only, monkeypatch):
    """Saving only after layer 0 and being stopped after layer 1: layer 1 is redone, same bytes."""
    whole = _converted(project, "whole")
    monkeypatch.setattr(requantize.SavePolicy, "due", lambda self, *_: self.__dict__.pop("last", 0))
    project.change(output={"path": str(project.folder / "resumed")})
    monkeypatch.setattr(requantize.Requantize, "_record_reference", _stopped)
    with pytest.raises(KeyboardInterrupt):
        project.run(until="shard")
    partial = project.folder / "resumed.partial"
    assert [p.name for p in partial.rglob("streams-*")] == ["streams-000.safetensors"]
    assert (partial / "model-experts-layer-001.safetensors").is_file()
    monkeypatch.undo()
    project.run(until="shard")
    assert any("2 of" in line for line in project.said), project.said
    assert digests(project.folder / "resumed") == whole


def test_large_streams_are_saved_beside_the_next_layers(project, one_thread, cpu_only, monkeypatch):
    """By a thread of their own; what is stopped then goes on after the layer saved last."""
    whole = _converted(project, "whole")
    threads = {}
    write = output.OutputWriter.write_file

    def written(self, name, tensors):
        threads[name] = threading.current_thread().name.partition("_")[0]
        return write(self, name, tensors)

    monkeypatch.setattr(output.OutputWriter, "write_file", written)
    project.change(output={"path": str(project.folder / "resumed")})
    monkeypatch.setattr(requantize.Requantize, "_record_reference", _stopped)
    with pytest.raises(KeyboardInterrupt):
        project.run(until="shard")
    assert threads[streams_file(0)] == threads[streams_file(1)] == "saver"
    partial = project.folder / "resumed.partial"
    assert [p.name for p in partial.rglob("streams-*")] == ["streams-001.safetensors"]
    monkeypatch.undo()
    project.run(until="shard")
    assert any("3 of" in line for line in project.said), project.said
    assert digests(project.folder / "resumed") == whole


def test_streams_that_cannot_be_saved_end_the_run(project, one_thread, cpu_only, monkeypatch):
    write = output.OutputWriter.write_file

    def refused(self, name, tensors):
        if name == streams_file(0):
            raise OutputError("no room for the streams")
        return write(self, name, tensors)

    monkeypatch.setattr(output.OutputWriter, "write_file", refused)
    with pytest.raises(OutputError, match="no room for the streams"):
        project.run(until="shard")


def _stopped(*_):
    raise KeyboardInterrupt


def test_saving_takes_a_tenth_of_the_time_at_most():
    policy = SavePolicy()
    policy.last -= 100
    assert not policy.due(11 * 10**9, 1e9)
    assert policy.due(9 * 10**9, 1e9)
    assert not policy.due(9 * 10**9, 1e9)
    assert policy.due(10**6, 1e3)  # small ones always
    assert not policy.due(10**9, None)
