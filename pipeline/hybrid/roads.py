"""The table of roads for one load: by request or policy, within this machine's means."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from pipeline.checkpoint.shard_map import MAP_NAME, LayerExperts, read_shard_map
from pipeline.errors import ResourceError, UserError
from pipeline.hybrid.ledger import CONTEXT, COPIES, Ledger
from pipeline.hybrid.placing import Table, by_policy, by_request
from pipeline.hybrid.probe import probe
from pipeline.quantize.launchers import keep_apart

CHOSEN = ("auto", "fill")
"""Placements that depend on the machine."""

NEEDS_GPU = (
    "all placements but cpu and auto need a GPU, the model is on {}: use placement cpu or auto"
)

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
    room: int = 0,
    native: bool = True,
    dividing: bool = False,
) -> tuple[Table, list[str]]:
    """The table that `placement` asks for; "auto" without a GPU is the CPU for all.

    room: bytes on the device that "fill" may fill; native: see `load`; dividing: the CPU can take a
    part of zero-copy experts' calls, so that none need be at home there.
    Also returns what is to be said of it: that kernels which were asked for do not work.
    Raises UserError for a request that is unknown or needs a GPU where there is none.
    """
    chosen = placement in CHOSEN
    if chosen and device.type != "cuda":
        if placement != "auto":
            raise UserError(NEEDS_GPU.format(device))
        return by_request(layers, "cpu"), []
    table = by_request(layers, "zero-copy" if chosen else placement)
    if all(road == "cpu" for roads in table.values() for road in roads):
        return table, []
    reason = kernels_fail(device)
    if reason:
        remark = f"Triton cannot be used, the CPU computes all experts: {reason}"
        return by_request(layers, "cpu"), [remark]
    if placement == "fill":
        table = by_policy(layers, room, None if dividing else probe(device, native))
    return table, []


def check_device(need: Ledger, device: torch.device, limit: int | None, where: str) -> None:
    """ResourceError when the ledger exceeds `limit`, or what is free on a GPU."""
    allowed = allowed_on(device, limit)
    if need.total <= allowed:
        return
    largest = sorted(need.items().items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in largest)
    kept = need.torch["resident experts"] + need.torch[COPIES]
    helps = "make fewer experts resident" if kept else "allow more, free some, or use device cpu"
    by_limit = limit is not None and limit <= allowed
    raise ResourceError(
        f"{where}: {need.total / 2**30:.2f} GiB are needed on {device} ({parts}, ...), "
        f"{allowed / 2**30:.2f} GiB are {'what device_memory allows' if by_limit else 'free'}: "
        f"{helps}"
    )


def allowed_on(device: torch.device, limit: int | None) -> int:
    """Bytes that this process may take on a GPU, what it has taken for its context included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + CONTEXT if limit is None else min(free + CONTEXT, limit)


def check_host(
    table: Table, layers: Mapping[int, LayerExperts], host: int | None, where: str
) -> int:
    """Bytes of RAM that are left behind the experts in it; ResourceError when those exceed `host`
    bytes, or what is available."""
    in_ram = sum(
        layers[layer].expert_nbytes * sum(road != "resident" for road in roads)
        for layer, roads in table.items()
    )
    available = psutil.virtual_memory().available
    room = available if host is None else min(host, available)
    if in_ram > room:
        raise ResourceError(
            f"{where}: experts need {in_ram / 2**30:.2f} GiB of RAM, {room / 2**30:.2f} GiB are "
            "allowed or available: free some, or make more experts resident"
        )
    return room - in_ram


def kernels_fail(device: torch.device) -> str | None:
    """Why Triton's kernels do not work on `device`; None when they do.

    UserError on a CPU, but for Triton's interpreter.
    """
    try:
        keep_apart()
        kernels = importlib.import_module("pipeline.hybrid.kernels")
        if kernels.runs_on(device):
            kernels.self_test(device)
            return None
        reason = "not a GPU"
    except Exception as error:  # whatever is wrong with it, the CPU computes the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if device.type == "cuda":
        return reason
    raise UserError(NEEDS_GPU.format(device))
