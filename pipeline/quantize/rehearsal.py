"""Kernels compiled side by side, ahead of the work that launches them.

Triton compiles a kernel when it is first launched: one after the other, each up to two seconds of
one core, while nearly all of that needs no Python and would leave it to others.  A rehearsal goes
through the work itself and launches nothing.  So it soon meets every kernel with the arguments that
it will have, and threads compile them; what it meets cannot differ from what the work launches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

THREADS = min(16, os.cpu_count() or 1)
"""Kernels compiled at once."""

_ALIGNED = 16
"""Triton has code of its own for addresses and integers that are whole multiples, and for 1."""

_EMPTY = {"empty", "empty_like", "new_empty"}


class Rehearsal:
    """Work gone through by `going_through`, in any number of threads; a kernel that several meet
    is compiled once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compile")
        self._lock = Lock()
        self._compiled: dict[object, Future[object]] = {}

    @contextmanager
    def going_through(self) -> Iterator[None]:
        """What this thread does inside launches nothing: what kernels would have written is 0."""
        token = _CURRENT.set(self)
        try:
            with _Zeros():
                yield
        finally:
            _CURRENT.reset(token)

    def wait(self) -> None:
        """Until all kernels met so far are compiled.  One that cannot be is told of by the work."""
        with self._lock:
            met = list(self._compiled.values())
        for compiled in met:
            with suppress(CancelledError):
                compiled.exception()

    def close(self) -> None:
        """No more; what is being compiled ends first."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._compiled.clear()  # an error holds on to what was on the device

    def meet(self, kernel: Any, *arguments: object, **constants: object) -> None:  # noqa: ANN401
        """Compile a kernel for the like of these arguments.

        As everywhere here, constants and options of the launch are the named ones.
        """
        key = (id(kernel), tuple(map(_like, arguments)), tuple(constants.items()))
        with self._lock:
            if key in self._compiled:
                return
            # No thread of a grid of 0 begins, but all is made ready that a launch needs.
            launch = partial(kernel[(0,)], *map(_small, arguments), **constants)
            self._compiled[key] = self._pool.submit(launch)


_CURRENT: ContextVar[Rehearsal | None] = ContextVar("_CURRENT", default=None)


def rehearsing() -> bool:
    """Whether this thread is going through its work without launches."""
    return _CURRENT.get() is not None


class Launchable:
    """Makes a Triton kernel one that a rehearsal compiles only; launched as ever."""

    def __init__(self, kernel: Any) -> None:  # noqa: ANN401
        self._kernel = kernel

    def __getitem__(self, grid: object) -> Any:  # noqa: ANN401
        rehearsal = _CURRENT.get()
        if rehearsal is None:
            return self._kernel[grid]
        return partial(rehearsal.meet, self._kernel)


class _Zeros(TorchFunctionMode):
    """Memory that kernels are to fill begins as 0: any numbers could stop the work."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _EMPTY:
            found.zero_()
        return found


def _like(value: object) -> object:
    """Equal for arguments that Triton has the same code for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNED == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % _ALIGNED == 0, value.bit_length() > 31
    return type(value) if isinstance(value, float) else value


def _small(value: object) -> object:
    """A stand-in that Triton has the same code for, which holds no large tensor's memory."""
    if not isinstance(value, Tensor):
        return value
    few = value.new_empty(_ALIGNED)
    return few if value.data_ptr() % _ALIGNED == 0 else few[1:]
