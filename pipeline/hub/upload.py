"""A model goes to the Hub shard by shard and becomes visible at once.

Large files are sent first, one after another, as objects that no commit names yet; the Hub tells
which of them it has, so that a publication that was stopped sends no finished one again and needs
no notes of its own.  Then one commit names them all.  Afterwards the list of files that the Hub
gives for this commit is compared with what is on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
)
from huggingface_hub.errors import (
    BadRequestError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from pipeline.errors import HubError
from pipeline.hub.client import Announce, attempt, connect, explained

OURS = "conversion.json"
"""A repository with this file holds a model that was published from here."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""What a branch is never called."""
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".index.json")


@dataclass(frozen=True)
class Target:
    """Where a model goes."""

    repo: str
    private: bool = False
    revision: str = "main"
    """A branch; made where there is none."""


@dataclass(frozen=True)
class Published:
    """What is on the Hub now."""

    repo: str
    revision: str
    commit: str
    url: str
    files: int
    bytes: int
    new: bool
    """False: all of it had been there already."""


def publish_files(
    folder: Path, digests: Mapping[str, str], target: Target, announce: Announce
) -> Published:
    """Make a branch of a repository hold these files of `folder`, all at once.

    `digests`: the files, with the sha256 that each has been verified to have.  May be repeated at
    any time.  Raises HubError.
    """
    api = connect()
    if constants.REPOCARD_NAME in digests:
        _check_card(api, folder / constants.REPOCARD_NAME, announce)
    head = _open_branch(api, target, announce)
    sizes = {name: (folder / name).stat().st_size for name in digests}
    before = _files(api, target.repo, head, announce)
    new = bool(differences(folder, digests, before))
    commit = head
    if new:
        _refuse_others(target, before)
        additions = _send(api, folder, digests, target, announce)
        stale = [name for name in before if name.endswith(WEIGHTS) and name not in digests]
        announce("making all of it visible")
        commit = _commit(api, folder, digests, target, head, additions, stale, announce)
        after = _files(api, target.repo, commit, announce)
        wrong = differences(folder, digests, after)
        if wrong:
            raise HubError(f"{target.repo} at {commit} is not what was sent: {wrong[0]}")
    return Published(
        target.repo,
        target.revision,
        commit,
        f"{api.endpoint}/{target.repo}/tree/{target.revision}",
        len(digests),
        sum(sizes.values()),
        new,
    )


def differences(
    folder: Path, digests: Mapping[str, str], remote: Mapping[str, RepoFile]
) -> list[str]:
    """What the Hub holds otherwise than `folder`, in words: sha256 of large files, git's of others.

    Files of the Hub that are none of ours (.gitattributes, pictures) do not count.
    """
    found = []
    for name, digest in digests.items():
        file = remote.get(name)
        if file is None:
            found.append(f"{name} is not there")
        elif file.lfs is not None and file.lfs.sha256 != digest:
            found.append(f"{name} has the sha256 {file.lfs.sha256}, not {digest}")
        elif file.lfs is None and file.blob_id != git_hash((folder / name).read_bytes()):
            found.append(f"{name} has another content")
    stale = [n for n in remote if n.endswith(".safetensors") and n not in digests]
    return found + [f"{name} belongs to another model" for name in stale]


def _open_branch(api: HfApi, target: Target, announce: Announce) -> str:
    """The commit that the branch is at; repository and branch are made where they are missing."""
    what = f"opening {target.repo}"
    existing = attempt(what, lambda: _existing(api, target.repo), announce)
    if existing is None:
        other = attempt(what, lambda: _other_kind(api, target.repo), announce)
        if other is not None:
            raise HubError(f"{target.repo} is a {other} on the Hub; choose another name")
        private = target.private
        attempt(what, lambda: api.create_repo(target.repo, private=private, exist_ok=True),
                announce)  # fmt: skip
    elif target.private and not existing:
        raise HubError(
            f"{target.repo} exists and is public: make it private in its settings, or leave out"
            " --private"
        )
    return attempt(what, lambda: _head(api, target), announce)


def _existing(api: HfApi, repo: str) -> bool | None:
    """Whether the model repository is private; None: there is none."""
    try:
        return bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        return None


