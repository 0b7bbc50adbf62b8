"""Seals inside files that SHA256SUMS leaves out, because they may change after it is written.

JSON files carry the sha256 of their own canonical form under `digest`; texts (the card, the page)
end with a comment that holds the sha256 of what stands above it.  conversion.json also holds the
digests of the recipes beside it.  So every file of a finished directory is covered by something.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.index import read_json, resolve_inside
from pipeline.checkpoint.problem import Problem
from pipeline.errors import CheckpointError

CONVERSION = "conversion.json"
SEALED_JSON = (CONVERSION, "report.json")
PAGE, CARD = "report.html", "README.md"
RECIPES = ("recipe.yaml", "recipe.resolved.yaml")

_SEAL = "<!-- requant: sha256 of what stands above: {} -->\n"
_SEALED = re.compile(r"<!-- requant: sha256 of what stands above: ([0-9a-f]{64}) -->\n\Z")


def with_digest(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the sha256 of its own canonical JSON under `digest`."""
    plain = {k: v for k, v in table.items() if k != "digest"}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    return {**plain, "digest": hashlib.sha256(canonical).hexdigest()}


def json_bytes(table: Mapping[str, Any]) -> bytes:
    """A table as files hold it: indented, keys in the order given; ValueError for NaN and Inf."""
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def sealed(body: str) -> str:
    """A text with its seal below."""
    return body + _SEAL.format(hashlib.sha256(body.encode()).hexdigest())


def is_sealed(text: str) -> bool:
    """Whether a text ends with a seal that fits what stands above it."""
    seal = _SEALED.search(text)
    body = text[: seal.start()] if seal else ""
    return seal is not None and seal[1] == hashlib.sha256(body.encode()).hexdigest()


def recipe_digests(directory: Path) -> dict[str, str]:
    """sha256 of the recipes in a directory, for its conversion.json."""
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in RECIPES
        if (directory / name).is_file()
    }


def seal_problems(directory: Path) -> list[Problem]:
    """Files with a seal of their own that have changed since they were made.

    A card is not among them: it may be edited (see `edited_card`).
    """
    found = []
    for name in SEALED_JSON:
        if (directory / name).exists():
            try:
                found += _check_json(directory, name)
            except CheckpointError as error:
                found.append(Problem(name, str(error)))
    if (directory / PAGE).exists() and not _is_sealed_file(directory, PAGE):
        found.append(Problem(PAGE, "not as it was made; make it again with `requant report`"))
    return found


def edited_card(directory: Path) -> str | None:
    """A remark for a card of ours that is not as it was made: edited, which is fine, or damaged."""
    ours = (directory / CONVERSION).exists() and (directory / CARD).exists()
    if not ours or _is_sealed_file(directory, CARD):
        return None
    return f"{CARD}: not as it was made; edited, or damaged"


def _check_json(directory: Path, name: str) -> list[Problem]:
    table = read_json(directory, name)
    # The digest is of the values; the bytes must be the one way in which they are written.
    data = resolve_inside(directory, name).read_bytes()
    try:
        same = with_digest(table) == table and json_bytes(table) == data
    except ValueError:
        same = False
    if not same:
        return [Problem(name, "has changed since it was made: its own digest does not fit")]
    if name != CONVERSION:
        return []
    found = []
    recipes = table.get("recipes")
    for recipe, digest in (recipes if isinstance(recipes, dict) else {}).items():
        if recipe in RECIPES and not _has_digest(directory, recipe, digest):
            found.append(Problem(recipe, f"its SHA-256 is not the one in {CONVERSION}"))
    return found


def _has_digest(directory: Path, name: str, digest: object) -> bool:
    data = resolve_inside(directory, name).read_bytes()
    return hashlib.sha256(data).hexdigest() == digest


def _is_sealed_file(directory: Path, name: str) -> bool:
    try:
        return is_sealed(resolve_inside(directory, name).read_bytes().decode("utf-8"))
    except (CheckpointError, OSError, UnicodeDecodeError):
        return False
