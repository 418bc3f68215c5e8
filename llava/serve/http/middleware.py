"""The door of a server: who may come in, how much they may carry, and a line in the log when they leave.

In: an ASGI application. Out: the same behind checks of Host, Origin, API key and body size; every response is counted and
logged by method, path, status and time, never with a query, a header or a body. All of that is plain ASGI, so that
streams pass through untouched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from llava.serve.http.errors import error_response
from llava.serve.http.limits import ApiKeys
from llava.serve.http.memory_budget import BODY_COPIES, NoRoomError, Room, Share
from llava.serve.http.metrics import Metrics

logger = logging.getLogger("llava.serve")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """`open_paths` need no key (a path that ends in / stands for all below it). `hosts`: names that this server answers
    to, None for any; on loopback they keep web pages with tricky names out. `origins` are other sites whose pages may ask.
    `room` is what the bodies of all requests may hold together.
    """

    def __init__(
        self,
        app: Any,
        *,
        keys: ApiKeys,
        max_body_bytes: int,
        room: Room,
        metrics: Metrics,
        known_paths: Collection[str],
        open_paths: Collection[str] = (),
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._room = room
        self._metrics = metrics
        self._known_paths = frozenset(known_paths)
        self._open_paths = frozenset(open_paths)
        self._open_folders = tuple(path for path in open_paths if path.endswith("/") and path != "/")
        self._hosts = frozenset(hosts) if hosts is not None else None
        self._origins = frozenset(origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._max_body_bytes, self._room.share())
        started = time.perf_counter()
        try:
            refusal = self._refusal(visit)
            if refusal is not None:
                await refusal(scope, receive, visit.send)
            else:
                await self._app(scope, visit.receive, visit.send)
        finally:
            visit.share.shrink_to(0)
            self._note(scope, visit.status, time.perf_counter() - started)

    def _refusal(self, visit: _Visit) -> Any:
        """The response to who may not come in, else None."""
        host = visit.header("host")
        if self._hosts is not None and _name(f"//{host}") not in self._hosts:
            return error_response(421, "this server does not answer to the name in the Host header", code="wrong_host")
        origin = visit.header("origin")
        if origin and origin not in self._origins and urlsplit(origin).netloc != host:
            return error_response(403, "pages of other sites may not ask this server", code="cross_origin")
        path = visit.scope["path"]
        is_open = path in self._open_paths or path.startswith(self._open_folders) or visit.scope["method"] == "OPTIONS"
        if not is_open and not self._keys.allow(visit.header("authorization")):
            return error_response(
                401,
                "this server needs an API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        length = visit.header("content-length")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return _too_large(self._max_body_bytes)
        return None

    def _note(self, scope: Any, status: int | None, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._known_paths else "other"
        shown = str(status) if status is not None else "none"
        self._metrics.responses.labels(path, shown).inc()
        self._metrics.response_s.labels(path).observe(seconds)
        logger.info("%s %s %s %.0f ms", scope["method"], path, shown, 1000 * seconds)


class _Visit:
    """One request and its response, with the bytes of the first counted and the status of the second known."""

    def __init__(self, scope: Any, receive: Any, send: Any, max_body_bytes: int, share: Share) -> None:
        self.scope = scope
        self.share = share
        self.status: int | None = None
        self._receive, self._send = receive, send
        self._left = max_body_bytes
        self._max = max_body_bytes

    def header(self, name: str) -> str:
        key = name.encode()
        return next((value.decode("latin-1") for header, value in self.scope["headers"] if header == key), "")

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise HTTPException(413, _too_large_text(self._max))
            try:
                self.share.take(BODY_COPIES * len(message.get("body", b"")))
            except NoRoomError as error:
                raise HTTPException(429, str(error)) from error
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _too_large_text(limit: int) -> str:
    return f"the body is larger than the {limit:,} bytes that this server takes"


def _too_large(limit: int) -> Any:
    return error_response(413, _too_large_text(limit), code="body_too_large", headers={"connection": "close"})
