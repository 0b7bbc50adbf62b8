"""Telling people: a Slack-compatible webhook, and the summary of a GitHub Actions step."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.nightly import outputs

if TYPE_CHECKING:
    from pipeline.nightly.night import Night

WEBHOOK = "REQUANT_NIGHTLY_WEBHOOK"
"""Environment variable with the webhook's URL, which is a secret: it is told to nobody."""
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
SECONDS = 20


def notify(night: Night, announce: Callable[[str], None]) -> None:
    """Tell what the environment asks for; failing to is announced and changes no exit code.

    The webhook hears of nights that differ: something fails, is fixed, flaky or watched.
    """
    url, summary = os.environ.get(WEBHOOK), os.environ.get(STEP_SUMMARY)
    if url and any(record["state"] != "ok" for record in night.records):
        trouble = _post(url, {"text": outputs.message(night)})
        if trouble:
            announce(f"the webhook of {WEBHOOK} could not be told: {trouble}")
    if summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write(outputs.markdown(night))
        except OSError as error:
            announce(f"{STEP_SUMMARY} could not be written: {error.strerror}")


def _post(url: str, body: dict[str, str]) -> str | None:
    """POST JSON; what went wrong, in words without the URL, or None."""
    try:
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        if request.type not in ("http", "https"):
            return "its URL is neither http nor https"
        with urllib.request.urlopen(request, timeout=SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"it answered HTTP {error.code}"
    except (OSError, ValueError) as error:  # ValueError: not a URL; its words would quote it
        return f"it could not be reached ({type(error).__name__})"
