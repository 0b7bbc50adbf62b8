"""A layer's (token, expert) pairs, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.stages.home import Home
from pipeline.stages.stream import Recorded


@dataclass(frozen=True)
class Routed:
    """A stream's inputs to the experts of one layer, sorted by expert."""

    inputs: Tensor
    """bf16 [tokens, hidden]"""
    tokens: Tensor
    """int64 [pairs]: the token of each (token, expert) pair, pairs in expert order."""
    weights: Tensor
    """float32 [pairs]: the router's weight of each pair."""
    offsets: tuple[int, ...]
    """Expert e owns pairs offsets[e] to offsets[e + 1]."""

    def count(self, expert: int) -> int:
        """Tokens routed to an expert."""
        return self.offsets[expert + 1] - self.offsets[expert]

    def to(self, device: torch.device, home: Home) -> Routed:
        """The same for another device; `home`: where the streams live."""
        inputs = home.reach(self.inputs, device)
        return Routed(inputs, self.tokens.to(device), self.weights.to(device), self.offsets)


def sort_by_expert(recorded: Recorded, experts: int) -> Routed:
    """Sort a layer's recorded (token, expert) pairs by expert; stable, so deterministic."""
    assert recorded.inputs is not None
    assert recorded.index is not None
    assert recorded.weight is not None
    top_k = recorded.index.shape[1]
    flat = recorded.index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return Routed(
        inputs=recorded.inputs,
        tokens=order // top_k,
        weights=recorded.weight.reshape(-1)[order],
        offsets=tuple(offsets),
    )


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows [n, hidden] of a stream [tokens, hidden], int64 `index` [n] on the same device."""
    return table.index_select(0, index)
