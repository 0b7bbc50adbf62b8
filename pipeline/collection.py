"""Python's search for garbage, kept away from millions of small objects that are none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No search while many objects are made, none of them garbage.

    It would take four fifths of the time that 440,000 header entries need.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
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
