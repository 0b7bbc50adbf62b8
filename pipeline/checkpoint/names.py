"""Which tensor names are routed experts', as written by all architectures with `experts` lists."""

from __future__ import annotations

import re
from typing import NamedTuple

_EXPERT = re.compile(r"^(?P<stem>(?:.*\.)?layers\.(?P<layer>\d+)\..*?\bexperts)\.(?P<rest>.+)$")
_NUMBERED = re.compile(r"^(\d+)\.(.+)$")
_DIGITS = re.compile(r"(\d+)")


class ExpertName(NamedTuple):
    """A routed expert's tensor."""

    layer: int
    expert: int | None
    """None: all experts of the layer stacked in one tensor."""
    rest: str
    """What follows, such as `gate_proj.weight`."""


def expert_of(name: str) -> ExpertName | None:
    """Layer and expert of a tensor of the routed experts, or None for any other tensor.

    `shared_expert` is none; neither are the experts of a draft head (`mtp.`): those are numbered
    by layers of their own and are always kept with the non-experts.
    """
    match = _EXPERT.match(name)
    if match is None or name.startswith("mtp.") or ".mtp." in name:
        return None
    rest = match["rest"]
    numbered = _NUMBERED.match(rest)
    if numbered:
        return ExpertName(int(match["layer"]), int(numbered[1]), numbered[2])
    return ExpertName(int(match["layer"]), None, rest)


def natural(name: str) -> tuple[str | int, ...]:
    """Sort key that puts expert 2 before expert 10."""
    return tuple(int(part) if part.isdigit() else part for part in _DIGITS.split(name))
