"""The memory that all requests of a server may hold together: bodies as they come in, and images.

In: how many bytes a request takes and gives back. Out: nothing, or `NoRoomError`, which a client is told as a full server. One
request alone is bounded by limits.py; this bounds many that wait together.
"""

from __future__ import annotations

import threading

from llava.errors import InputError
from llava.serve.backends.base import ServerBusyError

BODY_COPIES = 2  # the bytes, and what is parsed of them
BYTES_PER_PIXEL = 4  # of an opened image
DEFAULT_ROOM = 4096 * 2**20


class NoRoomError(ServerBusyError):
    """The requests on their way hold as many bytes as they may."""


class Room:
    """Shared by the threads of a server."""

    def __init__(self, max_bytes: int = DEFAULT_ROOM) -> None:
        if not max_bytes > 0:
            raise InputError(f"the room for requests is {max_bytes!r} bytes; it must be above 0")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()

    def share(self) -> Share:
        """What one request holds; nothing yet."""
        return Share(self)

    def change(self, num_bytes: int) -> None:
        """Take bytes, or give them back where the number is negative."""
        with self._lock:
            if num_bytes > 0 and self.num_bytes + num_bytes > self.max_bytes:
                raise NoRoomError(
                    f"the requests on their way hold {self.num_bytes:,} of the {self.max_bytes:,} bytes that they may hold "
                    "together; try again in a moment"
                )
            self.num_bytes += num_bytes


class Share:
    def __init__(self, room: Room) -> None:
        self._room = room
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        self._room.change(num_bytes)
        self.num_bytes += num_bytes

    def shrink_to(self, num_bytes: int) -> None:
        """Give back all but so many."""
        given_back = max(0, self.num_bytes - num_bytes)
        self.num_bytes -= given_back
        self._room.change(-given_back)
