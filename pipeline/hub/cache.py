"""The Hub's local cache is read, never written to: other programs rely on what lies there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from pipeline.errors import OutputError

KINDS = ("models--", "datasets--", "spaces--")


def in_hub_cache(path: Path) -> bool:
    """Whether a path, links followed, lies in this user's cache or in another's, by its layout."""
    real = path.absolute().resolve()
    if real.is_relative_to(Path(constants.HF_HUB_CACHE).expanduser().resolve()):
        return True
    places = (real, *real.parents)
    return any(p.name.startswith(KINDS) and (p / "snapshots").is_dir() for p in places)


def refuse_hub_cache(path: Path) -> None:
    """OutputError for a path to be written to that lies in a Hub cache."""
    if in_hub_cache(path):
        raise OutputError(
            f"{path} lies in the Hub's local cache, which is only read; choose a path outside it"
        )
