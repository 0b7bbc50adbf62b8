"""Members are found by looking, by however many threads."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from pipeline.registry import Registry

MEMBER = """
from room import REGISTRY, begun, asked
begun.set()
assert asked.wait(60)
REGISTRY.register("late", 1)
"""


def test_a_thread_that_asks_while_another_loads_finds_all_members(tmp_path, monkeypatch):
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").touch()
    (room / "late.py").write_text(MEMBER)
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[int] = Registry("room", "member")
    package = importlib.import_module("room")
    package.REGISTRY, package.begun, package.asked = registry, Event(), Event()

    def second() -> int:
        assert package.begun.wait(60)
        package.asked.set()
        return registry["late"]

    try:
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(lambda: registry["late"]), pool.submit(second)]
            assert [future.result(60) for future in found] == [1, 1]
    finally:
        for name in ("room", "room.late"):
            sys.modules.pop(name, None)
