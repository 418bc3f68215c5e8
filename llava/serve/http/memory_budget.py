"""The memory that all requests of a server may hold together: bodies and images.

In: how many bytes a request reserves and releases. Out: nothing, or `MemoryBudgetError`, which a client gets as status 429.
limits.py bounds each request alone; this bounds the sum of those that wait or run. Bodies that are still arriving have a pool
of their own, so that those which never end take nothing from requests that are complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from llava.errors import InputError
from llava.serve.backends.base import ServerBusyError

POOL_SHARE = 4  # the pool for bodies that arrive is this part of the budget, and has room for one body at least
BODY_COPIES = 2  # the bytes, and what is parsed of them
DEFAULT_BYTES = 4096 * 2**20


class MemoryBudgetError(ServerBusyError):
    """The running requests hold all the memory that they may."""


class MemoryBudget:
    """Bytes held by all requests; shared by the threads of a server."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if not max_bytes > 0:
            raise InputError(f"the memory for requests is {max_bytes!r} bytes; it must be above 0")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()

    def reserve(self) -> Reservation:
        """Return the reservation of a new request, which holds nothing yet."""
        return Reservation(self)

    def change(self, num_bytes: int) -> None:
        """Add bytes, or subtract them where the number is negative.

        Raises:
            MemoryBudgetError: others hold too much at the moment.
            InputError: they are more than all requests together may hold.
        """
        if num_bytes > self.max_bytes:
            raise InputError(
                f"{num_bytes:,} bytes of memory are needed for this, and all requests together may hold {self.max_bytes:,}; "
                "send less"
            )
        with self._lock:
            if num_bytes > 0 and self.num_bytes + num_bytes > self.max_bytes:
                raise MemoryBudgetError(
                    f"running requests hold {self.num_bytes:,} of the {self.max_bytes:,} bytes that they may hold "
                    "together; try again in a moment"
                )
            self.num_bytes += num_bytes


class Reservation:
    """The bytes that one request holds. A thread that goes on after the request's end can hold no more."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._is_over = False
        self.num_bytes = 0

    def change(self, num_bytes: int) -> None:
        """Hold more bytes, or fewer where the number is negative."""
        with self._lock:
            if self._is_over and num_bytes > 0:
                raise MemoryBudgetError("the request has ended")
            if not self._is_over:
                self._budget.change(num_bytes)
                self.num_bytes += num_bytes

    def shrink_to(self, num_bytes: int) -> None:
        """Release all but `num_bytes`."""
        self.change(-max(0, self.num_bytes - num_bytes))

    def release(self) -> None:
        """Release everything, for good."""
        with self._lock:
            self._budget.change(-self.num_bytes)
            self.num_bytes, self._is_over = 0, True


class ArrivingBody:
    """The part of a body that has arrived. `evict` is called when it must make room for others'."""

    def __init__(self, client: str, evict: Callable[[], None]) -> None:
        self.client = client
        self.evict = evict
        self.num_bytes = 0


class BodyPool:
    """Bytes of bodies that are still arriving, of all clients; for one event loop.

    Where the pool is full, the client that holds most loses the body that it began first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._bodies: dict[str, dict[ArrivingBody, None]] = {}
        self._held: dict[str, int] = {}

    def grow(self, body: ArrivingBody, num_bytes: int) -> None:
        self._bodies.setdefault(body.client, {})[body] = None
        self._held[body.client] = self._held.get(body.client, 0) + num_bytes
        body.num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes and self._bodies:
            largest = max(self._held, key=self._held.__getitem__)
            first = next(iter(self._bodies[largest]))
            self.remove(first)
            first.evict()

    def remove(self, body: ArrivingBody) -> None:
        """Remove a body that is complete, refused or given up; one that is not there is left alone."""
        bodies = self._bodies.get(body.client, {})
        if body not in bodies:
            return
        del bodies[body]
        self.num_bytes -= body.num_bytes
        self._held[body.client] -= body.num_bytes
        if not bodies:
            del self._bodies[body.client], self._held[body.client]
