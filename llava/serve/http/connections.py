"""The connections of a server's clients: how many there may be, and how long one may take to send a request's head.

In: connections as they are accepted. Out: the same under limits. A connection that waits for a request is closed to make room
for a new one; one whose request is being answered is not. How long a body may take is checked in middleware.py.
"""

from __future__ import annotations

import asyncio
import http
import ipaddress
import logging
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava.errors import InputError
from llava.serve.http.forwarded import TrustedProxies

logger = logging.getLogger("llava.serve")

SPARE_DESCRIPTORS = 64  # for everything that is no client's connection
WANTED_DESCRIPTORS = 65536
ACCEPTED_AT_ONCE = 16  # before the table is asked
REPORT_S = 60.0  # between log lines about descriptors
DEFAULT_CONNECTIONS = 512  # where the system does not say how many descriptors a process may have


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections may be open, and how long a head may take."""

    max_connections: int = DEFAULT_CONNECTIONS
    max_per_client: int = DEFAULT_CONNECTIONS // 2
    read_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_per_client", "read_timeout_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"the limit {name} is {getattr(self, name)!r}; it must be above 0")

    @classmethod
    def given(
        cls, max_connections: int | None, max_per_client: int | None, *, read_timeout_s: float
    ) -> ConnectionLimits:
        """Choose what is None: half of the file descriptors that the process may have, and half of that for one client."""
        num_descriptors = raise_descriptor_limit()
        most = max(1, num_descriptors - SPARE_DESCRIPTORS)
        if max_connections is not None and max_connections > most:
            raise InputError(
                f"--max-connections is {max_connections}, and this process may have {num_descriptors} file descriptors; "
                f"give at most {most}, or raise the limit (ulimit -n)"
            )
        total = max_connections if max_connections is not None else max(1, most // 2)
        return cls(total, max_per_client if max_per_client is not None else max(1, total // 2), read_timeout_s)


def raise_descriptor_limit() -> int:
    """Let the process open as many files as the system allows, within reason; returns how many."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return 2 * DEFAULT_CONNECTIONS + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, WANTED_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return WANTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted


def network_of(host: str | None) -> str:
    """Return what counts as one client: an IPv4 address, or the 64 bits of an IPv6 address that a site hands out."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return ""  # a socket without addresses, as a unix socket
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ipaddress.IPv6Network((address, 64), strict=False))
        return "127.0.0.1"
    return "127.0.0.1" if address.is_loopback else str(address)


class ConnectionTable:
    """The open connections of each client, and those among them that wait for a request, the longest-waiting first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._by_client: dict[str, set[LimitedProtocol]] = {}
        self._waiting: dict[str, OrderedDict[LimitedProtocol, None]] = {}
        self._num_open = 0

    def admit(self, connection: LimitedProtocol) -> bool:
        """Take in a new connection, in the place of a waiting one where all are taken; False where none waits."""
        client = connection.client_network
        if (
            client
            and len(self._by_client.get(client, ())) >= self.limits.max_per_client
            and not self._close_one(client)
        ):
            return False
        if self._num_open >= self.limits.max_connections:
            most = max(self._by_client, key=lambda name: len(self._by_client[name]))
            if not self._close_one(most) and not any(self._close_one(name) for name in list(self._waiting)):
                return False
        self._by_client.setdefault(client, set()).add(connection)
        self._num_open += 1
        self.note_waiting(connection)
        return True

    def note_waiting(self, connection: LimitedProtocol) -> None:
        self._waiting.setdefault(connection.client_network, OrderedDict())[connection] = None

    def note_answering(self, connection: LimitedProtocol) -> None:
        waiting = self._waiting.get(connection.client_network)
        if waiting is not None and waiting.pop(connection, self) is None and not waiting:
            del self._waiting[connection.client_network]

    def remove(self, connection: LimitedProtocol) -> None:
        client = connection.client_network
        connections = self._by_client.get(client, set())
        if connection in connections:
            connections.remove(connection)
            self._num_open -= 1
            if not connections:
                del self._by_client[client]
        self.note_answering(connection)

    def _close_one(self, client: str) -> bool:
        waiting = self._waiting.get(client)
        if not waiting:
            return False
        connection = next(iter(waiting))
        self.remove(connection)
        connection.transport.abort()
        return True


class LimitedProtocol(H11Protocol):
    """A connection under limits. h11 even where httptools is installed, which takes two Host headers and unfinished heads."""

    table: ConnectionTable  # set by `protocol_class`, as the next
    proxies: TrustedProxies  # behind which there are many clients, so that they count as none

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._answering = False
        host = self.client[0] if self.client else None
        self.client_network = "" if self.proxies.trust(host) else network_of(host)
        if self.table.admit(self):
            self._start_timer()
        else:
            self._refuse(429, "this client has too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self.table.remove(self)
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head_timer is None and not self._has_request:
            self._start_timer()
        super().data_received(data)
        self._update()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update()

    def send_400_response(self, msg: str) -> None:
        reason = sys.exc_info()[1] or msg
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, f"this is not an HTTP request: {reason}")
        else:  # the answer to the request before has begun
            self.transport.close()

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _update(self) -> None:
        if self._has_request:
            self._stop_timer()
        answering = self._has_request and not self.cycle.more_body
        if answering != self._answering:
            self._answering = answering
            (self.table.note_answering if answering else self.table.note_waiting)(self)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.table.limits.read_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_timeout(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self._has_request:
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request did not arrive within {self.table.limits.read_timeout_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, and close the connection."""
        logger.info("- - %d %s", status, message)
        if self._has_request:  # whose body turned out to be none: what the application answers is not sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = message.encode("ascii", "replace")
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        headers.append(("content-length", str(len(body))))
        try:
            reason = http.HTTPStatus(status).phrase
            output = self.conn.send(h11.Response(status_code=status, headers=headers, reason=reason))
            output += self.conn.send(h11.Data(data=body)) + self.conn.send(h11.EndOfMessage())
            self.transport.write(output)
        except h11.LocalProtocolError:  # what came before it does not allow an answer
            pass
        self.transport.close()


def protocol_class(limits: ConnectionLimits, proxies: TrustedProxies | None = None) -> type[LimitedProtocol]:
    """Return the protocol of one server, whose connections share the limits. That for one client is not for proxies."""
    shared = {"table": ConnectionTable(limits), "proxies": proxies or TrustedProxies()}
    return type("ServerProtocol", (LimitedProtocol,), shared)


class AcceptErrors:
    """An event loop's handler of errors: one line a minute where no descriptor is left, not a traceback for every try."""

    def __init__(self) -> None:
        self._next_report = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or "accept" not in str(context.get("message")):
            loop.default_exception_handler(context)
        elif loop.time() >= self._next_report:
            self._next_report = loop.time() + REPORT_S
            logger.error("no new connections are accepted for the moment: %s", error.strerror)
