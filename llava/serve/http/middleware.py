"""ASGI middleware: checks of Host, Origin, API key and body size; counters; one log line for each response.

In: an ASGI application and an `AccessPolicy`. Out: the same application behind the checks. A log line has method, path, status,
time, the sentence of an error and the request's id, never a query, a header or a body. Plain ASGI, so that streams pass
through unchanged.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.errors import InputError
from llava.serve.http.cors import CrossOrigin
from llava.serve.http.errors import ApiError, error_response
from llava.serve.http.forwarded import TrustedProxies, as_sent, route_path
from llava.serve.http.memory_budget import BODY_COPIES, MemoryBudget, MemoryBudgetError, Reservation
from llava.serve.http.metrics import Metrics
from llava.serve.http.request_record import REQUEST_ID, NotedError, begin_record

logger = logging.getLogger("llava.serve")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_KEY_LENGTH = 8


def read_keys(path: str | None, variable: str | None) -> list[str]:
    """Read API keys: from a file, one on a line, with # for comments; then from an environment variable, with commas."""
    keys = []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the file of API keys {path!r} cannot be read: {error}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"the file of API keys {path!r} holds no key; put one on a line")
    return keys + [key.strip() for key in (variable or "").split(",") if key.strip()]


class ApiKeys:
    """The accepted API keys. Without any, the server needs none."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = []
        for key in keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
                raise InputError(f"an API key needs {MIN_KEY_LENGTH} characters or more, ASCII without spaces")
            self._digests.append(_digest(key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: str | None) -> bool:
        """Return whether an Authorization header has one of the keys. The time does not depend on how much of it matches."""
        if not self._digests:
            return True
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and kind.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class AccessPolicy:
    """Which requests a server accepts."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    max_body_bytes: int = 64 * 2**20
    hosts: tuple[str, ...] | None = None  # accepted in the Host header, against DNS rebinding; None: any
    cross_origin: CrossOrigin = field(default_factory=CrossOrigin)  # pages of other sites that may send requests
    proxies: TrustedProxies = field(default_factory=TrustedProxies)  # whose X-Forwarded headers are believed
    root_path: str = ""  # the prefix of all paths, which a proxy may remove
    memory: MemoryBudget = field(default_factory=MemoryBudget)  # of all requests together

    def __post_init__(self) -> None:
        if not self.max_body_bytes > 0:
            raise InputError(f"the limit max_body_bytes is {self.max_body_bytes!r}; it must be above 0")


