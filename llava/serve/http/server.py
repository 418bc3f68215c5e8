"""Run an ASGI application until a signal comes, then finish the running requests.

In: an ASGI application and a bound socket. Out: an exit status. On SIGTERM or Ctrl-C no new requests are taken, and running
ones have a limited time to finish; a second signal ends the process at once. The socket is bound before the address is
announced, so port 0 (any free one) works everywhere.
"""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.serve.process import freeze_heap, shorten_switch_interval

if TYPE_CHECKING:
    from starlette.types import ASGIApp

# h11 even where httptools is installed, which is faster but accepts two Host headers, unfinished heads and trailers as headers.
PARSER = "h11"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; `InputError` where the address cannot be used."""
    if not 0 <= port <= 65535:  # getaddrinfo takes larger ones modulo 65536
        raise InputError(f"--port is {port}; give 0 (any free one) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"{host!r} is no address of this machine: {error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host} port {port}: {reason}; pick another --port (0: any)") from error
    listener.set_inheritable(True)
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """Return the http URL of a bound socket. A socket for all addresses is named by its loopback address."""
    port = listener.getsockname()[1]
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
    app: ASGIApp,
    listener: socket.socket,
    *,
    drain_s: float,
    started: Callable[[], None] = lambda: None,
    drain: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Serve until a signal comes; return 0, or 1 where the server did not start.

    `started` is called once requests are accepted, `drain` awaited at the signal, before requests are refused. Running requests
    then have `drain_s` seconds to finish.
    """
    import uvicorn

    class DrainingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                freeze_heap()
                started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if drain is not None:
                await drain()
            await super().shutdown(sockets=sockets)

    shorten_switch_interval()
    config = uvicorn.Config(
        app,
        http=PARSER,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        proxy_headers=False,  # uvicorn would believe any sender of this machine; forwarded.py decides
        timeout_graceful_shutdown=max(1, int(drain_s)),
        backlog=2048,
    )
    server = DrainingServer(config)
    # After an orderly stop uvicorn raises the signal again, which would end the process with a failure status.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else 1
