"""What each route of the Hub, and of the storage behind it, answers."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from support.hub.store import Blob, Refusal, Repo, Store, Token, card_errors, git_hash, upload_mode

if TYPE_CHECKING:
    from support.hub.server import HubServer

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_END = re.compile(r"/lfs/(verify|complete)/(\w+)/([^/]+/[^/]+)")
WRITING = ("commit", "preupload", "branch")
API = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?")
RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BATCH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/(get|put)/(model|dataset|space)/([^/]+/[^/]+)/([0-9a-f]{64})(?:/(\d+))?")


@dataclass
class Call:
    """A request, taken apart."""

    method: str
    path: str
    """Unquoted."""
    quoted: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def secret(self) -> str | None:
        """The token that it brings."""
        scheme, _, secret = self.headers.get("authorization", "").partition(" ")
        return secret if scheme == "Bearer" else None

    @property
    def json(self) -> dict[str, Any]:
        try:
            table = json.loads(self.body or b"{}")
        except ValueError:
            raise Refusal(400, "the request is not JSON") from None
        if not isinstance(table, dict):
            raise Refusal(400, "the request is not a table")
        return table


@dataclass
class Answer:
    """What goes back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Any, status: int = 200, **headers: str) -> Answer:
        return cls(
            status, json.dumps(table).encode(), {"Content-Type": "application/json", **headers}
        )

    @classmethod
    def refusal(cls, refusal: Refusal) -> Answer:
        headers = {"X-Error-Message": refusal.message}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        return cls.of({"error": refusal.message}, refusal.status, **headers)


def hub_answer(hub: HubServer, call: Call) -> Answer:
    """The Hub's own routes."""
    store = hub.store
    token = store.who(call.secret)
    if call.path in FIXED:
        return FIXED[call.path](hub, call, token)
    if match := BATCH.fullmatch(call.path):
        repo = _writable(store, KINDS[match[1] or "models"], match[2], token)
        return _batch(hub, repo, call.json)
    if match := LFS_END.fullmatch(call.path):
        return _lfs_end(hub, store.repos[match[2], match[3]], match[1], call)
    if match := RESOLVE.fullmatch(call.quoted):
        repo = store.find(KINDS[match[1] or "models"], match[2], token)
        return _resolve(hub, repo, unquote(match[3]), unquote(match[4]), call)
    if match := API.fullmatch(call.quoted):
        verb, _, tail = (match[3] or "").partition("/")
        kind, repo_id = KINDS[match[1]], match[2]
        if verb in WRITING or match[3] == "auth-check/write":
            repo = _writable(store, kind, repo_id, token)
        else:
            repo = store.find(kind, repo_id, token)
        if verb in VERBS:
            return VERBS[verb](hub, repo, tail, call)
    raise Refusal(404, f"no route {call.method} {call.path}")


def storage_answer(hub: HubServer, call: Call) -> Answer:
    """The storage's routes: signed links to single objects."""
    match = OBJECT.fullmatch(call.path)
    if match is None:
        raise Refusal(404, "NoSuchKey")
    if "authorization" in call.headers:
        raise Refusal(400, "Only one auth mechanism allowed")
    if call.query.get("X-Signature") != hub.signature(call.path):
        raise Refusal(403, "SignatureDoesNotMatch")
    repo = hub.store.repos[match[2], match[3]]
    if match[1] == "get" and call.method in ("GET", "HEAD"):
        return _ranged(call, repo.objects[match[4]], {"ETag": f'"{match[4]}"'})
    if match[1] == "put" and call.method == "PUT":
        if match[5] is None:
            hub.store.put(repo, match[4], len(call.body), call.body)
        else:
            hub.parts[f"{match[4]}/{match[5]}"] = call.body
        return Answer(headers={"ETag": f'"{git_hash(call.body)}"'})
    raise Refusal(405, "MethodNotAllowed")


def _writable(store: Store, kind: str, repo_id: str, token: Token | None) -> Repo:
    repo = store.find(kind, repo_id, token)
    store.may_write(token, repo_id.partition("/")[0])
    return repo


def _whoami(_hub: HubServer, _call: Call, token: Token | None) -> Answer:
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if token.write else "read"
    orgs = [{"name": name} for name in token.orgs]
    auth = {"type": "access_token", "accessToken": {"role": role}}
    return Answer.of({"type": "user", "name": token.user, "orgs": orgs, "auth": auth})


