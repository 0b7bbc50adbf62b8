"""What a night ran on: by this a history knows which figures may be compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline import __version__

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")


def describe(report: Mapping[str, Any]) -> dict[str, Any]:
    """The machine, and `key`, which is equal where figures may be compared.

    The key names kinds, not the host: a runner that gets another name every night but the same
    hardware has a history.  The thread count in it is the one of the measurement, from `report`.
    """
    seen = report.get("machine", {})
    found = {
        "host": platform.node(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": seen.get("threads"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": seen.get("device"),
    }
    key = (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads,"
        f" {found['memory_gib']} GiB, {found['device']}"
    )
    return {**found, "key": key}


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    found = {"requant": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str | None:
    """The commit of this package's checkout (`+` when files differ from it); None outside one."""
    root = Path(__file__).parents[2]
    try:
        top, head = _git(root, "rev-parse", "--show-toplevel", "HEAD").split()
        if Path(top).resolve() != root:  # installed below somebody else's checkout
            return None
        changed = _git(root, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
