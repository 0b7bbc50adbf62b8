"""Where a conversion's streams live: on the device, or beside it in host memory.

A small GPU has no room for them.  They then lie in pinned host memory, and are the GPU's tensors
all the same: its kernels gather rows, add sums and look for NaN in place, over the bus.  So there
is one code for both, and the processor's part is only to hold the memory.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from pipeline.errors import ResourceError
from pipeline.hybrid.host import host_memory, seen_from


class Home:
    """Memory for streams."""

    def __init__(self, device: torch.device, *, beside: bool = False) -> None:
        """`beside`: in host memory instead of the device's."""
        self.device = device
        self.beside = beside
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of the device, not filled.

        Beside it, memory that was given back serves the next tensor of as many bytes: finding and
        pinning it anew would take longer than a layer does.
        """
        if not self.beside:
            return torch.empty(shape, dtype=dtype, device=self.device)
        nbytes = prod(shape) * dtype.itemsize
        spare = self._free[nbytes]
        room = spare.pop() if spare else self._pinned(nbytes)
        seen = seen_from(room, self.device)
        weakref.finalize(seen.untyped_storage(), spare.append, room)
        return seen.view(dtype).view(*shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def reach(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of this home for another device: a copy, or, beside the devices, the same."""
        if not self.beside:
            return tensor.to(device)
        return seen_from(tensor, device).view(tensor.dtype).view(tensor.shape)

    def settle(self, devices: Sequence[torch.device]) -> None:
        """Wait for devices that may be at work on memory that is about to be given back."""
        if self.beside and self.device.type == "cuda":
            with suppress(RuntimeError):  # a GPU that is gone works on nothing
                for device in devices:
                    torch.cuda.synchronize(device)

    def _pinned(self, nbytes: int) -> Tensor:
        try:
            return host_memory(nbytes, pin=self.device.type == "cuda")
        except RuntimeError as error:
            raise ResourceError(
                f"{nbytes / 2**30:.2f} GiB of host memory for activations cannot be pinned for the"
                f" GPU ({str(error).splitlines()[0]}); free some memory, let limits.device_memory"
                " hold them, or use fewer calibration.samples, and give the same command"
            ) from None
