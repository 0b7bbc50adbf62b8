"""The small files that travel from a source to a result unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.checkpoint.index import resolve_inside

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Known by name: nothing else of a source (scripts, pickles) is ever copied."""


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy those that exist, contents only (normal permissions); returns their names.

    Raises CheckpointError for one that is a link to elsewhere: a result would carry off a file
    of the user's.
    """
    found = side_files(source)
    for name, path in found.items():
        shutil.copyfile(path, target / name)
    return list(found)


def side_files(source: Path) -> dict[str, Path]:
    """Those that exist, with their real paths; CheckpointError as for `copy_side_files`."""
    return {
        name: resolve_inside(source, name)
        for name in SIDE_FILES
        if (source / name).is_symlink() or (source / name).exists()
    }
