"""One new file = one new format, quantiser or architecture.

A room (`pipeline.checkpoint.formats`, `pipeline.quantize.methods`, `pipeline.models`) holds one
file per member.  Each file registers its member with the room's registry when it is imported, and
the registry imports every file of the room the first time it is asked, so that adding a member
edits no list anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Members of one room by name, found by importing the room's modules."""

    def __init__(self, package: str, kind: str) -> None:
        """`package`: dotted name of the room; `kind`: what a member is called in messages."""
        self.kind = kind
        self._package = package
        self._members: dict[str, T] = {}
        self._loading = RLock()
        self._begun = self._loaded = False

    def register(self, name: str, member: T) -> T:
        """Add a member; raises ValueError when the name is taken."""
        if name in self._members:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._members[name] = member
        return member

    def get(self, name: str) -> T | None:
        """The member of that name, or None."""
        self._load()
        return self._members.get(name)

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._members))

    def _load(self) -> None:
        if self._loaded:
            return
        with self._loading:  # threads that ask meanwhile wait for all members
            if self._begun:  # a member that asks while it is imported has those before it
                return
            self._begun = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True
