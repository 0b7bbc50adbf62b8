"""What a verification finds; unlike an error it does not end the search."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a directory."""

    file: str
    what: str
    tensor: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return f"{where}: {self.what}"
