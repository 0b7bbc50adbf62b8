"""Stage 5, only when asked for: put a finished, verified and validated model on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.checkpoint.sums import ADDED, SUMS_NAME, UNSEALED, digest_file, read_sums
from pipeline.checkpoint.writer import sweep
from pipeline.errors import CheckpointError, HubError, OutputError
from pipeline.hub.cache import refuse_hub_cache
from pipeline.hub.client import check_repo, require_token
from pipeline.hub.origin import LICENCE, card_data, origin
from pipeline.hub.upload import Target, publish_files
from pipeline.progress import size
from pipeline.recipe import Publish, Recipe
from pipeline.report.card import CARD_FILE, Wishes, validation_state, write_card
from pipeline.secrets import secrets
from pipeline.stages.context import Context, Job
from pipeline.stages.verify import verify_model

UNIT = "publish"


def jobs(context: Context) -> list[Job]:
    """One unit, if the recipe names a repository; it can be repeated, so it needs no marker."""
    if context.recipe.publish.repo is None:
        return []
    total = sum(w.elements for w in context.checkpoint.weights.values()) // 2
    # Verified with two readings, then sent; how fast the network is, nobody knows before.
    return [Job("publish", UNIT, (SUMS_NAME,), (CARD_FILE,), bytes_read=3 * total)]


def check_wanted(recipe: Recipe, source: Path) -> None:
    """HubError, before the first long job, for what would be refused after the last one."""
    wanted = recipe.publish
    if wanted.repo is None:
        raise HubError("publish.repo is not set; set it to ORG/NAME")
    check_repo(wanted.repo)
    require_token()
    _licence(wanted.license or origin(source, recipe.source.model).get("license"))


class Publication:
    """The stage; see the module's text."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def run(self, job: Job) -> None:
        """Publish the finished output."""
        publish_model(self._context.output, self._context.recipe.publish, self._context.progress)

    def close(self) -> None:
        """Nothing is held."""


def publish_model(
    model: Path,
    wanted: Publish,
    announce: Callable[[str], None],
    *,
    unvalidated: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish a directory, all at once or not at all; may be repeated at any time.

    `unvalidated`: also without a validation that passed; the card says so.  `dry_run`: everything
    but sending.  Raises CheckpointError for a directory that is damaged or not validated, HubError
    for what the Hub refuses.  Returns what is on the Hub now, or would be.
    """
    assert wanted.repo is not None
    check_repo(wanted.repo)
    if not dry_run:
        require_token()
    _check_finished(model)
    refuse_hub_cache(model)  # its card is written first
    sweep(model)
    state = validation_state(model)
    if state is not None and not unvalidated:
        raise CheckpointError(
            f"{model}: {state[0].lower()}{state[1:].rstrip('.')}; run `requant validate` first, or"
            " publish it with --unvalidated"
        )
    _refuse_secrets(model)
    announce("verifying every file")
    problems = verify_model(model)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(f"{model} does not pass `requant verify`: {problems[0]}{more}")
    if not write_card(model, Wishes(wanted.repo, wanted.license)):
        announce(f"{CARD_FILE} was edited: it is published as it is; delete it for a new one")
    _licence(card_data(model / CARD_FILE).get("license"))
    _refuse_secrets(model)
    digests = _digests(model)
    if dry_run:
        total = sum((model / name).stat().st_size for name in digests)
        announce(f"{len(digests)} files, {size(total)}; nothing was sent")
        return {"repo": wanted.repo, "dry_run": True, "files": sorted(digests), "bytes": total}
    target = Target(wanted.repo, wanted.private, wanted.revision or "main")
    return asdict(publish_files(model, digests, target, announce))


def _check_finished(model: Path) -> None:
    if not model.is_dir():
        raise CheckpointError(f"{model} is not a directory")
    if not (model / SUMS_NAME).is_file():
        raise CheckpointError(
            f"{model} has no {SUMS_NAME}: only what `requant run` or `requant shard` made can be"
            " published"
        )


def _licence(licence: object) -> None:
    if not licence:
        raise HubError(
            "the source's card names no licence: say which with --license (publish.license), such"
            " as apache-2.0"
        )
    if not isinstance(licence, str) or not LICENCE.fullmatch(licence):
        raise HubError(f"licence {licence!r} is none of the Hub's, such as apache-2.0 or other")


def _digests(model: Path) -> dict[str, str]:
    """sha256 of all that is published: what is sealed, the seal, and what may change after it."""
    digests = read_sums(model)
    for name in (SUMS_NAME, *UNSEALED, *ADDED):
        if (model / name).is_file():
            digests[name] = digest_file(model / name)
    return digests


def _refuse_secrets(model: Path) -> None:
    """A token that somebody wrote into a recipe or a card is not to be published with it."""
    known = [secret.encode() for secret in secrets()]
    for path in sorted(model.iterdir()):
        if not known or path.suffix == ".safetensors" or not path.is_file():
            continue
        data = path.read_bytes()
        if any(secret in data for secret in known):
            raise OutputError(f"{path} holds your Hub token; take it out")
