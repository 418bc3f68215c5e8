"""A pipe of pickled values between two processes of one program, over a pair of sockets.

In and out: anything that pickles, so both ends must trust each other: a parent and the child that it started. Sending does not
wait: a thread does it, in order.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

LENGTH = struct.Struct("!Q")
CLOSE_S = 10.0  # for what is still to be sent
_CLOSED = object()


class MessagePipe:
    """One end. Any thread may `send`; iterating reads until the other end is closed, or its process gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._incoming = end.makefile("rb")
        self._outgoing: SimpleQueue[object] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="llava-pipe", daemon=True)
        self._sender.start()

    def send(self, value: object) -> None:
        self._outgoing.put(value)

    def __iter__(self) -> Iterator[Any]:
        while (value := self.read(default=_CLOSED)) is not _CLOSED:
            yield value

    def read(self, *, default: Any) -> Any:
        """The next value; `default` at the end, or where the pipe ends within a value."""
        try:
            head = self._incoming.read(LENGTH.size)
            length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else 0
            data = self._incoming.read(length)
        except OSError:
            return default
        return pickle.loads(data) if data and len(data) == length else default

    def close(self) -> None:
        """Send what is still to be sent, and close this end; the other one's reading ends."""
        self._outgoing.put(_CLOSED)
        self._sender.join(CLOSE_S)
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()

    def _send(self) -> None:
        try:
            while (value := self._outgoing.get()) is not _CLOSED:
                data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
                self._end.sendall(LENGTH.pack(len(data)))
                self._end.sendall(data)
        except OSError:  # the other end is closed, which reading finds out
            return
        except BaseException:  # a value that does not pickle: close, so that the other end does not wait
            self._end.shutdown(socket.SHUT_RDWR)
            raise
