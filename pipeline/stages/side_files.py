"""The small files that travel from a source to a result unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoint.index import resolve_inside
from pipeline.checkpoint.sums import digest_file
from pipeline.checkpoint.writer import write_bytes
from pipeline.errors import OutputError

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


def digest_side_files(source: Path) -> dict[str, str]:
    """sha256 of those that exist, by name.

    Raises CheckpointError for one that is a link to elsewhere: a result would carry off a file
    of the user's.
    """
    return {name: digest_file(path) for name, path in side_files(source).items()}


def side_files(source: Path) -> dict[str, Path]:
    """Those that exist, with their real paths; CheckpointError as for `digest_side_files`."""
    return {
        name: resolve_inside(source, name)
        for name in SIDE_FILES
        if (source / name).is_symlink() or (source / name).exists()
    }


def copy_side_files(source: Path, target: Path, known: Mapping[str, str]) -> None:
    """Copy those that were there at the beginning, contents only (normal permissions).

    `known`: what `digest_side_files` found then.  Raises OutputError when the source has not got
    the same any more: a result without its tokenizer would be half a model.
    """
    for name, digest in known.items():
        data = b""
        if (source / name).is_file():
            data = resolve_inside(source, name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise OutputError(
                f"{source / name} has changed, or is gone, since {target} was begun; put the old"
                " file back, then give the same command again"
            )
        write_bytes(target / name, data)
