"""Models by their Hub id: where they are on disk, downloaded, or as headers alone.

A revision stands for the commit that it pointed to when it was first downloaded: the local cache
answers before the Hub is asked, so that a conversion that is resumed sees the same files.  What is
downloaded goes into the Hub's own cache, file by file; a file that is there is not fetched again,
and a transfer that breaks goes on where it broke.  (A process that is killed loses the files that
it was at: the client gives their parts random names.)
"""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from pipeline.checkpoint.header import MAX_HEADER_BYTES
from pipeline.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_json, read_layout
from pipeline.checkpoint.reader import LEGACY_CONFIG
from pipeline.checkpoint.sums import digest_file
from pipeline.checkpoint.untrusted import expanded
from pipeline.errors import CheckpointError, HubError, ResourceError
from pipeline.hub.client import (
    Announce,
    TransportError,
    attempt,
    check_repo,
    connect,
    explained,
)
from pipeline.hub.origin import snapshot_of

WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*",
          "NOTICE", "recipe*.yaml", "SHA256SUMS"]  # fmt: skip
UNWANTED = ["*/*"]
"""No pickles, no other formats, no folders: what is read lies at the top."""
GUESS_BYTES = 1 << 20
"""Asked for first of every shard; most headers are smaller."""
THREADS = 8


def find(model: str, revision: str | None = None) -> Path | None:
    """A model's directory, if it is on this machine: as given, or in the Hub's local cache."""
    path = expanded(model)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{model} is a directory here, which has no revision {revision}; leave it out, or"
                " give a Hub id"
            )
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the model's directory")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"model {model} does not exist")
    check_repo(model)
    try:
        cached = snapshot_download(
            model,
            revision=revision,
            local_files_only=True,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
        read_layout(Path(cached))  # a few files of it may be there, fetched by other programs
    except (OSError, CheckpointError):
        return None
    return Path(cached)


def with_headers(model: str, revision: str | None = None) -> Path:
    """A model's directory, or one with the headers of its files, read from the Hub by ranges.

    Headers are kept by commit, below HF_HOME.  Raises CheckpointError or HubError.
    """
    local = find(model, revision)
    if local is not None:
        return local
    api = connect()
    commit = _commit(api, model, revision)
    place = Path(constants.HF_HOME) / "requant" / "headers"
    folder = place / f"models--{model.replace('/', '--')}" / "snapshots" / commit
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        made = Path(temporary) / "headers"
        made.mkdir()
        attempt(f"reading the headers of {model}", lambda: _write_headers(api, model, commit, made))
        if not folder.is_dir():
            made.rename(folder)
    return folder


def download(model: str, revision: str | None, announce: Announce) -> Path:
    """A model's directory, downloaded and verified if it is not on this machine yet.

    Raises CheckpointError, HubError, ResourceError.
    """
    local = find(model, revision)
    if local is not None:
        return local
    api = connect()
    commit = _commit(api, model, revision)
    what = f"downloading {model}"
    files = {name: file for name, file in _listing(api, model, commit).items() if _is_wanted(name)}
    _check_disk(files.values())
    announce(f"{what}: {len(files)} files at commit {commit}")
    for _ in range(3):
        path = attempt(what, lambda: _snapshot(api, model, revision, commit), announce)
        damaged = [name for name, file in files.items() if not _as_listed(path / name, file)]
        if not damaged:
            return path
        for name in damaged:
            announce(f"{name} is not what the Hub lists; once more")
            (path / name).resolve().unlink()
            (path / name).unlink(missing_ok=True)
    raise HubError(f"{what}: {damaged[0]} arrives damaged again and again; try another network")


def listed_sha256(path: Path) -> str | None:
    """The sha256 that the Hub lists for a large file of its local cache, by the cache's own names.

    None for files outside the cache and for small ones.
    """
    real = path.resolve()
    cached = snapshot_of(path.parent) is not None and real.parent.name == "blobs"
    return real.name if cached and re.fullmatch(r"[0-9a-f]{64}", real.name) else None


def _commit(api: HfApi, model: str, revision: str | None) -> str:
    """The commit that a revision stands for on the Hub now."""
    what = f"{model} is no directory here, and on the Hub"
    try:
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        sha = api.model_info(model, revision=revision, timeout=seconds).sha
    except RepositoryNotFoundError as error:
        if api.repo_exists(model, repo_type="dataset"):
            raise HubError(f"{model} is a data set on the Hub, not a model") from None
        raise explained(what, error) from None
    except (HfHubHTTPError, TransportError, OSError) as error:
        if revision is not None:
            what = f"{what} at revision {revision}"
        raise explained(what, error) from None
    assert sha is not None
    return sha


def _listing(api: HfApi, model: str, commit: str) -> dict[str, RepoFile]:
    def listed() -> dict[str, RepoFile]:
        tree = api.list_repo_tree(model, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    return attempt(f"listing {model}", listed)


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(PurePosixPath(name).match(pattern) for pattern in WANTED)


def _snapshot(api: HfApi, model: str, revision: str | None, commit: str) -> Path:
    path = snapshot_download(
        model,
        revision=revision,  # by its name, so that the cache remembers what it stood for
        endpoint=api.endpoint,
        allow_patterns=WANTED,
        ignore_patterns=UNWANTED,
        max_workers=4,
    )
    if Path(path).name != commit:
        raise HubError(f"{model} has changed meanwhile; give the same command again")
    return Path(path)


def _as_listed(path: Path, file: RepoFile) -> bool:
    if file.lfs is not None:
        return digest_file(path) == file.lfs.sha256
    return git_hash(path.read_bytes()) == file.blob_id


def _check_disk(files: Iterable[RepoFile]) -> None:
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    need, free = sum(file.size for file in files), shutil.disk_usage(place).free
    if need > free:
        raise ResourceError(
            f"{place} has {free >> 20:,} MiB free, the download takes {need >> 20:,} MiB; make"
            " room, or set HF_HOME to another place"
        )


def _write_headers(api: HfApi, model: str, commit: str, folder: Path) -> None:
    """config, index and the header of every shard, as files that end where the data would begin."""
    for name in ("config.json", INDEX_NAME, LEGACY_CONFIG, "README.md"):
        data = _read(api, model, commit, name)
        if data is not None:
            (folder / name).write_bytes(data)
    shards = [SINGLE_NAME]
    if (folder / INDEX_NAME).exists():
        table = read_json(folder, INDEX_NAME).get("weight_map") or {}
        shards = sorted({str(name) for name in table.values()})
    for name in shards:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_NAME}: {name!r} is no safetensors file beside it")

    def header(name: str) -> None:
        data = _read(api, model, commit, name, GUESS_BYTES)
        if data is None:
            raise CheckpointError(
                f"{model} at {commit} holds no {name}; only models in safetensors can be read"
            )
        length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        end = 8 + min(length, MAX_HEADER_BYTES)
        if len(data) == GUESS_BYTES and end > GUESS_BYTES:
            data = _read(api, model, commit, name, end) or b""
        (folder / name).write_bytes(data[:end])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(header, shards))


def _read(api: HfApi, model: str, commit: str, name: str, end: int | None = None) -> bytes | None:
    """A file's bytes, all or up to `end`; None when there is no such file."""
    headers = build_hf_headers() | ({"Range": f"bytes=0-{end - 1}"} if end else {})
    url = hf_hub_url(model, name, revision=commit, endpoint=api.endpoint)
    response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    if response.status_code == 416:  # an empty file has no range
        return b""
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError:
        return None
    return bytes(response.content)
