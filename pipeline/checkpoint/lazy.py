"""Parts of stored weights that are read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from pipeline.checkpoint.files import Gathered, TensorFiles
from pipeline.checkpoint.stored import TensorEntry


class LazyParts(Mapping[str, Tensor]):
    """Stacked parts of weights laid out alike, read when asked for: most checks need few."""

    def __init__(
        self, stored: Sequence[Mapping[str, TensorEntry]], files: TensorFiles, known: Gathered
    ) -> None:
        """`stored`: each weight's parts; `known`: what has been read of `files` already."""
        self._stored = stored
        self._files = files
        self._known = known
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, part: str) -> Tensor:
        if part not in self._stored[0]:
            raise KeyError(part)
        if part not in self._read:
            entries = [parts[part] for parts in self._stored]
            known = self._known
            if any(entry.name not in known.places for entry in entries):
                known = self._files.gather(entries)
            self._read[part] = known.stack(entries)
        return self._read[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored[0])

    def __len__(self) -> int:
        return len(self._stored[0])
