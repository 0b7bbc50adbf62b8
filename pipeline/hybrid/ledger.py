"""What a loaded model takes of a GPU's memory, item by item, told before any of it is taken.

All is counted from geometry and options, so that the same figures serve for a machine that is
elsewhere.  `tests/hybrid/test_ledger.py` holds them against what is really allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.checkpoint.shard_map import Reserve
from pipeline.hybrid.cache import PREFILL_CHUNK, head_size, held_bytes, state_bytes
from pipeline.hybrid.placing import Road, Table, copies_each
from pipeline.hybrid.stream import NEAR, PARTS, ring
from pipeline.models.architecture import Geometry

MIB = 1 << 20
TEXT = 16384
"""Tokens of one text that room is kept for; longer ones take what is left, if it is enough."""
SCAN = 64
"""Tokens of DeltaNet's chunks, inside which it computes squares."""

CONTEXT = 625 * MIB
"""What a process takes with its first tensor: 0.61 GiB on an H200, CUDA 13.0, 2026-11-26."""
CODE = 1024 * MIB
"""Code of kernels and libraries, loaded when it is first used, what else the driver keeps, and
blocks that torch has reserved without need.  At 80B geometry an H200 took 0.14 and 0.26 GiB of them
(commit c68d6b1, 2026-11-26); the rest is for other cards and versions, where nothing was measured.
"""
SCAN_LOCAL = {64: 136, 256: 720, 512: 3200}
"""Bytes of local memory of a thread in DeltaNet's scan, by a key's channels; none with 16, 32, 128.
The driver keeps as much for every thread that a GPU can hold.  This and the next: ptxas, Triton
3.6, sm_90; no other kernel of ours has any in bfloat16, and what libraries' have is in `CODE`."""
GROUPED_LOCAL = 6568
"""The same in the grouped product of experts, in float32."""
RESIDENT_THREADS = 132 * 2048
"""Of an H100 or H200: what is assumed of a GPU that is not here."""
PAGE, ENTRY = 4096, 8
"""Pinned memory is mapped for the GPU page by page, an entry of 8 bytes each."""
LIBRARIES = 64 * MIB
"""cuBLAS's workspaces, 32 MiB for each of the two streams that multiply (torch, Hopper)."""
GRAPHS = 64 * MIB
"""A decode step's buffers and its graphs' private pool: a few MiB, in blocks of 2 and 20."""

COPIES = "copies of experts that follow use"
RING = "ring that prompts' experts pass through"


