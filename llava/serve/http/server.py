"""Run an ASGI application until a signal comes, then finish the running requests.

In: an ASGI application and bound sockets. Out: an exit status. On SIGTERM or Ctrl-C no new requests are taken, and running
ones have a limited time to finish; a second signal ends the process at once. Sockets are bound before the address is
announced, so port 0 (any free one) works everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.serve.process import freeze_heap, shorten_switch_interval

if TYPE_CHECKING:
    from llava.serve.http.middleware import AccessMiddleware

logger = logging.getLogger("llava.serve")

TRIES = 20  # to find a port that is free in both families

BACKLOG = 2048  # connections that the system holds before they are accepted
LAST_WORDS_S = 3  # for errors to be sent at the end of the drain time


def bind(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets: one, or for localhost one of each family that the machine has, on the same port.

    Raises:
        InputError: The address cannot be used.
    """
    if not 0 <= port <= 65535:  # getaddrinfo takes larger ones modulo 65536
        raise InputError(f"--port is {port}; give 0 (any free one) to 65535")
    if host == "localhost":
        return _bind_loopback(port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"{host!r} is no address of this machine: {error}") from error
    family, _, _, _, address = found[0]
    try:
        return [_listen(family, address)]
    except (OSError, OverflowError) as error:
        raise _unusable(host, port, error) from error


def _bind_loopback(port: int) -> list[socket.socket]:
    """Listen on 127.0.0.1 and ::1, whatever the machine's names say; on one of them where it has no other."""
    for _ in range(TRIES if port == 0 else 1):
        first = second = None
        try:
            first = _listen(socket.AF_INET, ("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _unusable("localhost", port, error) from error
        chosen = port if first is None else first.getsockname()[1]
        try:
            second = _listen(socket.AF_INET6, ("::1", chosen))
        except OSError as error:
            if first is None:
                raise _unusable("localhost", port, error) from error
            if error.errno == errno.EADDRINUSE:  # of another program, whose clients would come here by IPv4
                first.close()
                if port != 0:
                    raise _unusable("localhost", port, error) from error
                continue
        return [listener for listener in (first, second) if listener is not None]
    raise InputError(f"no port is free on both 127.0.0.1 and ::1 after {TRIES} tries; give one by --port")


def _listen(family: int, address: tuple[object, ...] | str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix" and not isinstance(address, str):  # elsewhere it lets two programs share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::1":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    listener.set_inheritable(True)
    return listener


def bind_unix(path: Path) -> list[socket.socket]:
    """Return a listening unix socket, which the user and the group of this process may connect to.

    Raises:
        InputError: The path cannot be used, or another program listens there.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise InputError("--uds: this system has no unix sockets; give --port")
    name = str(path)
    try:
        if path.is_socket():  # of a server that was killed, unless something answers
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(name) == 0:
                    raise InputError(f"another program listens at {name!r}; give another --uds")
            path.unlink()
        listener = _listen(socket.AF_UNIX, name)
        path.chmod(0o660)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen at {name!r}: {reason}; give another --uds") from error
    return [listener]


def _unusable(host: str, port: int, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"cannot listen on {host} port {port}: {reason}; pick another --port (0: any)")


def url_of(listeners: Sequence[socket.socket], host: str) -> str:
    """Return the http URL of bound sockets. A socket for all addresses is named by its loopback address."""
    port = listeners[0].getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run_server(
    app: AccessMiddleware,
    listeners: Sequence[socket.socket],
    *,
    drain_s: float,
    started: Callable[[], None] = lambda: None,
    drain: Callable[[], Awaitable[None]] | None = None,
    lost: Callable[[], str | None] = lambda: None,
) -> int:
    """Serve until a signal comes, or until `lost` says why the server cannot work any more.

    `started` is called once requests are accepted, `drain` awaited at the signal, before requests are refused. Running requests
    then have `drain_s` seconds to finish; those that have not get an error. A second signal ends the process at once, with
    its answers.

    Returns:
        0 after a signal; 1 where the server did not start, or was lost.
    """
    import uvicorn

    from llava.serve.http.connections import ACCEPTED_AT_ONCE, AcceptErrors, protocol_class

    failures: list[str] = []

    class DrainingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().set_exception_handler(AcceptErrors())
            await super().startup(sockets=sockets)
            if self.started:
                for listener in listeners:
                    listener.listen(BACKLOG)  # uvicorn has set it to the number that is accepted at once
                freeze_heap()
                started()

        async def on_tick(self, counter: int) -> bool:
            problem = lost()
            if problem is not None:
                logger.critical("%s; this server ends, to be started again", problem)
                failures.append(problem)
            return await super().on_tick(counter) or problem is not None

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if drain is not None:
                await drain()
            asyncio.get_running_loop().call_later(0.0 if failures else drain_s, app.stop)
            await super().shutdown(sockets=sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit and (app.is_busy or len(self._captured_signals) > 1):
                logger.warning("another signal: ending at once")
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

    names = [name for listener in listeners if isinstance(name := listener.getsockname(), str)]  # of unix sockets
    shorten_switch_interval()
    config = uvicorn.Config(
        app,
        http=protocol_class(app.policy.connections, app.policy.proxies),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        proxy_headers=False,  # uvicorn would believe any sender of this machine; forwarded.py decides
        timeout_graceful_shutdown=math.ceil(drain_s) + LAST_WORDS_S,
        backlog=ACCEPTED_AT_ONCE,
    )
    server = DrainingServer(config)
    # After an orderly stop uvicorn raises the signal again, which would end the process with a failure status.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=list(listeners))
    for name in names:
        Path(name).unlink(missing_ok=True)
    return 0 if server.started and not failures else 1
