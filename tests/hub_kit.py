"""A hub that answers on loopback, as huggingface.co does to `snapshot_download`, at a chosen speed."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repositories `owner/name` are folders; `status` answers everything about a repository by that status instead."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.bytes_per_s: float | None = None
        self.status: dict[str, tuple[int, dict[str, str]]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(
            r"(?:/api/(?:models|datasets)|/datasets)?/([^/]+/[^/]+)(?:/(resolve|revision|tree)/([^/]+)(?:/(.*))?)?",
            path,
        )
        if match is None:
            return self._send(404, {}, b"{}")
        repository, kind, revision, name = match.groups()
        if repository in self.server.status:
            status, headers = self.server.status[repository]
            return self._send(status, headers, b'{"error": "refused"}')
        folder = self.server.repositories.get(repository)
        if folder is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}")
        if revision not in (None, "main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}")
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if kind == "tree":
            rows = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _etag(f)} for n, f in files.items()]
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(rows).encode())
        if kind != "resolve":
            info = {
                "id": repository,
                "modelId": repository,
                "sha": COMMIT,
                "private": False,
                "siblings": [{"rfilename": n} for n in files],
            }
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        if name not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        return self._send_file(files[name], with_body)

    def _send_file(self, file: Path, with_body: bool) -> None:
        data = file.read_bytes()
        start = int(m[1]) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        while with_body and start < len(data):
            piece = data[start : start + 2**14]
            try:
                self.wfile.write(piece)
            except OSError:  # the other side has gone
                self.close_connection = True
                return
            self.server.sent += len(piece)
            start += len(piece)
            if self.server.bytes_per_s is not None:
                time.sleep(len(piece) / self.server.bytes_per_s)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
