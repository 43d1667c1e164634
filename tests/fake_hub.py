"""A server on 127.0.0.1 that plays the Hugging Face hub, with faults on request.

As there, a large file is not sent by the hub itself but by another server it redirects to.
Knows nothing about pytest.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_goodToken"


def etag_of(name: str, data: bytes) -> str:
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """`gated`: needs TOKEN. `private`: strangers are told that it is not there."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    listing: dict[str, Any] = field(default_factory=dict)  # replaces parts of the honest answer


class FakeHub:
    """`faults[file]`: how the next answers for it go wrong, first one first. `seen`: requests.

    Faults: flip, cut (the connection breaks in the middle), short (half, as if that were all),
    stall (in the middle), stall-at-once, long, no-range, other-range, and numbers: HTTP statuses.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[str | int]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # server, path, headers
        self._blobs: dict[str, tuple[str, bytes]] = {}
        self._release = threading.Event()
        self._hub = self._serve("hub", self._answer_hub)
        self._store = self._serve("store", self._answer_store)
        self.endpoint = f"http://127.0.0.1:{self._hub.server_port}"

    def close(self) -> None:
        self._release.set()
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    def asked(self, name: str) -> list[str]:
        """The Range header of every request for the bytes of a file, "" without one."""
        return [
            headers.get("range", "")
            for server, path, headers in self.seen
            if path.endswith(f"/{name}") and server == ("store" if "safetensors" in name else "hub")
        ]

    def _serve(self, role: str, answer: Any) -> ThreadingHTTPServer:
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                seen.append((role, path, {k.lower(): v for k, v in self.headers.items()}))
                answer(self, path)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def _answer_hub(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        org, name, *rest = words[2:] if api else words
        repo = self.repos.get(f"{org}/{name}")
        if repo is None:
            return _refuse(handler, 404 if api else 401, "RepoNotFound")
        token = handler.headers.get("Authorization")
        if repo.private and token != f"Bearer {TOKEN}":
            return _refuse(handler, 401, "RepoNotFound")
        # as the real one takes a pull request: its slashes quoted
        known = ("main", "refs%2Fpr%2F7", COMMIT) if api else (COMMIT,)
        if rest in (["revision", revision] for revision in known):
            if faults := self.faults.get("api"):
                fault = faults.pop(0)
                return _refuse(handler, fault, "") if isinstance(fault, int) else self._stall()
            answer = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": self._siblings(repo)}
            return _send(handler, 200, json.dumps(answer | repo.listing).encode())
        if api:
            return _refuse(handler, 404, "RevisionNotFound")
        if repo.gated and token != f"Bearer {TOKEN}":
            return _refuse(handler, 403 if token else 401, "GatedRepo")
        file = rest[-1]
        data = repo.files[file]
        if not file.endswith(".safetensors"):
            return self._send_file(handler, file, data)
        store = f"http://127.0.0.1:{self._store.server_port}"
        self._blobs[etag_of(file, data)] = file, data
        location = f"{store}/{etag_of(file, data)}/{file}"
        return _send(handler, 302, b"", {"Location": location})

    def _answer_store(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if "Authorization" in handler.headers:  # a signed address with a token is refused there
            return _refuse(handler, 400, "")
        return self._send_file(handler, *self._blobs[path.split("/")[1]])

    def _siblings(self, repo: Repo) -> list[dict[str, Any]]:
        found = []
        for name, data in repo.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith(".safetensors"):
                sha = etag_of(name, data)
                entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
            else:
                entry["blobId"] = etag_of(name, data)
            found.append(entry)
        return found

    def _send_file(self, handler: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return _refuse(handler, fault, "")
        if fault == "stall-at-once":
            return self._stall()
        wanted = handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        start = 0 if fault == "no-range" else int(wanted)
        if start >= len(data) and start:
            return _refuse(handler, 416, "")
        if fault == "flip":
            middle = (start + len(data)) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if fault == "long":
            data += b"more"
        told = start + 1 if fault == "other-range" else start
        headers = {"Content-Range": f"bytes {told}-{len(data) - 1}/{len(data)}"} if start else {}
        body = data[start:]
        half = body[: len(body) // 2]
        status = 206 if start else 200
        if fault == "short":
            return _send(handler, status, half, headers)
        _send(handler, status, body if fault not in ("cut", "stall") else half, headers, len(body))
        if fault == "stall":
            self._stall()
        if fault in ("cut", "stall"):
            handler.close_connection = True
        return None

    def _stall(self) -> None:
        self._release.wait(60)


def _send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes,
    headers: dict[str, str] | None = None, told: int | None = None,
) -> None:  # fmt: skip
    handler.send_response(status)
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body) if told is None else told))
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _send(handler, status, b'{"error": "refused"}', {"X-Error-Code": code} if code else {})
