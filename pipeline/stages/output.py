"""What a layer leaves behind, written in the background while the next layer is solved."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.checkpoint.pieces import Name, PackedTile, write_experts
from pipeline.checkpoint.split import experts_file
from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.stages.streams import drop_streams
from pipeline.stages.units import dense_file, layer_unit, streams_file
from pipeline.workdir import WorkDirectory

POLL_SECONDS = 0.2
"""How often a full queue is looked at again: whether its reader still lives."""


@dataclass(frozen=True)
class LayerEnd:
    """What is written after a layer's experts."""

    dense: Mapping[str, Tensor]
    streams: Mapping[str, Tensor] | None
    """The activations that leave the layer; None: this layer is none to resume from."""
    seconds: float
    data: Mapping[str, Any]


class _Abandoned(Exception):
    """The layer will not be finished."""


@dataclass
class LayerOutput:
    """The files of one layer, growing."""

    layer: int
    tiles: queue.Queue[PackedTile | LayerEnd | None]
    written: Future[None] = field(init=False)

    def put(self, item: PackedTile | LayerEnd | None) -> None:
        """Hand over a tile (in order), or the layer's end; waits while the disk is behind."""
        while True:
            if self.written.done():
                self.written.result()  # raises what stopped the writer
            try:
                return self.tiles.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def abandon(self) -> None:
        """Leave nothing of the layer behind but what was there before."""
        if not self.written.done():
            self.put(None)


class OutputWriter:
    """Writes layers one after another in a thread of its own, at most one behind."""

    def __init__(self, work: WorkDirectory, behind: int) -> None:
        """`behind`: tiles that may wait in host memory."""
        self._work = work
        self._behind = behind
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._saved: Future[None] | None = None
        self._current: LayerOutput | None = None
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._bytes = 0

    @property
    def bytes_per_second(self) -> float | None:
        """Rate of all writing so far; None before anything was written."""
        with self._lock:
            return self._bytes / self._seconds if self._seconds else None

    @property
    def bytes_written(self) -> int:
        """In whole files, so far."""
        return self._bytes

    def begin(self, layer: int, experts: int, name: Name) -> LayerOutput:
        """Start a layer's files; waits for the layer before it. `experts`: 0 for a dense layer."""
        self.wait()
        output = LayerOutput(layer, queue.Queue(self._behind))
        output.written = self._pool.submit(self._write, output, experts, name)
        self._current = output
        return output

    @property
    def saving(self) -> bool:
        """Whether streams of a layer before the current one are still being written."""
        return self._saved is not None and not self._saved.done()

    def wait(self) -> None:
        """Until the layer before is on the disk; raises OutputError if it could not be written."""
        current, self._current = self._current, None
        if current is not None:
            current.written.result()

    def close(self) -> None:
        """Wait for what is still being written, streams too."""
        try:
            self.wait()
            if self._saved is not None:
                self._saved.result()
        finally:
            self._pool.shutdown()
            self._saver.shutdown()

    def write_file(self, name: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        """One safetensors file of the work directory."""
        started = time.monotonic()
        record = write_safetensors(self._work.root / name, tensors, {"format": "pt"})
        self._note(record.size, time.monotonic() - started)
        return FileRecord(name, record.size, record.sha256)

    def _note(self, nbytes: int, seconds: float) -> None:
        with self._lock:
            self._bytes += nbytes
            self._seconds += seconds

    def _write(self, output: LayerOutput, experts: int, name: Name) -> None:
        """A layer's files, then the marker; the streams beside the layers to come."""
        work, layer = self._work, output.layer
        ends: list[LayerEnd] = []
        waited = 0.0

        def tiles() -> Iterator[PackedTile]:
            nonlocal waited
            while True:
                started = time.monotonic()
                item = output.tiles.get()
                waited += time.monotonic() - started
                if item is None:
                    raise _Abandoned
                if isinstance(item, LayerEnd):
                    ends.append(item)
                    return
                yield item

        records = []
        started = time.monotonic()
        try:
            if experts:
                record = write_experts(work.root / experts_file(layer), experts, name, tiles())
                records.append(record)
                self._note(record.size, time.monotonic() - started - waited)
            else:
                for _ in tiles():  # only the end comes
                    raise AssertionError("a layer without experts has no tiles")
        except _Abandoned:
            return
        end = ends[0]
        records.insert(0, self.write_file(dense_file(layer), end.dense))
        work.finish(layer_unit(layer), records, end.seconds, end.data)
        if end.streams is not None:
            if self._saved is not None:
                self._saved.result()  # one set at a time is written; an error comes out here
            self._saved = self._saver.submit(self._save, layer, end.streams)

    def _save(self, layer: int, streams: Mapping[str, Tensor]) -> None:
        """What leaves a layer that has its marker; older streams are dropped.

        The marker leaves them out, since a later layer removes them.
        """
        self.write_file(streams_file(layer), streams)
        drop_streams(self._work, layer)
