"""Triton's launchers kept apart where several threads load them.

Each kernel has a launcher, a C extension, and all of them are named `__triton_launcher`.  Python
gives every such extension that is loaded a second time (for a second GPU, or for a kernel with the
like arguments) one and the same module object, filled anew.  Triton takes the launcher from it a
moment later; a thread that loads another one in between makes it take the wrong one, and the kernel
is launched with another's arguments: an error at best.  Seen with triton 3.6 on two GPUs.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

_LOADING = Lock()
_LOADER = "_load_module_from_path"


def keep_apart() -> None:
    """From now on every launcher that Triton loads has a module of its own."""
    build: Any = import_module("triton.runtime.build")
    load = getattr(build, _LOADER, None)
    if load is None:
        warnings.warn("this Triton's launchers cannot be kept apart", stacklevel=2)
        return
    if hasattr(load, "shared"):
        return

    def load_apart(name: str, path: str) -> ModuleType:
        with _LOADING:
            own = ModuleType(name)
            vars(own).update(vars(load(name, path)))
        return own

    load_apart.shared = load  # type: ignore[attr-defined]
    setattr(build, _LOADER, load_apart)
