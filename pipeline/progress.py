"""Progress of long work: a bar on a terminal, plain timed lines elsewhere.

The remaining time is a measured rate times the work left, in the plan's own units of work.  Until
two units are done (the first pays for start-up) the rate is that of the unit under way, once a good
part of it is done; before that it says "warming up" rather than guess.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

SILENCE_SECONDS = 30.0
"""Off a terminal, at most one line of detail in that time."""

SETTLED = 0.25
"""Part of a unit after which its own rate is believed."""


class Reporter:
    """Tells a person how far a list of jobs has come; use as a context manager."""

    def __init__(self, total: float, quiet: bool = False) -> None:
        """`total`: the plan's estimate of all work, in its own units (seconds, roughly)."""
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._total = max(total, 1e-9)
        self._done = 0.0
        self._timed: list[tuple[float, float]] = []
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._title = ""
        self._work = self._share = 0.0
        self._begun = self._started

    def __enter__(self) -> Reporter:
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._total, eta="warming up")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, title: str, work: float = 0.0) -> None:
        """A job of that much work begins; off a terminal the first of a stage is told at once."""
        self._work, self._share, self._begun = work, 0.0, time.monotonic()
        stage, self._title = self._title.partition(":")[0], title
        if self._bar is not None:
            self._bar.update(self._task, description=title)
        elif title.partition(":")[0] != stage:
            self._line(title)
        else:
            self.detail(title)

    def detail(self, message: str) -> None:
        """What goes on inside the job; may be called often."""
        if self._bar is not None:
            self._bar.update(self._task, description=message)
        elif time.monotonic() - self._last_line >= SILENCE_SECONDS:
            self._line(f"{message}; {self.remaining()}")

    def within(self, share: float) -> None:
        """How much of the job is done, from 0 to 1."""
        self._share = share

    def finish(self, work: float, seconds: float) -> None:
        """A job of that much work took that long."""
        self._done += work
        self._work = self._share = 0.0
        self._timed.append((work, seconds))
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, eta=self.remaining())

    def skip(self, work: float) -> None:
        """A job that an earlier run has done."""
        self._done += work
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def remaining(self) -> str:
        """The remaining time in words."""
        done = self._done
        if len(self._timed) < 2:
            work = self._share * self._work if self._share >= SETTLED else 0.0
            seconds = time.monotonic() - self._begun
            done += work
        else:
            work = sum(w for w, _ in self._timed[1:])
            seconds = sum(s for _, s in self._timed[1:])
        if work <= 0:
            return "warming up"
        return f"{duration(max(self._total - done, 0) * seconds / work)} left"

    def _line(self, message: str) -> None:
        self._last_line = time.monotonic()
        if not self._quiet:
            elapsed = duration(time.monotonic() - self._started)
            print(f"[{elapsed:>7}] {message}", file=sys.stderr, flush=True)


def announce_rarely(announce: Callable[[str], None]) -> Callable[[str], None]:
    """Pass on a message at most every SILENCE_SECONDS."""
    last = time.monotonic()

    def pass_on(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SILENCE_SECONDS:
            last = time.monotonic()
            announce(message)

    return pass_on


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