def _validate(_hub: HubServer, call: Call, _token: Token | None) -> Answer:
    errors = [{"message": error} for error in card_errors(call.json["content"])]
    return Answer.of({"errors": errors, "warnings": []}, 400 if errors else 200)


def _create(hub: HubServer, call: Call, token: Token | None) -> Answer:
    wanted = call.json
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    repo_id = f"{wanted.get('organization') or token.user}/{wanted['name']}"
    kind = wanted.get("type") or "model"
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    try:
        with hub.store.lock:
            hub.store.create(kind, repo_id, private, token)
    except Refusal as refusal:
        if refusal.status != 409:
            raise
        return Answer.of({"error": refusal.message, "url": url}, 409)
    return Answer.of({"url": url, "name": repo_id, "id": repo_id})


def _info(_hub: HubServer, repo: Repo, tail: str, call: Call) -> Answer:
    commit = repo.resolve(unquote(tail) or "main")
    blobs = "blobs" in call.query
    siblings = []
    for name, blob in sorted(commit.tree.items()):
        entry: dict[str, Any] = {"rfilename": name}
        if blobs:
            entry |= {"size": len(blob.data), "blobId": blob.git_oid}
            if blob.lfs:
                entry["lfs"] = _lfs_info(blob)
        siblings.append(entry)
    return Answer.of(
        {
            "_id": git_hash(repo.id.encode())[:24],
            "id": repo.id,
            "sha": commit.oid,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
    )


def _lfs_info(blob: Blob) -> dict[str, Any]:
    return {
        "oid": blob.sha256,
        "sha256": blob.sha256,
        "size": len(blob.data),
        "pointerSize": len(blob.pointer),
    }


def _refs(_hub: HubServer, repo: Repo, _tail: str, _call: Call) -> Answer:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
        for name, oid in repo.branches.items()
    ]
    return Answer.of({"branches": branches, "tags": [], "converts": []})


def _commit(hub: HubServer, repo: Repo, tail: str, call: Call) -> Answer:
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    made = hub.store.change(repo, unquote(tail), lines)
    url = f"{hub.url}/{repo.id}/commit/{made.oid}"
    return Answer.of({"success": True, "commitOid": made.oid, "commitUrl": url})


def _branch(_hub: HubServer, repo: Repo, tail: str, call: Call) -> Answer:
    name = unquote(tail)
    if call.method == "DELETE":
        repo.branches.pop(name, None)
        return Answer.of({})
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: {name}")
    repo.branches[name] = repo.resolve(call.json.get("startingPoint") or "main").oid
    return Answer.of({}, 201)


def _preupload(_hub: HubServer, repo: Repo, tail: str, call: Call) -> Answer:
    tree = repo.resolve(unquote(tail)).tree
    files = []
    for file in call.json["files"]:
        sample = base64.b64decode(file["sample"])
        mode = upload_mode(file["path"], sample, file["size"])
        entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if file["path"] in tree:
            entry["oid"] = tree[file["path"]].etag
        files.append(entry)
    return Answer.of({"files": files})


