"""The table of roads for one load: by request or policy, within this machine's means."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from pipeline.checkpoint.shard_map import MAP_NAME, LayerExperts, Reserve, read_shard_map
from pipeline.errors import ResourceError, UserError
from pipeline.hybrid.placing import Table, by_policy, by_request
from pipeline.hybrid.probe import probe

_SHARES = 10**9
"""Shares in a shard map have nine digits; as whole numbers they count as calls."""


def known_use(directory: Path) -> dict[int, list[int]]:
    """Layer -> each expert's calls, in proportion, from shard_map.json; empty without one."""
    if not (directory / MAP_NAME).exists():
        return {}
    layers = read_shard_map(directory)["layers"]
    shares = {int(layer): table["activation_frequency"] for layer, table in layers.items()}
    return {k: [round(part * _SHARES) for part in v] for k, v in shares.items() if v}


def choose(
    placement: str,
    layers: Mapping[int, LayerExperts],
    device: torch.device,
    need: int,
    limit: int | None,
    native: bool = True,
) -> tuple[Table, list[str]]:
    """The table that `placement` asks for; "auto" without a GPU is the CPU for all.

    need: bytes on the device beside experts; limit: bytes allowed there; native: see `load`.
    Also returns what is to be said of it: that kernels which were asked for do not work.
    Raises UserError for a request that is unknown or needs a GPU where there is none.
    """
    if placement == "auto" and device.type != "cuda":
        return by_request(layers, "cpu"), []
    if placement != "auto":
        table = by_request(layers, placement)
        if all(road == "cpu" for roads in table.values() for road in roads):
            return table, []
    reason = kernels_fail(device)
    if reason:
        remark = f"Triton cannot be used, the CPU computes all experts: {reason}"
        return by_request(layers, "cpu"), [remark]
    if placement != "auto":
        return table, []
    free, _ = torch.cuda.mem_get_info(device)
    room = (free if limit is None else min(free, limit)) - need - Reserve().total
    return by_policy(layers, room, probe(device, native)), []


def check_memory(
    table: Table,
    layers: Mapping[int, LayerExperts],
    need: int,
    limit: int | None,
    host: int | None,
    where: str,
) -> None:
    """ResourceError when experts do not fit into `limit` (device) or `host` bytes (RAM)."""
    sizes: Counter[str] = Counter()
    for layer, experts in layers.items():
        for road in table[layer]:
            sizes[road] += experts.expert_nbytes
    total = need + sizes["resident"]
    if limit is not None and sizes["resident"] and total > limit:
        raise ResourceError(
            f"{where}: resident experts and the rest need {total / 2**30:.2f} GiB on the device, "
            f"device_memory allows {limit / 2**30:.2f} GiB: make fewer resident, or use placement "
            "zero-copy"
        )
    in_ram = sizes["zero-copy"] + sizes["cpu"]
    available = psutil.virtual_memory().available
    room = available if host is None else min(host, available)
    if in_ram > room:
        raise ResourceError(
            f"{where}: experts need {in_ram / 2**30:.2f} GiB of RAM, {room / 2**30:.2f} GiB are "
            "allowed or available: free some, or make more experts resident"
        )


def kernels_fail(device: torch.device) -> str | None:
    """Why Triton's kernels do not work on `device`; None when they do.

    UserError on a CPU, but for Triton's interpreter.
    """
    try:
        kernels = importlib.import_module("pipeline.hybrid.kernels")
        if kernels.runs_on(device):
            kernels.self_test(device)
            return None
        reason = "not a GPU"
    except Exception as error:  # whatever is wrong with it, the CPU computes the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if device.type == "cuda":
        return reason
    raise UserError(
        f"placements other than cpu need a GPU, and the model is on {device}: "
        "use placement cpu or auto"
    )
