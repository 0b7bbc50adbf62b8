"""Python's search for garbage, kept away from millions of small objects that are none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_pauses: list[bool] = []
"""Of each pause that is not over: whether searches were on when it began."""
_AT_START = gc.get_freeze_count()
"""Objects that Python itself has set aside, some hundreds in 3.12."""


@contextmanager
def collection_paused() -> Iterator[None]:
    """No search while many objects are made, none of them garbage.

    It would take four fifths of the time that 440,000 header entries need.  Afterwards they count
    as old, so that the next search does not begin with them.
    """
    with _lock:
        _pauses.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        _resume()


def _resume() -> None:
    """The end of a pause; of several, in threads side by side, the last to end counts."""
    with _lock:
        enabled = _pauses[0]
        _pauses.pop()
        if enabled and not _pauses:
            if gc.get_freeze_count() <= _AT_START:  # else what is there now would never be garbage
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()


@contextmanager
def set_aside() -> Iterator[None]:
    """Searches leave out what is there now: one through an open model of full size takes a second,
    in which no thread runs Python."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
