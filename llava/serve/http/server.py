"""Run an application until it is told to stop, and then let what is on its way finish.

In: an ASGI application and an address. Out: an exit status. SIGTERM and Ctrl-C stop the taking of new requests, wait for the
running ones up to a limit, and end; a second signal ends at once. The address is bound before anything is announced, so
port 0 (any free one) works everywhere.
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from llava.errors import InputError

SWITCH_S = 0.0005  # Python's own is ten times as long
PARSER = "h11"  # not what is installed: the faster one takes two Hosts, heads without an end, and trailers for headers
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, or one sentence about why not."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"{host!r} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host} port {port}: {reason}; pick another --port (0: any free one)"
        ) from error
    listener.set_inheritable(True)
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """The http address of a bound socket. A socket for all addresses is reached under this machine's loopback name."""
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


def keep_for_good() -> None:
    """Leave what is there now, modules and a model, out of garbage collection: to look through all of it takes a quarter of
    a second, in which no thread answers anybody."""
    gc.collect()
    gc.freeze()


def run_server(
    app: Any,
    listener: socket.socket,
    *,
    drain_s: float,
    started: Callable[[], None] = lambda: None,
    drain: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Serve until a signal comes. `started` is called when requests are taken, `drain` when they are to be no longer."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                keep_for_good()
                started()

        async def shutdown(self, sockets: Any = None) -> None:
            if drain is not None:
                await drain()
            await super().shutdown(sockets=sockets)

    # The engine's thread comes back from its device many times a second, and shall not wait for the event loop for long.
    sys.setswitchinterval(SWITCH_S)
    config = uvicorn.Config(
        app,
        http=PARSER,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, int(drain_s)),
        backlog=2048,
    )
    server = Server(config)
    # Once it has stopped in good order, uvicorn raises the signal again; that shall not look like a failure.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else 1


def set_up_logging(level: str) -> None:
    """Our servers' lines on stderr; uvicorn's own only where something is wrong."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are of what strangers send, one for each
    logging.getLogger("llava").setLevel(level.upper())
