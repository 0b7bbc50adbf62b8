"""Faults on demand: chosen requests go wrong in chosen ways, or random ones in random ways."""

import random
import re
import threading
from dataclasses import dataclass, field

KINDS = ("status", "cut", "lost", "slow", "flip", "expire")
"""
status   the request is refused with `status`
cut      the connection ends in the middle of the body that is sent (GET: received)
lost     the request is carried out, but its answer never arrives
slow     the answer takes `seconds` longer
flip     one bit of the body is not what was sent (GET: received)
expire   the token of this request is refused from now on
"""


@dataclass
class Fault:
    """One fault; counts down as it strikes."""

    kind: str
    on: str = ""
    """Regular expression that "METHOD path" must contain."""
    after: int = 0
    """Matching requests that are left alone first."""
    times: int = 1
    status: int = 503
    message: str = "an injected fault"
    code: str | None = None
    """X-Error-Code."""
    retry_after: int | None = None
    seconds: float = 0.2
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        self.pattern = re.compile(self.on)


class Faults:
    """All that is yet to go wrong with one server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[Fault] = []
        self._random: random.Random | None = None
        self._rate = 0.0
        self._kinds: tuple[str, ...] = ()
        self.struck: list[tuple[str, str]] = []
        """Kind and request of every fault so far."""

    def add(self, kind: str, **options: object) -> Fault:
        """Plan a fault; see `Fault` for the options."""
        fault = Fault(kind, **options)  # type: ignore[arg-type]
        with self._lock:
            self._planned.append(fault)
        return fault

    def at_random(self, seed: int, rate: float, kinds: tuple[str, ...]) -> None:
        """From now on let this share of all requests go wrong, in one of these ways."""
        with self._lock:
            self._random, self._rate, self._kinds = random.Random(seed), rate, kinds

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._planned, self._random = [], None

    def strike(self, request: str) -> Fault | None:
        """The fault that befalls "METHOD path" now."""
        with self._lock:
            fault = self._next(request)
            if fault is not None:
                self.struck.append((fault.kind, request))
            return fault

    def _next(self, request: str) -> Fault | None:
        for fault in self._planned:
            if not fault.times or not fault.pattern.search(request):
                continue
            if fault.after:
                fault.after -= 1
                continue
            fault.times -= 1
            return fault
        if self._random is None or self._random.random() >= self._rate:
            return None
        status = self._random.choice([429, 500, 503])
        kind = self._random.choice(self._kinds)
        if kind == "flip" and not request.startswith("PUT"):
            kind = "cut"  # the storage checks what it gets; elsewhere TLS keeps bits as they are
        return Fault(kind, status=status, seconds=0.05)
