"""The activations that a conversion carries from layer to layer, and when they are saved.

A run that is stopped goes on from the last layer whose outgoing activations were saved.  They are
gigabytes at full size, so they are saved when that costs little beside the work that would be lost:
at most `SHARE` of the time, at the rate at which the disk was seen to write.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.stages.home import Home
from pipeline.stages.units import layer_unit, streams_file
from pipeline.workdir import WorkDirectory

SHARE = 0.1
"""Part of the time that saving may take."""

SMALL_BYTES = 32 << 20
"""Streams that are saved after every layer, whatever it costs."""

DISK_BYTES_PER_SECOND = 5e8
"""Assumed until this run has written something."""


@dataclass
class Streams:
    """bf16 [sequences, length, hidden] each, as they leave layer `after`."""

    after: int
    calibration: Tensor
    evaluation: Tensor
    target: Tensor | None = None

    @classmethod
    def load(cls, work: WorkDirectory, layer: int, home: Home) -> Streams:
        """As saved after a layer."""
        saved = load_file(work.root / streams_file(layer))
        return cls(layer, **{name: home.keep(tensor) for name, tensor in saved.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name."""
        kept = {"calibration": self.calibration, "evaluation": self.evaluation}
        return kept if self.target is None else kept | {"target": self.target}

    def snapshot(self, into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Copies in host memory: the streams themselves are overwritten by the next layer.

        `into`: an earlier snapshot that is not needed any more.  Memory that has been written to
        before takes a copy five times as fast as memory that the system has to find first, and
        a GPU's copies into pinned memory are faster still (docs/performance.md).
        """
        copies = into or {
            name: torch.empty_like(t, device="cpu", pin_memory=t.is_cuda)
            for name, t in self.tensors().items()
        }
        return {name: copies[name].copy_(t) for name, t in self.tensors().items()}

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass
class SavePolicy:
    """Whether a layer's outgoing streams are worth saving."""

    last: float = field(default_factory=time.monotonic)
    """When the last save was decided on, or the run began."""

    def due(self, nbytes: int, bytes_per_second: float | None) -> bool:
        """Decide; saying yes counts as saving."""
        now = time.monotonic()
        cost = nbytes / (bytes_per_second or DISK_BYTES_PER_SECOND)
        if nbytes > SMALL_BYTES and cost > SHARE * (now - self.last):
            return False
        self.last = now
        return True


def drop_streams(work: WorkDirectory, but: int | None = None) -> None:
    """Delete saved activations, those that leave layer `but` excepted."""
    kept = None if but is None else work.root / streams_file(but)
    for path in sorted(work.internal.glob("streams-*.safetensors")):
        if path != kept:
            path.unlink()


def resumable_layers(work: WorkDirectory, layers: int) -> int:
    """How many layers, from the first, a run need not do again: those up to the last whose streams
    are in place; finished layers beyond it have to be redone, as what leaves them is not known."""
    found = 0
    for layer in range(layers):
        if work.finished(layer_unit(layer)) is None:
            break
        if (work.root / streams_file(layer)).is_file():
            found = layer + 1
    return found
