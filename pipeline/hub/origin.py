"""Where a model directory came from and under which licence, as a card of the result says it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.index import resolve_inside
from pipeline.errors import CheckpointError
from pipeline.plain_yaml import MAX_BYTES, parse_yaml

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a source's card that hold for what is made of it."""
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
"""How the Hub spells licences: apache-2.0, llama3.1, other."""

LONGEST = 300
MOST_LANGUAGES = 200
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
"""A card's metadata, between its first two lines of dashes."""


def snapshot_of(directory: Path) -> tuple[str, str] | None:
    """Hub id and commit, for a directory in the Hub's local cache."""
    parts = directory.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return parts[0].removeprefix("models--").replace("--", "/"), parts[2]


def origin(directory: Path, named: str) -> dict[str, Any]:
    """Hub id, commit and licence of a source; `named`: what the recipe calls it.

    Keys that are not known are left out.
    """
    found: dict[str, Any] = {"named": named}
    snapshot = snapshot_of(directory)
    if snapshot is not None:
        found |= {"model": snapshot[0], "commit": snapshot[1]}
    card = card_data(directory / "README.md")
    found |= {key: card[key] for key in KEPT if _is_text(card.get(key))}
    language = card.get("language")
    if isinstance(language, list) and language and all(map(_is_text, language[:MOST_LANGUAGES])):
        found["language"] = language[:MOST_LANGUAGES]
    return found


def _is_text(value: object) -> bool:
    """Whether it is a word or a line, as a card's metadata hold: a stranger wrote them."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


def card_data(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is none that can be read."""
    try:
        with resolve_inside(path.parent, path.name).open(encoding="utf-8") as stream:
            match = _FRONT.match(stream.read(MAX_BYTES))
        data = parse_yaml(match[1]) if match else {}
    except (OSError, CheckpointError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}
