"""What must never be written down: the Hub's tokens, and the address of the nightly webhook.

They come from the environment or from the Hub login's file.  Lines for people and tracebacks go
through `redacted`; files are never given any in the first place, and a recipe that holds one is
refused.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "REQUANT_NIGHTLY_WEBHOOK")
SHORTEST = 8
"""Shorter ones are no secrets, and would be found in innocent words."""
HIDDEN = "***"


def secrets() -> list[str]:
    """Every secret that this process could know of, the longest first."""
    found = {os.environ.get(name, "").strip() for name in VARIABLES}
    for path in _login_files():
        try:
            words = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            continue
        # A file of stored tokens has their names too, which are none.
        found.update(word for word in words if len(words) == 1 or len(word) > 2 * SHORTEST)
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


def redacted(text: str) -> str:
    """The text with every secret in it hidden."""
    for secret in secrets():
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(environment: dict[str, str]) -> dict[str, str]:
    """An environment for a child that needs no secret."""
    return {name: value for name, value in environment.items() if name not in VARIABLES}


def redact_tracebacks() -> None:
    """From now on, the traceback of an error that ends this process hides secrets too."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = hook


def _login_files() -> list[Path]:
    """Where `hf auth login` leaves tokens, as huggingface_hub looks for them."""
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    named = os.environ.get("HF_TOKEN_PATH") or f"{home}/token"
    stored = os.environ.get("HF_STORED_TOKENS_PATH") or f"{home}/stored_tokens"
    return [Path(os.path.expanduser(path)) for path in (named, stored)]  # noqa: PTH111
