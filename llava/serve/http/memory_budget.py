"""The memory that all requests of a server may hold together: bodies and images.

In: how many bytes a request reserves and releases. Out: nothing, or `MemoryBudgetError`, which a client gets as status 429.
limits.py bounds each request alone; this bounds the sum of those that wait or run.
"""

from __future__ import annotations

import threading

from llava.errors import InputError
from llava.serve.backends.base import ServerBusyError

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
