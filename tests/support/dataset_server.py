"""A small Hub for data sets: the read routes that the clients use, over real HTTP on localhost."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = sha1(b"the only commit").hexdigest()
REVISIONS = {"main", COMMIT}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path  # ORG/NAME/files

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            parts.pop(0)
            self._api(parts)
        elif parts[0] == "datasets" and parts[3] == "resolve":
            self._file(self.folder / parts[1] / parts[2] / "/".join(parts[5:]))
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length).decode()
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        repo = self.folder / parts[2] / parts[3]
        if parts[4] != "paths-info":
            self._missing("EntryNotFound")
            return
        asked = [unquote(p.partition("=")[2]) for p in body.split("&") if p.startswith("paths=")]
        if body.startswith("{"):
            asked = json.loads(body)["paths"]
        self._json([_entry(repo, repo / p) for p in asked if (repo / p).exists()])

    def _api(self, parts: list[str]) -> None:
        repo = self.folder / "/".join(parts[1:3])
        kind = parts[3] if len(parts) > 3 else "revision"
        revision = parts[4] if len(parts) > 4 else "main"
        if parts[0] != "datasets" or len(parts) < 3 or not repo.is_dir():
            self._missing("RepoNotFound")
        elif revision not in REVISIONS:
            self._missing("RevisionNotFound")
        elif kind == "tree":
            root = repo / "/".join(parts[5:])
            found = root.rglob("*") if "recursive=true" in self.path.lower() else root.iterdir()
            self._json([_entry(repo, path) for path in sorted(found)])
        else:
            files = [p for p in sorted(repo.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": str(p.relative_to(repo))} for p in files]
            self._json(
                {"_id": "1", "id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings}
            )

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        data = path.read_bytes()
        headers = {
            "ETag": f'"{sha1(data).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            self._send(200, data, **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1 if last else len(data), len(data))
        part = data[int(first) : stop]
        self._send(206, part, Content_Range=f"bytes {first}-{stop - 1}/{len(data)}", **headers)


def _entry(repo: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(repo))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": sha1(name.encode()).hexdigest()}
    data = path.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve ORG/NAME directories below `folder`; gives the endpoint."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
