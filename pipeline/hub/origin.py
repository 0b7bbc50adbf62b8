"""Where a model directory came from and under which licence, as a card of the result says it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a source's card that hold for what is made of it."""
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
"""How the Hub spells licences: apache-2.0, llama3.1, other."""


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
    found |= {key: card[key] for key in KEPT if card.get(key)}
    if not isinstance(found.get("license"), str):
        found.pop("license", None)
    return found


def card_data(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is none that can be read."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        data: dict[str, Any] = card.data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    return data
