"""The Hub's client, its errors in one line each, and steps repeated until they succeed.

huggingface_hub repeats uploads of objects and some requests by itself, six times within some twenty
seconds; creating, listing and committing it tries once.  `attempt` is around all of them.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import disable_progress_bars

from pipeline import __version__
from pipeline.errors import HubError
from pipeline.secrets import redacted

# What huggingface_hub itself speaks through: httpx2 from version 2 on, httpx before.
TransportError: type[Exception] = importlib.import_module(
    "httpx2" if find_spec("httpx2") else "httpx"
).TransportError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a step is tried again, less up to a half at random; then it has failed."""
LONGEST_WAIT = 300.0
"""Seconds that the Hub may ask for (Retry-After)."""
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
"""Answers that another try may not get.  412: the branch has moved; see `upload`."""

Result = TypeVar("Result")
Announce = Callable[[str], None]


def connect() -> HfApi:
    """The client, for the Hub that HF_ENDPOINT names now, with the user's own login."""
    disable_progress_bars()  # they write over our own lines
    return HfApi(
        endpoint=os.environ.get("HF_ENDPOINT") or None,
        library_name="requant",
        library_version=__version__,
    )


def check_repo(repo: str) -> None:
    """HubError for a name that the Hub would not take."""
    try:
        validate_repo_id(repo)
        good = repo.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise HubError(
            f"{repo!r} is no name for a repository: give ORG/NAME, letters, digits, '-', '_' and"
            " '.', at most 96 of them"
        )


def require_token() -> str:
    """The token of the environment or of the Hub login; HubError without one."""
    token = get_token()
    if not token:
        raise HubError("there is no Hub token: set HF_TOKEN, or log in with `hf auth login`")
    return token


def attempt(
    what: str, step: Callable[[], Result], announce: Announce = lambda _line: None
) -> Result:
    """The result of a step that may be repeated; `what` is being done, for messages.

    Tries again, ever later, after answers and broken connections that may pass.  Raises HubError.
    """
    for wait in (*WAITS, None):
        try:
            return step()
        except (TransportError, OSError, ValueError, RuntimeError) as error:
            root = _root(error)
            if wait is None or not _passing(root):
                raise explained(what, root) from None
            seconds = _asked(root) or wait * random.uniform(0.5, 1)
            announce(f"{what}: {_short(root)}; again in {seconds:.0f} s")
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def explained(what: str, error: BaseException) -> HubError:
    """One line for an error of the client, without the token and without links."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    known = {
        LocalTokenNotFoundError: "there is no Hub token: set HF_TOKEN, or `hf auth login`",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, the Hub is not to be asked; unset it",
        GatedRepoError: "it is gated: accept its terms on the Hub, and log in (hf auth login)",
        RevisionNotFoundError: "the repository has no such revision; check its name",
        RepositoryNotFoundError: "there is no such model on the Hub, or it is private and not"
        " yours; check the name, or log in (hf auth login)",
        RemoteEntryNotFoundError: "the repository has no such file",
    }
    advice = next((line for kind, line in known.items() if isinstance(error, kind)), None)
    if advice is None and status == 401:
        advice = "the Hub refuses the token (expired, revoked?); set HF_TOKEN or log in anew"
    if advice is None and status in (402, 403):
        advice = f"the Hub refuses it ({_short(error)}); check the token's rights and the quota"
    if advice is None and _passing(error):
        advice = f"{_short(error)}; the same command goes on from here"
    if advice is None:
        advice = _short(error)
    return HubError(f"{what}: {advice}")


def _root(error: BaseException) -> BaseException:
    """What lies under the RuntimeError that the client puts around a failed upload."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _passing(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        damaged = "calculated checksum" in str(error)  # on the way; what is on disk was verified
        return error.response.status_code in TRANSIENT or damaged
    return isinstance(error, (TransportError, ConnectionError)) and not isinstance(
        error, OfflineModeIsEnabled
    )


def _asked(error: BaseException) -> float | None:
    """Seconds that the Hub asks us to wait."""
    if not isinstance(error, HfHubHTTPError):
        return None
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else None


def _short(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        text = f"{error.response.status_code} {error.server_message or ''}"
    elif isinstance(error, TransportError):
        text = f"the Hub cannot be reached: {error or type(error).__name__}"
    else:
        text = str(error) or type(error).__name__
    return re.sub(r"https?://\S+", "URL", " ".join(redacted(text).split()))[:300]
