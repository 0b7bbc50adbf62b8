"""Small tables on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(table: Tensor, device: torch.device) -> Tensor:
    """A table on a device.

    A copy from memory that is not pinned waits until a GPU has done all that it was given, and the
    GPU then waits for what comes next.  There are dozens of them in a tile.
    """
    if device.type != "cuda" or table.is_cuda:
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
