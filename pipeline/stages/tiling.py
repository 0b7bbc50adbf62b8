"""How many of a layer's experts are decoded and solved together: a tile.

The tile is part of what decides the result's bytes.  So it follows from the model's geometry, the
number of calibration tokens and the kind of device alone, never from memory limits, and is such
that a tile takes about the same memory whatever the model: few experts get many tokens each.
"""

from __future__ import annotations

import torch

from pipeline.models.architecture import Geometry

TILE_EXPERTS = 32
"""The largest tile."""

TILE_PAIRS = TILE_EXPERTS * 5120
"""(Token, expert) pairs that a tile gets on average, at most: 512 experts of which 10 are chosen
share 128 sequences of 2048 tokens so."""

TILE_HESSIAN_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}
"""Float32 second moments of a tile's widest inputs.  On a CPU a larger tile is no faster, and
several are solved at once; sums over tokens take `hessian.HESSIAN_EXPERTS` together in any case."""


def tile_experts(geometry: Geometry, tokens: int, device: torch.device) -> int:
    """Experts of a tile, a power of two; `tokens`: of the calibration."""
    each = max(1, tokens * geometry.top_k // max(1, geometry.experts))
    moment = 4 * max(geometry.hidden, geometry.inner) ** 2
    most = min(TILE_PAIRS // each, TILE_HESSIAN_BYTES[device.type] // moment)
    return min(TILE_EXPERTS, 1 << max(most, 1).bit_length() - 1)


def tiles(experts: int, each: int | None = None) -> list[range]:
    """A layer's tiles of `each` experts; None: the largest tile, for what is only decoded."""
    size = TILE_EXPERTS if each is None else each
    return [range(s, min(s + size, experts)) for s in range(0, experts, size)]
