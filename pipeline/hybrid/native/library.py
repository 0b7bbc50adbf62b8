"""The compiled kernels for the CPU, found and loaded, or the reason why there are none."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from pipeline.hybrid.records import Part

KINDS = ("plain C", "AVX2", "AVX512 VNNI")
"""By the numbers of `requant_best` in layer.c."""

_VERSION = 2
"""Of `requant_version` in layer.c: an older library would be called with arguments not its own."""

_MAX_GROUPS = 2048
"""MAX_GROUPS in kernel.h."""


@dataclass(frozen=True)
class Library:
    """The functions of layer.c and dense.c, and what they are called with."""

    experts: Callable[..., int]
    dense: Callable[..., int]
    large_pages: Callable[[int, int], None]
    parallel: int
    """Address of GOMP_parallel in the OpenMP runtime that torch uses."""
    kind: int

    @property
    def name(self) -> str:
        """For reports."""
        return f"native, {KINDS[self.kind]}"


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
        experts, dense = found.requant_experts, found.requant_dense
        large_pages = found.requant_large_pages
        kind = int(found.requant_best())
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded: {error}"
    try:  # torch loads its runtime for all to see
        parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return "torch was built with an OpenMP runtime that has no GOMP_parallel"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    experts.argtypes = [
        *(pointer, pointer, number, pointer, pointer, pointer, number, number, pointer),
        *(ctypes.c_int, number, pointer),
    ]
    dense.argtypes = [
        *(pointer, number, number, pointer, number, pointer),
        *(ctypes.c_int, number, pointer),
    ]
    large_pages.argtypes, large_pages.restype = [pointer, number], None
    return Library(experts, dense, large_pages, parallel or 0, kind)


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


_forked = False


def _note_fork() -> None:
    global _forked  # noqa: PLW0603 - a process is forked or not
    _forked = True


os.register_at_fork(after_in_child=_note_fork)