def _other_kind(api: HfApi, repo: str) -> str | None:
    for kind in ("dataset", "space"):
        try:
            api.repo_info(repo, repo_type=kind)
            return "data set" if kind == "dataset" else kind
        except RepositoryNotFoundError:
            continue
    return None


def _head(api: HfApi, target: Target) -> str:
    branch = target.revision
    try:
        sha = api.model_info(target.repo, revision=branch).sha
    except RevisionNotFoundError:
        if COMMIT.fullmatch(branch):
            raise HubError(
                f"{target.repo} has no revision {branch}, which is no name for a branch; give one"
            ) from None
        api.create_branch(target.repo, branch=branch, exist_ok=True)
        sha = api.model_info(target.repo, revision=branch).sha
    if sha is None or branch == sha:
        raise HubError(f"revision {branch} is a commit; give the name of a branch")
    return sha


def _files(api: HfApi, repo: str, revision: str, announce: Announce) -> dict[str, RepoFile]:
    def listed() -> dict[str, RepoFile]:
        tree = api.list_repo_tree(repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    return attempt(f"listing {repo}", listed, announce)


def _refuse_others(target: Target, before: Mapping[str, RepoFile]) -> None:
    """A model that was not published from here is never written over."""
    weights = [name for name in before if name.endswith(WEIGHTS)]
    if weights and OURS not in before:
        raise HubError(
            f"{target.repo} holds a model that requant did not publish ({weights[0]}); choose"
            " another name, or another --revision"
        )


def _check_card(api: HfApi, card: Path, announce: Announce) -> None:
    """HubError, before a repository is made or a byte sent, for metadata that the Hub refuses.

    The client asks only when it commits.
    """
    what = "checking the card"

    def step() -> None:
        response = get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            headers=build_hf_headers(),
            json={"repoType": "model", "content": card.read_text(encoding="utf-8")},
        )
        try:
            hf_raise_for_status(response)
        except BadRequestError as error:
            refused = explained(what, error)
            raise HubError(f"{refused}; mend {card}, or give another --license") from None

    attempt(what, step, announce)


def _send(
    api: HfApi,
    folder: Path,
    digests: Mapping[str, str],
    target: Target,
    announce: Announce,
) -> list[CommitOperationAdd]:
    """Bring every large file to the Hub's storage, where it is not there already."""
    additions = {}
    for name, digest in digests.items():
        additions[name] = CommitOperationAdd(name, str(folder / name))
        # Known from SHA256SUMS and verified: the client need not read the file for it once more.
        additions[name].upload_info.sha256 = bytes.fromhex(digest)
    shards = [name for name in digests if name.endswith(".safetensors")]
    rest = [addition for name, addition in additions.items() if name not in shards]

    def send(some: list[CommitOperationAdd]) -> None:
        api.preupload_lfs_files(
            target.repo, some, revision=target.revision, num_threads=1, free_memory=False
        )

    attempt("sending the small files", lambda: send(rest), announce)
    for number, name in enumerate(shards, 1):
        announce(f"sending {name}, {number} of {len(shards)}")
        one = additions[name]
        attempt(f"sending {name}", lambda one=one: send([one]), announce)  # type: ignore[misc]
    return list(additions.values())


def _commit(
    api: HfApi,
    folder: Path,
    digests: Mapping[str, str],
    target: Target,
    head: str,
    additions: list[CommitOperationAdd],
    stale: list[str],
    announce: Announce,
) -> str:
    """One commit on top of `head`, and never a second one when an answer was lost."""
    deletions = [CommitOperationDelete(name) for name in stale]

    def step() -> str:
        now = _head(api, target)
        if now != head:  # our own commit, whose answer was lost, or somebody else's
            there = _files(api, target.repo, now, announce)
            if not differences(folder, digests, there):
                return now
            raise HubError(
                f"{target.repo} was changed by someone else meanwhile; give the same command again"
            )
        info = api.create_commit(
            target.repo,
            [*additions, *deletions],
            commit_message="Publish a quantised model",
            revision=target.revision,
            parent_commit=head,
        )
        return str(info.oid)

    return attempt(f"committing to {target.repo}", step, announce)
