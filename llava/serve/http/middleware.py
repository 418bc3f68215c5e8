"""ASGI middleware: checks of Host, Origin, API key and body size; counters; one log line for each response.

In: an ASGI application and an `AccessPolicy`. Out: the same application behind the checks. A log line has method, path, status,
time, the sentence of an error and the request's id, never a query, a header or a body. Plain ASGI, so that streams pass
through unchanged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.errors import InputError
from llava.serve.backends.base import ServerBusyError
from llava.serve.http.connections import ConnectionLimits, network_of
from llava.serve.http.content_encoding import KNOWN_ENCODINGS, PLAIN_ENCODINGS, BodyDecoder, BodyTooLargeError
from llava.serve.http.cors import CrossOrigin
from llava.serve.http.errors import ApiError, as_api_error, error_response
from llava.serve.http.forwarded import TrustedProxies, as_sent, route_path
from llava.serve.http.keys import ApiKeys, authorization_of, client_name, current_client
from llava.serve.http.memory_budget import (
    BODY_COPIES,
    POOL_SHARE,
    ArrivingBody,
    BodyPool,
    MemoryBudget,
    MemoryBudgetError,
)
from llava.serve.http.metrics import Metrics
from llava.serve.http.request_record import REQUEST_ID, NotedError, begin_record

logger = logging.getLogger("llava.serve")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
CLIENT_HEADER = "x-llava-client"  # whose request it is, as a controller says to its worker
SMALL_PIECE = 4096  # bytes of a compressed body, decoded in the event loop
MIN_BODY_RATE = 50_000  # bytes per second; a body that comes more slowly ends at its read timeout


@dataclass(frozen=True)
class AccessPolicy:
    """Which requests a server accepts."""

    keys: ApiKeys = field(default_factory=ApiKeys)  # of clients
    worker_keys: ApiKeys = field(
        default_factory=ApiKeys
    )  # at a controller of its workers, at a worker of its controller
    is_worker: bool = False  # a controller may ask this server, by a worker's key
    max_body_bytes: int = 64 * 2**20
    hosts: tuple[str, ...] | None = None  # accepted in the Host header, against DNS rebinding; None: any
    cross_origin: CrossOrigin = field(default_factory=CrossOrigin)  # pages of other sites that may send requests
    proxies: TrustedProxies = field(default_factory=TrustedProxies)  # whose X-Forwarded headers are believed
    root_path: str = ""  # the prefix of all paths, which a proxy may remove
    memory: MemoryBudget = field(default_factory=MemoryBudget)  # of all requests together
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

    def __post_init__(self) -> None:
        if not self.max_body_bytes > 0:
            raise InputError(f"the limit max_body_bytes is {self.max_body_bytes!r}; it must be above 0")


class AccessMiddleware:
    """Refuse what the policy does not accept; count and log every response.

    Metrics name `known_paths` and count all others as "other". `open_paths` need no key; one that ends in / stands for all
    below it. `worker_paths` need a worker's key where there are any keys.
    """

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        metrics: Metrics,
        *,
        known_paths: Collection[str],
        open_paths: Collection[str] = (),
        worker_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._policy = policy
        self._metrics = metrics
        self._known_paths = frozenset(known_paths)
        self._open_paths = frozenset(open_paths)
        self._open_folders = tuple(path for path in open_paths if path.endswith("/") and path != "/")
        self._worker_paths = frozenset(worker_paths)
        self._pool = BodyPool(max(policy.max_body_bytes, policy.memory.max_bytes // POOL_SHARE))
        self._running: dict[asyncio.Task[object], RequestScope] = {}
        self._stopping = False

    @property
    def policy(self) -> AccessPolicy:
        return self._policy

    @property
    def is_busy(self) -> bool:
        """Whether a client waits for the end of a response."""
        return any(not request.is_answered for request in self._running.values())

    def stop(self) -> None:
        """End the requests that still run, each with an error in the form of its protocol."""
        self._stopping = True
        for task, request in self._running.items():
            if not request.is_answered:
                task.cancel()

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
        request = RequestScope(scope, receive, send, policy, self._pool)
        current_client.set(self._client_of(request))
        started = time.perf_counter()
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = request
        try:
            refusal = self._refusal(request)
            if refusal is not None:
                await refusal(scope, receive, request.send)
            else:
                # HEAD is GET without the body, which the HTTP server leaves out.
                is_head = scope["method"] == "HEAD"
                await self._app(dict(scope, method="GET") if is_head else scope, request.receive, request.send)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            if request.status is None:
                error = as_api_error(ServerBusyError("the server is being stopped; ask another one", stopping=True))
                await error_response(error, route_path(scope))(scope, receive, request.send)
        finally:
            del self._running[task]
            request.release()
            self._log(scope, request.status, time.perf_counter() - started, record.error)

    def _client_of(self, request: RequestScope) -> str:
        """Name who sent a request. What a controller says is believed where it has a worker's key."""
        policy, authorization = self._policy, request.authorization
        named = request.header(CLIENT_HEADER)
        if named and policy.is_worker and policy.worker_keys and policy.worker_keys.allow(authorization):
            return named[:64]
        known = bool(policy.keys) and policy.keys.allow(authorization)
        return client_name(authorization if known else None, request.network)

    def _refusal(self, request: RequestScope) -> Response | None:
        policy, host, origin = self._policy, request.header("host"), request.header("origin")
        path, method = route_path(request.scope), request.scope["method"]
        name = _host_name(host)
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
        error = None if is_open else self._missing_key(path, request.authorization)
        if error is not None:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            return error_response(error, path, headers)
        if request.encoding not in (*PLAIN_ENCODINGS, *KNOWN_ENCODINGS):
            message = f"this server reads bodies that are plain or compressed by {', '.join(KNOWN_ENCODINGS)}"
            return error_response(ApiError(415, message, code="unknown_encoding"), path)
        length = request.header("content-length")
        if length.isdecimal() and int(length) > policy.max_body_bytes:
            message = _too_large(policy.max_body_bytes)
            return error_response(ApiError(413, message, code="body_too_large"), path, {"connection": "close"})
        return None

    def _missing_key(self, path: str, authorization: str) -> ApiError | None:
        """Return the error for a request without the key that its path needs."""
        policy = self._policy
        if path in self._worker_paths:
            if policy.keys and not policy.worker_keys:
                message = (
                    "this server has keys of clients and none of workers, so no worker can register: --worker-key-file"
                )
                return ApiError(403, message, code="no_worker_keys")
            if not policy.worker_keys.allow(authorization):
                message = "only workers may do this, with a worker's key: start them with --worker-key-file"
                return ApiError(401, message, code="invalid_worker_key")
            return None
        accepted = [keys for keys in (policy.keys, policy.worker_keys if policy.is_worker else None) if keys]
        if accepted and not any(keys.allow(authorization) for keys in accepted):
            message = "this server needs an API key: send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            return ApiError(401, message, code="invalid_api_key")
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
    """One request and its response: limits the size, the time and the memory of the body, and records the status."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, policy: AccessPolicy, pool: BodyPool) -> None:
        self.scope = scope
        self.status: int | None = None
        self.is_answered = False
        self._receive, self._send = receive, send
        self._policy = policy
        client = scope.get("client")
        self.network = network_of(client[0] if client else None)
        self._reservation = policy.memory.reserve()
        self._pool = pool
        self._body: ArrivingBody | None = None
        self._num_arrived = self._num_bytes = 0  # of the body, as it was sent and after decompression
        self._decoder = BodyDecoder(policy.max_body_bytes) if self.encoding in KNOWN_ENCODINGS else None
        self._is_complete = self._is_evicted = False
        self._started = asyncio.get_running_loop().time()
        self._waiting: asyncio.Timeout | None = None

    def header(self, name: str) -> str:
        key = name.encode()
        return next((value.decode("latin-1") for header, value in self.scope["headers"] if header == key), "")

    @property
    def encoding(self) -> str:
        """How the body is compressed."""
        return self.header("content-encoding").strip().lower()

    @property
    def authorization(self) -> str:
        return authorization_of(Headers(scope=self.scope))

    async def receive(self) -> Message:
        if self._is_complete:
            return await self._receive()
        message = await self._receive_part()
        if message["type"] == "http.request":
            self._num_arrived += len(message.get("body", b""))
            if self._decoder is not None:
                message = await self._decoded(message, self._decoder)
            self._take(len(message.get("body", b"")), complete=not message.get("more_body", False))
        return message

    async def _decoded(self, message: Message, decoder: BodyDecoder) -> Message:
        data, is_last = message.get("body", b""), not message.get("more_body", False)
        try:
            if len(data) > SMALL_PIECE:  # it may become a thousand times as large
                return dict(message, body=await asyncio.to_thread(decoder.decode, data, is_last=is_last))
            return dict(message, body=decoder.decode(data, is_last=is_last))
        except BodyTooLargeError:
            raise _closing(413, _too_large(self._policy.max_body_bytes)) from None
        except InputError as error:
            raise _closing(400, str(error)) from None

    async def _receive_part(self) -> Message:
        """Wait for more of the body: a while, and longer the more of it has come."""
        seconds = self._policy.connections.read_timeout_s
        try:
            async with asyncio.timeout_at(self._started + seconds + self._num_arrived / MIN_BODY_RATE) as self._waiting:
                if self._is_evicted:
                    raise TimeoutError
                return await self._receive()
        except TimeoutError:
            if self._is_evicted:
                raise _closing(429, "the server receives too many bodies at once; try again in a moment") from None
            raise _closing(
                408, f"the body did not arrive in time: within {seconds:g} s, and faster than 50 KB/s"
            ) from None
        finally:
            self._waiting = None

    def _take(self, num_bytes: int, *, complete: bool) -> None:
        self._num_bytes += num_bytes
        self._is_complete = complete
        if self._num_bytes > self._policy.max_body_bytes:
            raise _closing(413, _too_large(self._policy.max_body_bytes))
        if not complete:
            if self._body is None:
                self._body = ArrivingBody(current_client.get(), self._evict)
            self._pool.grow(self._body, num_bytes)
            return
        if self._body is not None:
            self._pool.remove(self._body)
        try:
            self._reservation.change(BODY_COPIES * self._num_bytes)
        except MemoryBudgetError as error:
            raise HTTPException(429, str(error)) from error
        except InputError as error:
            raise HTTPException(413, str(error)) from error

    def _evict(self) -> None:
        self._is_evicted = True
        if self._waiting is not None:
            self._waiting.reschedule(0.0)

    def release(self) -> None:
        """Give back what the request holds; at its end."""
        self._reservation.release()
        if self._body is not None:
            self._pool.remove(self._body)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body", False):
            self.is_answered = True
        await self._send(message)


def _id_headers(number: str, path: str) -> dict[str, str]:
    """The headers of a response that have the request's id; Anthropic's clients read one of their own."""
    return {REQUEST_ID: number} | ({"request-id": number} if path.startswith("/v1/messages") else {})


def _adding(added: dict[str, str], send: Send) -> Send:
    """Return `send` with headers added to the response, those too that `added` gets until it begins."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            # Blank space around a value, as the names of a client's fields may have it, is no valid header.
            pairs = [(name.encode(), value.strip().encode("latin-1")) for name, value in added.items()]
            message = dict(message, headers=[*message.get("headers", ()), *pairs])
        await send(message)

    return send_with_headers


def _shown(text: str) -> str:
    """A name that a client sent, for a sentence: short and printable."""
    short = text if len(text) <= 100 else text[:100] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", re.ASCII)


def _host_name(header: str) -> str:
    """Return the name in a Host header; an empty one for what is no name, or a name and a port."""
    match = HOST.fullmatch(header)
    return match[1].strip("[]").lower() if match else ""


def _closing(status: int, message: str) -> HTTPException:
    """An error after which the connection is closed, since the rest of the body is not read."""
    return HTTPException(status, message, {"connection": "close"})


def _too_large(limit: int) -> str:
    return f"the body is larger than the {limit:,} bytes that this server takes"
