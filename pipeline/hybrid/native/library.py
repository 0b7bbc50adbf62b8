"""The compiled kernels for the CPU, found and loaded, or the reason why there are none."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.hybrid.records import Part
from pipeline.threads import least_of

KINDS = ("plain C", "AVX2", "AVX512 VNNI")
"""By the numbers of `requant_best` in layer.c."""

_VERSION = 4
"""Of `requant_version` in layer.c: an older library would be called with arguments not its own."""

_MAX_GROUPS = 2048
"""MAX_GROUPS in kernel.h."""


@dataclass(frozen=True)
class CrewFunctions:
    """The functions of crew.c: `requant_crew_...` there."""

    new: Callable[[int, int, int], int | None]
    desk: Callable[..., int]
    begin: Callable[[int, int], None]
    served: Callable[[int], int]
    failed: Callable[[int], int]
    close: Callable[[int], None]


@dataclass(frozen=True)
class Library:
    """The functions of layer.c and the files beside it, and what they are called with."""

    experts: Callable[..., int]
    dense: Callable[..., int]
    crew: CrewFunctions
    delta: Callable[..., None]
    norm: Callable[..., None]
    route: Callable[..., None]
    finish: Callable[..., None]
    rotate: Callable[..., None]
    attend: Callable[..., int]
    delta_half: Callable[..., int]
    attention_opening: Callable[..., int]
    attention_half: Callable[..., int]
    sparse_half: Callable[..., int]
    parallel: int
    """Address of GOMP_parallel in the OpenMP runtime that torch uses."""
    kind: int

    @property
    def name(self) -> str:
        """For reports."""
        return f"native, {KINDS[self.kind]}"

    def how(self) -> ctypes.Array[ctypes.c_int64]:
        """`How` of half.c."""
        return numbers(self.kind, threads(), self.parallel)


@cache
def find() -> Library | str:
    """The kernel, or in a few words why it cannot be used here."""
    files = (
        Path(__file__).with_name(f"_kernel{s}") for s in importlib.machinery.EXTENSION_SUFFIXES
    )
    path = next((file for file in files if file.exists()), None)
    if path is None:
        return "it was not built when requant was installed: a C compiler is missing or too old"
    try:
        found = ctypes.CDLL(str(path))
        if found.requant_version() != _VERSION:
            return "it is of another version: install requant again (pip install -e .)"
        functions = {name: _function(found, name, kinds) for name, kinds in _ARGUMENTS.items()}
        crew = _crew(found)
        kind = int(found.requant_best())
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded: {error}"
    try:  # torch loads its runtime for all to see
        parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return "torch was built with an OpenMP runtime that has no GOMP_parallel"
    return Library(**functions, crew=crew, parallel=parallel or 0, kind=kind)


_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_ARGUMENTS = {
    "experts": "ppn ppp nnp inp",
    "dense": "pn pn pn pn npnp inp",
    "delta": "pn pn ppppf ppp nnnnnn inp",
    "norm": "ppnnfp i",
    "route": "pnnnni ppp i",
    "finish": "pppn nnp i",
    "rotate": "pn ppf ppnn nnnn pp i",
    "attend": "pn ppp nnn pf nnnnn p inp",
    "delta_half": "pppppnffp",
    "attention_opening": "pppp nnn ff ppp p",
    "attention_half": "pppppp nnn pnf p n p",
    "sparse_half": "pp ppp nfp",
}
"""What each function takes, by the letters of _TYPES."""


def numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """A structure of addresses and sizes, each of 64 bits."""
    return (ctypes.c_int64 * len(values))(*values)


def _function(found: ctypes.CDLL, name: str, kinds: str, returned: str = "i") -> Callable[..., Any]:
    function = getattr(found, f"requant_{name}")
    function.argtypes = [_TYPES[letter] for letter in kinds.replace(" ", "")]
    function.restype = _TYPES[returned]
    return function


def _crew(found: ctypes.CDLL) -> CrewFunctions:
    return CrewFunctions(
        new=_function(found, "crew", "ppn", "p"),
        desk=_function(found, "crew_desk", "ppp n ppp nn p i", "n"),
        begin=_function(found, "crew_begin", "pn"),
        served=_function(found, "crew_served", "p", "n"),
        failed=_function(found, "crew_failed", "p"),
        close=_function(found, "crew_close", "p"),
    )


def name() -> str:
    """The kernel's, or "none" and why."""
    found = find()
    return f"none: {found}" if isinstance(found, str) else found.name


def takes(part: Part) -> bool:
    """Whether the kernel can multiply by such a matrix."""
    whole = 128 % part.group == 0 or part.group % 128 == 0 or part.groups == 1
    few = part.groups <= _MAX_GROUPS and part.columns <= 64 * _MAX_GROUPS
    return part.paired and part.columns % 16 == 0 and whole and few


def threads() -> int:
    """As many as torch uses; one in a forked child, where OpenMP's runtime has lost its threads."""
    return 1 if _forked else torch.get_num_threads()


def crew_threads() -> int:
    """As many as a crew gets, which spin: one core is Python's, which queues the steps."""
    return max(1, least_of(threads()) - 1)


_forked = False


def _note_fork() -> None:
    global _forked  # noqa: PLW0603 - a process is forked or not
    _forked = True


os.register_at_fork(after_in_child=_note_fork)
