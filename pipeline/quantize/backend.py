"""Which code does the solver's inner loops on a device: Triton kernels, or plain torch."""

from __future__ import annotations

import importlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Literal

import torch

from pipeline.errors import ResourceError
from pipeline.quantize.launchers import keep_apart

Backend = Literal["torch", "triton"]

KERNELS = (
    "triton_kernels",
    "triton_columns",
    "triton_products",
    "triton_refine",
    "triton_routed",
)
"""Modules of Triton kernels, used together or not at all."""


_TESTING = Lock()
"""Held while kernels are tested: threads that ask meanwhile wait for the answer."""


def solver_backend(device: torch.device) -> Backend:
    """The backend for tensors on `device`; part of what decides a result's bytes.

    Triton needs a C compiler at run time and a GPU generation it knows, so it counts as present
    only after its kernels gave the right answer once on this device.
    """
    if device.type != "cuda":
        return "torch"
    with _TESTING:
        return _tested(device.index or 0)


@cache
def _tested(index: int) -> Backend:
    device = torch.device("cuda", index)
    try:
        keep_apart()
        modules = [importlib.import_module(f"pipeline.quantize.{name}") for name in KERNELS]
        with ThreadPoolExecutor(len(modules), thread_name_prefix="kernels") as pool:
            for tested in [pool.submit(_test, module, device) for module in modules]:
                tested.result()
    except torch.OutOfMemoryError as error:  # says nothing of Triton, and is not remembered
        raise ResourceError(
            "the GPU's memory is full, its kernels cannot even be tried; end what else uses it"
        ) from error
    except Exception as error:  # whatever is wrong with it, plain torch does the same work
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton cannot be used, plain torch is slower: {reason}", stacklevel=3)
        return "torch"
    return "triton"


def _test(kernels: ModuleType, device: torch.device) -> None:
    """A module's own test, in a thread: they compile side by side, most of it without Python."""
    # A thread's current device is the first one; where there is none, -1 changes nothing.
    with torch.cuda.device(device if torch.cuda.is_available() else -1):
        kernels.self_test(device)
