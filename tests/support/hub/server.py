"""The server: two listeners, as in life.  One is the Hub, the other the storage that it signs links
to; the storage refuses requests that bring the Hub's token along."""

import contextlib
import hashlib
import secrets
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.hub.faults import Fault, Faults
from support.hub.routes import Answer, Call, hub_answer, storage_answer
from support.hub.store import Refusal, Store

CHUNK = 16 << 10
SIGNED = "X-Signature"


@dataclass
class Request:
    """What came in, for tests to look at."""

    method: str
    path: str
    status: int | None
    """None: no answer was given."""
    received: int
    """Bytes of the body that arrived."""
    headers: dict[str, str] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class HubServer:
    """See the package's text; use as a context manager."""

    def __init__(self, *, page: int = 1000, part_bytes: int | None = None) -> None:
        """`page`: entries of a listing at a time; `part_bytes`: larger uploads come in parts."""
        self.store = Store()
        self.faults = Faults()
        self.page, self.part_bytes = page, part_bytes
        self.requests: list[Request] = []
        self.received = 0
        """Bytes of large files that arrived, wanted or not."""
        self.parts: dict[str, bytes] = {}
        self.watch: Callable[[int], bool] | None = None
        """Told `received` while a body arrives; when it returns true the connection ends."""
        self._secret = secrets.token_hex(8)
        self._servers: list[_Listener] = []

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def __enter__(self) -> "HubServer":
        for answer in (hub_answer, storage_answer):
            server = _Listener(self, answer)
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def signed(self, path: str) -> str:
        """A link to the storage that needs no token."""
        return f"{self.storage_url}{path}?{SIGNED}={self.signature(path)}"

    def signature(self, path: str) -> str:
        return hashlib.sha256(f"{self._secret}{path}".encode()).hexdigest()[:16]

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Variables by which a client in another process finds this server."""
        found = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}
        return found | ({"HF_TOKEN": token} if token else {})

    def seen(self, method: str, part: str) -> list[Request]:
        """Requests so far by method and a part of the path."""
        return [r for r in self.requests if r.method == method and part in r.path]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, answer: Callable[[HubServer, Call], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.answer = hub, answer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report; anything else is the server's own fault."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Gone(Exception):
    """The connection is to end without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, *_arguments: object) -> None:
        """Nothing is printed; `HubServer.requests` has it all."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, self.path, None, 0, headers)
        hub.requests.append(request)
        fault = hub.faults.strike(f"{self.command} {path}")
        try:
            body = self._body(request, fault)
            if fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            call = Call(
                self.command,
                urllib.parse.unquote(path),
                path,
                dict(urllib.parse.parse_qsl(query)),
                headers,
                _flipped(body) if fault is not None and fault.kind == "flip" else body,
            )
            answer = self._answer(call, fault)
            if fault is not None and fault.kind == "lost":
                raise _Gone
            request.status = answer.status
            self._send(answer, fault if self.command == "GET" else None)
        except _Gone:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, call: Call, fault: Fault | None) -> Answer:
        hub = self.server.hub
        try:
            if fault is not None and fault.kind == "expire" and call.secret in hub.store.tokens:
                hub.store.tokens[call.secret].expired = True
            if fault is not None and fault.kind == "status":
                answer = Answer.refusal(Refusal(fault.status, fault.message, fault.code))
                if fault.retry_after is not None:
                    answer.headers["Retry-After"] = str(fault.retry_after)
                return answer
            return self.server.answer(hub, call)
        except Refusal as refusal:
            return Answer.refusal(refusal)

    def _body(self, request: Request, fault: Fault | None) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        stop = length // 2 if fault is not None and fault.kind == "cut" else None
        hub = self.server.hub
        data = bytearray()
        for chunk in self._chunks(length):
            data += chunk
            request.received += len(chunk)
            if self.command == "PUT":
                hub.received += len(chunk)
            if hub.watch is not None and hub.watch(hub.received):
                raise _Gone
            if stop is not None and len(data) >= stop:
                raise _Gone
        if fault is not None and fault.kind == "cut" and self.command != "GET":
            raise _Gone
        return bytes(data)

    def _chunks(self, length: int) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._exactly(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        while length > 0:
            chunk = self._exactly(min(length, CHUNK))
            length -= len(chunk)
            yield chunk

    def _exactly(self, size: int) -> bytes:
        chunk = self.rfile.read(size)
        if len(chunk) < size:  # the client was killed
            self.server.hub.received += len(chunk) if self.command == "PUT" else 0
            raise _Gone
        return chunk

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        body = answer.body
        if fault is not None and fault.kind == "flip" and answer.status in (200, 206):
            body = _flipped(body)
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            raise _Gone
        self.wfile.write(body)


def _flipped(body: bytes) -> bytes:
    """The same bytes but for one bit in the middle."""
    if not body:
        return body
    data = bytearray(body)
    data[len(data) // 2] ^= 1
    return bytes(data)