def _batch(hub: HubServer, repo: Repo, wanted: dict[str, Any]) -> Answer:
    if wanted.get("operation") != "upload" or wanted.get("hash_algo") != "sha256":
        raise Refusal(422, "unknown operation or hash")
    if "ref" in wanted:
        repo.resolve(wanted["ref"]["name"])
    objects = []
    transfer = "basic"
    for entry in wanted["objects"]:
        oid, size = entry["oid"], entry["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        objects.append(answer)
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or size <= 0:
            answer["error"] = {"code": 422, "message": "invalid oid or size"}
            continue
        if oid in repo.objects:
            if len(repo.objects[oid]) != size:
                answer["error"] = {"code": 422, "message": "the object has another size"}
            continue
        hub.store.check_quota(repo, size)
        path = f"/put/{repo.type}/{repo.id}/{oid}"
        place = f"{repo.type}/{repo.id}"
        upload: dict[str, Any] = {"href": hub.signed(path)}
        if hub.part_bytes is not None and size > hub.part_bytes:
            transfer = "multipart"
            count = -(-size // hub.part_bytes)
            links = {str(n): hub.signed(f"{path}/{n}") for n in range(1, count + 1)}
            upload = {
                "href": f"{hub.url}/lfs/complete/{place}",
                "header": {"chunk_size": str(hub.part_bytes), **links},
            }
        verify = {"href": f"{hub.url}/lfs/verify/{place}"}
        answer["actions"] = {"upload": upload, "verify": verify}
        answer["authenticated"] = True
    return Answer.of({"transfer": transfer, "objects": objects})


def _lfs_end(hub: HubServer, repo: Repo, verb: str, call: Call) -> Answer:
    """The last request of an upload: its parts put together, or the whole object verified."""
    oid = call.json["oid"]
    if verb == "verify":
        if len(repo.objects.get(oid, b"")) != call.json["size"]:
            raise Refusal(404, "the object is not there")
        return Answer.of({})
    pieces = []
    for number, part in enumerate(call.json["parts"], 1):
        piece = hub.parts.get(f"{oid}/{number}")
        if piece is None or part["partNumber"] != number:
            raise Refusal(400, f"part {number} is missing")
        if part["etag"].strip('"') != git_hash(piece):
            raise Refusal(400, f"part {number} has another ETag")
        pieces.append(piece)
    data = b"".join(pieces)
    hub.store.put(repo, oid, len(data), data)
    return Answer.of({"success": True})


def _tree(hub: HubServer, repo: Repo, tail: str, call: Call) -> Answer:
    revision, folder = (unquote(part) for part in (*tail.split("/", 1), "")[:2])
    prefix = f"{folder}/" if folder else ""
    tree = repo.resolve(revision).tree
    entries: dict[str, dict[str, Any]] = {}
    for name, blob in sorted(tree.items()):
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            parent = prefix + "/".join(parts[:depth])
            oid = git_hash(parent.encode())
            entries.setdefault(parent, {"type": "directory", "oid": oid, "size": 0, "path": parent})
        entries[name] = _entry(name, blob)
    if call.query.get("recursive", "").lower() != "true":
        entries = {n: e for n, e in entries.items() if "/" not in n.removeprefix(prefix)}
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    start = int(call.query.get("cursor", 0))
    page = list(entries.values())[start : start + hub.page]
    headers = {}
    if start + hub.page < len(entries):
        query = "&".join(f"{k}={v}" for k, v in call.query.items() if k != "cursor")
        link = f"{hub.url}{call.quoted}?{query}&cursor={start + hub.page}"
        headers["Link"] = f'<{link}>; rel="next"'
    return Answer.of(page, **headers)


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": name}
    return entry | ({"lfs": _lfs_info(blob)} if blob.lfs else {})


def _paths(_hub: HubServer, repo: Repo, tail: str, call: Call) -> Answer:
    tree = repo.resolve(unquote(tail)).tree
    paths = parse_qs(call.body.decode()).get("paths", [])
    return Answer.of([_entry(path, tree[path]) for path in paths if path in tree])


def _resolve(hub: HubServer, repo: Repo, revision: str, path: str, call: Call) -> Answer:
    commit = repo.resolve(revision)
    headers = {"X-Repo-Commit": commit.oid}
    blob = commit.tree.get(path)
    if blob is None:
        answer = Answer.refusal(Refusal(404, "Entry not found", "EntryNotFound"))
        answer.headers |= headers
        return answer
    headers["ETag"] = f'"{blob.etag}"'
    if not blob.lfs:
        return _ranged(call, blob.data, headers)
    headers["X-Linked-ETag"] = f'"{blob.sha256}"'
    headers["X-Linked-Size"] = str(len(blob.data))
    headers["Location"] = hub.signed(f"/get/{repo.type}/{repo.id}/{blob.sha256}")
    return Answer(302, b"", headers)


def _ranged(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    headers = headers | {"Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if match is not None:
        first = int(match[1])
        last = min(int(match[2] or len(data)), len(data) - 1)
        if first >= len(data) or first > last:
            raise Refusal(416, "Requested Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Answer(206, data[first : last + 1], headers)
    if call.method == "HEAD":
        return Answer(200, b"", headers | {"Content-Length": str(len(data))})
    return Answer(200, data, headers)


FIXED = {
    "/api/whoami-v2": _whoami,
    "/api/repos/create": _create,
    "/api/validate-yaml": _validate,
}
VERBS = {
    "": _info,
    "revision": _info,
    "refs": _refs,
    "branch": _branch,
    "preupload": _preupload,
    "commit": _commit,
    "tree": _tree,
    "paths-info": _paths,
    "auth-check": lambda _hub, _repo, _tail, _call: Answer.of({}),
}
"""What stands between a repository's name and the rest of a path under /api."""