class AccessMiddleware:
    """Refuse what the policy does not accept; count and log every response.

    Metrics name `known_paths` and count all others as "other". `open_paths` need no key; one that ends in / stands for all
    below it.
    """

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        metrics: Metrics,
        *,
        known_paths: Collection[str],
        open_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._policy = policy
        self._metrics = metrics
        self._known_paths = frozenset(known_paths)
        self._open_paths = frozenset(open_paths)
        self._open_folders = tuple(path for path in open_paths if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = self._policy
        scope = as_sent(scope, policy.proxies, policy.root_path)
        headers = Headers(scope=scope)
        record = begin_record(headers.get(REQUEST_ID, ""))
        added = policy.cross_origin.headers(headers.get("origin", ""))
        record.headers |= added | _id_headers(record.id, route_path(scope))
        send = _adding(record.headers, send)
        request = RequestScope(scope, receive, send, policy.max_body_bytes, policy.memory.reserve())
        started = time.perf_counter()
        try:
            refusal = self._refusal(request)
            if refusal is not None:
                await refusal(scope, receive, request.send)
            else:
                await self._app(scope, request.receive, request.send)
        finally:
            request.reservation.release()
            self._log(scope, request.status, time.perf_counter() - started, record.error)

    def _refusal(self, request: RequestScope) -> Response | None:
        policy, host, origin = self._policy, request.header("host"), request.header("origin")
        path, method = route_path(request.scope), request.scope["method"]
        name = _host_name(f"//{host}")
        if policy.hosts is not None and name not in policy.hosts:
            message = (
                f"this server does not answer to the name {_shown(name or host)} in the Host header; if it is the server's "
                f"own, start it with --allow-host {_shown(name or 'NAME')}"
            )
            return error_response(ApiError(421, message, code="wrong_host"), path)
        if origin and not policy.cross_origin.allow(origin, host):
            message = (
                f"pages of {_shown(origin)} may not use this server; to let them, start it with --allow-origin "
                f"{_shown(origin)}, or where this is the server's own name, let the proxy pass the Host header on"
            )
            return error_response(ApiError(403, message, code="cross_origin"), path)
        preflight = policy.cross_origin.preflight(method, Headers(scope=request.scope))
        if preflight is not None:
            return preflight
        is_open = path in self._open_paths or path.startswith(self._open_folders) or method == "OPTIONS"
        if not is_open and not policy.keys.allow(authorization_of(Headers(scope=request.scope))):
            message = "this server needs an API key: send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            return error_response(ApiError(401, message, code="invalid_api_key"), path, {"www-authenticate": "Bearer"})
        length = request.header("content-length")
        if length.isdecimal() and int(length) > policy.max_body_bytes:
            message = _too_large(policy.max_body_bytes)
            return error_response(ApiError(413, message, code="body_too_large"), path, {"connection": "close"})
        return None

    def _log(self, scope: Scope, status: int | None, seconds: float, error: NotedError | None) -> None:
        path = route_path(scope)
        path = path if path in self._known_paths else "other"
        shown = str(status) if status is not None else "none"
        self._metrics.responses.labels(path, shown).inc()
        self._metrics.response_s.labels(path).observe(seconds)
        if error is None and status is None:
            error = NotedError("client_left", "the client left before its answer began")
        if error is not None:
            self._metrics.errors.labels(error.kind).inc()
        sentence = f": {error.sentence}" if error is not None else ""
        logger.info("%s %s %s %.0f ms%s", scope["method"], path, shown, 1000 * seconds, sentence)


class RequestScope:
    """One request and its response: limits and counts the bytes of the body, and records the status."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int, reservation: Reservation
    ) -> None:
        self.scope = scope
        self.reservation = reservation
        self.status: int | None = None
        self._receive, self._send = receive, send
        self._left = max_body_bytes
        self._max = max_body_bytes

    def header(self, name: str) -> str:
        key = name.encode()
        return next((value.decode("latin-1") for header, value in self.scope["headers"] if header == key), "")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            num_bytes = len(message.get("body", b""))
            self._left -= num_bytes
            if self._left < 0:
                raise HTTPException(413, _too_large(self._max))
            try:
                self.reservation.change(BODY_COPIES * num_bytes)
            except MemoryBudgetError as error:
                raise HTTPException(429, str(error)) from error
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _id_headers(number: str, path: str) -> dict[str, str]:
    """The headers of a response that have the request's id; Anthropic's clients read one of their own."""
    return {REQUEST_ID: number} | ({"request-id": number} if path.startswith("/v1/messages") else {})


def _adding(added: dict[str, str], send: Send) -> Send:
    """Return `send` with headers added to the response, those too that `added` gets until it begins."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            pairs = [(name.encode(), value.encode("latin-1")) for name, value in added.items()]
            message = dict(message, headers=[*message.get("headers", ()), *pairs])
        await send(message)

    return send_with_headers


def _shown(text: str) -> str:
    """A name that a client sent, for a sentence: short and printable."""
    short = text if len(text) <= 100 else text[:100] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


def authorization_of(headers: Mapping[str, str]) -> str:
    """Return the Authorization header. Anthropic's clients send the key in a header of its own."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else "")


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _too_large(limit: int) -> str:
    return f"the body is larger than the {limit:,} bytes that this server takes"
