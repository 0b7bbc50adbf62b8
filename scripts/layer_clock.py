"""Where a conversion's time goes: wall-clock time of named functions, each without its callees'.

Functions are wrapped where their callers look them up, so the package itself knows nothing of it.
On a GPU every wrapped call waits for the device before and after, which makes the parts add up and
the whole slower than it is: totals are to be taken from a run without this.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch


class LayerClock:
    """Seconds and calls by label, for the main thread and for all others."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """`places`: "module:attribute[.attribute]" -> label."""
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self._inner = threading.local()
        self._main = threading.main_thread()
        for place, label in places.items():
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, self._wrapped(getattr(owner, name), label))

    def _wrapped(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:  # noqa: ANN401
            main = threading.current_thread() is self._main
            key = (label, "main" if main else "beside")
            stack: list[float] = self._inner.__dict__.setdefault("stack", [])
            _wait(main)
            stack.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                _wait(main)
                whole = time.perf_counter() - started
                self.seconds[key] += whole - stack.pop()
                self.calls[key] += 1
                if stack:
                    stack[-1] += whole

        return timed

    def table(self, layers: int) -> str:
        """Lines of "label thread seconds-a-layer calls-a-layer", longest first."""
        lines = []
        for key in sorted(self.seconds, key=lambda k: (k[1] != "main", -self.seconds[k])):
            label, thread = key
            seconds, calls = self.seconds[key] / layers, self.calls[key] / layers
            lines.append(f"  {label:34} {thread:7} {seconds:8.3f} s {calls:8.1f} calls a layer")
        return "\n".join(lines)


def _wait(main: bool) -> None:
    if main and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class HostPeak:
    """Largest anonymous memory of this process while in a `with`, sampled every 20 ms.

    Pages of files and of memory file systems are not counted.  Pinned buffers are counted by
    torch's own allocator, since the driver may map them in ways that RssAnon does not show.
    """

    def __init__(self) -> None:
        self.anonymous = 0
        self.free_at_least = psutil.virtual_memory().available
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> HostPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
                found = {k: v for k, _, v in (line.partition(":") for line in status)}
            anonymous = int(found.get("RssAnon", found["VmRSS"]).split()[0]) * 1024
            self.anonymous = max(self.anonymous, anonymous)
            self.free_at_least = min(self.free_at_least, psutil.virtual_memory().available)

    @property
    def pinned(self) -> int:
        """Largest amount of pinned memory that torch held so far."""
        if not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
