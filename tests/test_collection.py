"""Pauses of the search for garbage end, and what was made in them can be garbage later."""

import gc
import subprocess
import sys
import weakref

from pipeline.collection import collection_paused, set_aside

AS_312 = """
import gc, weakref
gc.freeze()  # Python 3.12 begins with objects set aside
from pipeline.collection import collection_paused
class Loop: pass
with collection_paused():
    loop = Loop()
    loop.own = loop
    known = weakref.ref(loop)
del loop
gc.collect()
print(known() is None)
"""


class Loop:
    """Garbage that only a search finds."""

    def __init__(self):
        self.own = self


def test_what_was_there_can_be_garbage_later():
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            loop = Loop()
        assert not gc.isenabled()
    assert gc.isenabled()
    known = weakref.ref(loop)
    del loop
    gc.collect()
    assert known() is None


def test_also_where_python_has_set_objects_aside_itself():
    """Or a model that was captured in a pause would take its GPU memory for ever."""
    done = subprocess.run(
        [sys.executable, "-c", AS_312], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True"


def test_a_pause_lets_what_is_set_aside_be():
    with set_aside():
        held = gc.get_freeze_count()
        with collection_paused():
            pass
        assert gc.get_freeze_count() >= held > 0
    assert gc.isenabled()
