"""What the Hub holds: repositories with their histories, large files, and who may touch them."""

import base64
import binascii
import fnmatch
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.parquet", "*.arrow", "*.gz", "*.zip", "*.model")
ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS).encode()
REGULAR_BYTES = 10 << 20
"""Files above this size are never regular ones."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,94}[A-Za-z0-9]|[A-Za-z0-9]")
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "psfl", "postgresql",
            "llama3.1", "gemma", "unknown", "other")  # fmt: skip
"""Those of the Hub's list that the tests use."""


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, and whether they are kept as a large file."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        return f"{text}size {len(self.data)}\n".encode()

    @property
    def git_oid(self) -> str:
        return git_hash(self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A state of a branch, once and for all."""

    oid: str
    parent: str | None
    title: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    """One repository."""

    id: str
    type: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256, committed or not."""
    gated: bool = False

    def commit(self, branch: str, title: str, tree: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        seed = f"{self.id} {len(self.commits)} {parent} {title}".encode()
        made = Commit(hashlib.sha1(seed).hexdigest(), parent, title, dict(tree))
        self.commits[made.oid] = made
        self.branches[branch] = made.oid
        return made

    def resolve(self, revision: str) -> Commit:
        """By branch or commit."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def head(self, branch: str = "main") -> dict[str, Blob]:
        """The files of a branch as they are now."""
        return self.resolve(branch).tree


@dataclass
class Token:
    """Who a token is, and what it allows."""

    user: str
    orgs: tuple[str, ...] = ()
    write: bool = True
    expired: bool = False


class Store:
    """All repositories and tokens; one lock around every change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, Token] = {}
        self.quota: int | None = None
        """Bytes that a repository may hold."""

    def token(self, secret: str, user: str, orgs: tuple[str, ...] = (), write: bool = True) -> None:
        """Let this token act as `user`, a member of `orgs`."""
        self.tokens[secret] = Token(user, orgs, write)

    def who(self, secret: str | None) -> Token | None:
        """The owner of a token; Refusal for one that is unknown or expired."""
        if secret is None:
            return None
        token = self.tokens.get(secret)
        if token is None or token.expired:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def may_write(self, token: Token | None, namespace: str) -> None:
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if not token.write or namespace not in (token.user, *token.orgs):
            raise Refusal(
                403,
                f'You don\'t have the rights to create a model under the namespace "{namespace}"',
            )

    def find(self, kind: str, repo_id: str, token: Token | None) -> Repo:
        """A repository that this token may read."""
        repo = self.repos.get((kind, repo_id))
        hidden = repo is not None and repo.private and not _member(token, repo)
        if repo is None or hidden:
            if token is None:  # the real one does not tell a missing from a private repository
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if repo.gated and not _member(token, repo):
            raise Refusal(403, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    def create(self, kind: str, repo_id: str, private: bool, token: Token | None) -> Repo:
        """A new repository with its first commit, as the Hub makes it."""
        namespace, _, name = repo_id.partition("/")
        if not NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
            raise Refusal(400, f"Invalid repo name: {name}")
        self.may_write(token, namespace)
        if (kind, repo_id) in self.repos:
            raise Refusal(409, f"You already created this {kind} repo")
        repo = self.repos[kind, repo_id] = Repo(repo_id, kind, private)
        repo.commit("main", "initial commit", {".gitattributes": Blob(ATTRIBUTES, False)})
        return repo

    def seed(self, repo_id: str, files: dict[str, bytes], *, kind: str = "model",
             private: bool = False, branch: str = "main") -> str:  # fmt: skip
        """A repository with these files, without the protocol; returns the commit."""
        with self.lock:
            repo = self.repos.setdefault((kind, repo_id), Repo(repo_id, kind, private))
            tree = {
                name: Blob(data, upload_mode(name, data[:512], len(data)) == "lfs")
                for name, data in {".gitattributes": ATTRIBUTES, **files}.items()
            }
            repo.objects |= {blob.sha256: blob.data for blob in tree.values() if blob.lfs}
            return repo.commit(branch, "seeded", tree).oid

    def put(self, repo: Repo, oid: str, size: int, data: bytes) -> None:
        """Keep a large file, if it is what it is said to be."""
        if len(data) != size:
            raise Refusal(400, f"the object has {len(data)} bytes, {size} were announced")
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "The SHA256 you specified did not match the calculated checksum.")
        with self.lock:
            repo.objects[oid] = data

    def check_quota(self, repo: Repo, more: int) -> None:
        held = sum(map(len, repo.objects.values()))
        if self.quota is not None and held + more > self.quota:
            raise Refusal(403, "Private repository storage limit reached, please upgrade your plan")

    def change(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """Apply the lines of a commit request all at once, or refuse all of them."""
        with self.lock:
            if branch not in repo.branches:
                known = branch in repo.commits
                raise Refusal(
                    403 if known else 404,
                    f"Invalid rev id: {branch}",
                    None if known else "RevisionNotFound",
                )
            if not lines or lines[0].get("key") != "header" or not lines[0]["value"]["summary"]:
                raise Refusal(400, "a commit begins with a header that has a summary")
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != repo.branches[branch]:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo.head(branch))
            for line in lines[1:]:
                _apply(repo, tree, line["key"], line["value"])
            if "README.md" in tree:
                errors = card_errors(tree["README.md"].data.decode())
                if errors:
                    raise Refusal(400, "; ".join(errors))
            return repo.commit(branch, lines[0]["value"]["summary"], tree)


def _member(token: Token | None, repo: Repo) -> bool:
    return token is not None and repo.id.partition("/")[0] in (token.user, *token.orgs)


def _apply(repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if path.startswith("/") or ".." in path.split("/") or ".git" in path.split("/"):
        raise Refusal(400, f"invalid path {path}")
    if key == "deletedFile":
        if path not in tree:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        del tree[path]
    elif key == "file":
        try:
            data = base64.b64decode(value["content"], validate=True)
        except binascii.Error:
            raise Refusal(400, f"{path}: the content is not base64") from None
        if data and upload_mode(path, data[:512], len(data)) == "lfs":
            raise Refusal(400, f"{path} must be committed as a large file")
        tree[path] = Blob(data, False)
    elif key == "lfsFile":
        data = repo.objects.get(value["oid"])
        if value.get("algo") != "sha256" or data is None:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        if value.get("size") is not None and value["size"] != len(data):
            raise Refusal(400, f"{path}: the size is not that of the object")
        tree[path] = Blob(data, True)
    else:
        raise Refusal(400, f"unknown operation {key}")


def upload_mode(path: str, sample: bytes, size: int) -> str:
    """How the Hub wants a file."""
    matches = any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)
    return "lfs" if matches or size > REGULAR_BYTES or b"\0" in sample else "regular"


def git_hash(data: bytes) -> str:
    """The name git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_errors(content: str) -> list[str]:
    """What the Hub's check of a card's metadata would refuse."""
    match = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return []  # the real one only warns
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is not a table"]
    return [*_field_errors(data), *_index_errors(data.get("model-index", []))]


def _field_errors(data: dict[str, Any]) -> Iterator[str]:
    if data.get("license") not in (None, *LICENSES):
        yield f'"license" must be one of {", ".join(LICENSES)}'
    for key in ("base_model", "datasets"):
        named = data.get(key, [])
        for name in [named] if isinstance(named, str) else named:
            if not isinstance(name, str) or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
                yield f'"{key}" {name!r} is not the name of a repository'
    if data.get("base_model_relation") not in (None, "finetune", "adapter", "merge", "quantized"):
        yield '"base_model_relation" is unknown'
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        yield '"tags" must be text'


def _index_errors(models: list[dict[str, Any]]) -> Iterator[str]:
    for model in models:
        if not isinstance(model.get("name"), str) or not model["name"]:
            yield '"model-index[0].name" is required'
        for result in model.get("results", []):
            dataset = result.get("dataset", {})
            if not (result.get("task", {}).get("type") and dataset.get("type")):
                yield '"model-index[0].results" lacks task.type or dataset.type'
            if not dataset.get("name"):
                yield '"model-index[0].results" lacks dataset.name'
            for metric in result.get("metrics", []):
                if not metric.get("type") or metric.get("value") is None:
                    yield '"model-index[0].results.metrics" lacks type or value'