@dataclass(frozen=True)
class Ledger:
    """Bytes on one GPU by what they are for."""

    torch: Mapping[str, int]
    """What torch's allocator gives out at the fullest moment."""
    driver: Mapping[str, int]
    """What the driver takes beside it."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.torch.values()) + sum(self.driver.values())

    def items(self) -> dict[str, int]:
        """Name -> bytes, for reports; what takes nothing is left out."""
        return {name: size for name, size in {**self.torch, **self.driver}.items() if size}


@dataclass(frozen=True)
class Experts:
    """Where the experts are, and what one of each layer takes there."""

    homes: Table
    """Layer -> the road that keeps each expert."""
    nbytes: Mapping[int, int] = field(default_factory=dict)
    """Layer -> bytes of a record; layers all of whose experts the CPU has may be left out."""
    copies: Mapping[int, list[int]] = field(default_factory=dict)
    """Layer -> experts that begin with copies in GPU memory, where those follow use."""
    alike: bool = True
    """Whether the records of all layers are of one layout: others pass through no ring, and have no
    copies."""
    streamed: tuple[Road, ...] = NEAR
    """Roads whose experts pass through the ring."""
    buffers: int = PARTS
    """In the ring, at most."""

    def count(self, layer: int, road: str) -> int:
        """Experts of a layer on a road."""
        return sum(its == road for its in self.homes[layer])


def ledger(
    config: Any,  # noqa: ANN401  (a transformers config: sizes are known by their names)
    geometry: Geometry,
    weights: int,
    experts: Experts,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1,
    length: int = TEXT,
    threads: int = RESIDENT_THREADS,
) -> Ledger:
    """The ledger of one model.

    weights: bytes of all but the experts; tokens: sequences that are decoded side by side, each of
    up to `length` tokens; threads: that the GPU can hold at once (`resident_threads`).
    """
    in_rows = [
        (layer, number)
        for layer in experts.nbytes
        for road in experts.streamed
        if (number := experts.count(layer, road))
    ]
    sizes = experts.nbytes.items()
    size = max(experts.nbytes.values(), default=0)  # of all, where it is used
    ringed = [number for _, number in in_rows] if experts.alike else []
    parts, members = ring(ringed, size, experts.buffers) if ringed else (0, 0)
    homes = [
        layer for layer in experts.nbytes if experts.alike and experts.count(layer, "zero-copy")
    ]
    begin = [experts.copies.get(layer, []) for layer in homes]
    resident = sum(size * experts.count(layer, "resident") for layer, size in sizes)
    host = sum(number * experts.nbytes[layer] for layer, number in in_rows)
    scan = SCAN_LOCAL.get(_delta(config)[1], 0)
    grouped = GROUPED_LOCAL if experts.nbytes and dtype == torch.float32 else 0
    return Ledger(
        torch={
            "weights outside the experts": weights,
            "resident experts": resident,
            COPIES: copies_each(begin) * len(homes) * size,
            RING: parts * members * size,
            f"keys and values of {length:,} tokens": held_bytes(config, tokens, length, dtype),
            "recurrent states": state_bytes(config, tokens, dtype),
            "activations of a prompt": prompt_bytes(config, geometry, tokens, length, dtype),
            "a decode step and its graphs": GRAPHS,
            "libraries' workspaces": LIBRARIES,
        },
        driver={
            "CUDA context": CONTEXT,
            "code of kernels and libraries": CODE,
            "local memory of kernels": threads * max(scan, grouped),
            "page tables of pinned experts": -(-host // PAGE) * ENTRY,
        },
    )


def prompt_bytes(
    config: Any,  # noqa: ANN401
    geometry: Geometry,
    tokens: int,
    length: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of activations in the fullest moment of a prompt's last and largest chunk.

    What lives at once in DeltaNet (`delta_kernels.py`), in attention to a text of `length`, and in
    the experts; the largest of the three beside the residual stream and the mask.
    """
    chunk = min(PREFILL_CHUNK, length)
    rows, size, hidden = tokens * chunk, dtype.itemsize, geometry.hidden
    key_heads, key, value_heads, value = _delta(config)
    keys, values = key_heads * key, value_heads * value
    # what the projections and the convolution make; then what the scan reads, in float32
    mixer = (2 * keys + 2 * values) + (2 * keys + values)
    scan = value_heads * (3 * key + 2 * value + SCAN) if values else 0
    delta = mixer * size + scan * 4
    heads = config.num_attention_heads * head_size(config)
    masked = tokens * length if length > chunk else 0
    attention = 6 * heads * size
    repeated = 2 * heads * masked * size + chunk * masked * size
    pairs = geometry.top_k * (geometry.inner + hidden) * size + 8 * 6 * geometry.top_k
    fullest = max(rows * delta, rows * attention + repeated, rows * pairs)
    return 3 * rows * hidden * size + chunk * masked + fullest


def reserve(found: Ledger) -> Reserve:
    """What a shard map keeps free of experts: all but weights."""
    weights = {"weights outside the experts", "resident experts", COPIES}
    cache = {name for name in found.torch if name.startswith(("keys and values", "recurrent"))}
    return Reserve(
        context=sum(found.driver.values()),
        workspace=sum(v for k, v in found.torch.items() if k not in weights | cache),
        cache=sum(found.torch[name] for name in cache),
    )


def resident_threads(device: torch.device) -> int:
    """Threads that a GPU can hold at once."""
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count * found.max_threads_per_multi_processor)


def _delta(config: Any) -> tuple[int, int, int, int]:  # noqa: ANN401
    """DeltaNet's key heads, channels of each, value heads, channels of each; zeros without it."""
    names = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads")
    sizes = [int(getattr(config, name, 0) or 0) for name in (*names, "linear_value_head_dim")]
    return sizes[0], sizes[1], sizes[2], sizes[3]
