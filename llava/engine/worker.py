"""The thread behind an engine: its inbox, the requests that are in it, and how each of them ends.

In: requests and aborts from other threads, as messages in an inbox. What the thread does with a request is the subclass's:
loop.py computes many together, hf_engine.py one after another.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch

from llava.engine.config import EngineClosed, EngineError, QueueFull
from llava.engine.handle import Wakeups
from llava.engine.sequence import RequestState
from llava.errors import InputError

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row, after which the device counts as broken


class EngineWorker(ABC):
    """One thread. A request that fails gets its error, and the thread continues."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self.wakeups = Wakeups()
        self._ids: set[str] = set()  # of requests submitted and not finished
        self._requests: dict[str, RequestState] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.num_waiting = 0
        self.num_finished = 0
        self._num_failed_steps = 0  # in a row
        self._thread = threading.Thread(target=self._run, name="llava-engine", daemon=True)

    # Other threads' side.

    def add(self, request: RequestState, *, wait: bool) -> None:
        """Queue a request.

        Args:
            request: The request, whose id is unique among those not finished.
            wait: Wait while the queue is full.

        Raises:
            QueueFull: The queue is full, without `wait`.
            EngineClosed: The thread has ended.
        """
        request_id = request.handle.request_id
        with self._changed:
            while self.num_waiting >= self._max_waiting and not self._closing:
                if not wait:
                    raise QueueFull(f"{self.num_waiting} requests are waiting, and no more are taken; try again later")
                self._changed.wait(1.0)
            if self._closing:
                raise EngineClosed("the engine is closed; make a new one")
            if request_id in self._ids:
                raise InputError(f"there is a request {request_id!r} already; give each one an id of its own")
            self._ids.add(request_id)
            self.num_waiting += 1
            self._inbox.append(lambda: self._admit(request))
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._inbox.append(lambda: self._cancel(request_id))
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
        except Exception as error:  # a fault of the loop's own: its counts may be wrong from here on
            logger.exception("the engine stopped")
            with self._changed:
                self._closing = True
            self._read_inbox(wait=False)
            for request in list(self._requests.values()):
                self._forget(request)
                request.handle.fail(EngineError(f"the engine stopped: {type(error).__name__}: {error}"))
        for request_id in list(self._requests):
            self._cancel(request_id)
        self.wakeups.send()

    @abstractmethod
    def _loop(self) -> None:
        """Read the inbox and compute, until `_read_inbox` says that the engine is closed."""

    @abstractmethod
    def _admit(self, request: RequestState) -> None:
        """Take a request in; a subclass calls this first."""
        self._requests[request.handle.request_id] = request

    def _read_inbox(self, *, wait: bool) -> bool:
        """Do what other threads asked for; returns False when the engine is closed."""
        with self._changed:
            while wait and not self._inbox and not self._closing:
                self._changed.wait()
            messages, self._inbox = self._inbox, deque()
        for message in messages:
            message()
        return not self._closing

    def _begin(self, request: RequestState) -> None:
        request.begun = time.perf_counter()
        with self._changed:
            self.num_waiting -= 1
            self._changed.notify_all()  # whoever waits for room in the queue

    def _forget(self, request: RequestState) -> None:
        del self._requests[request.handle.request_id]
        with self._changed:
            self._ids.discard(request.handle.request_id)

    def _remove(self, request: RequestState) -> None:
        """Remove a request that has not finished; what it holds is free at once. A subclass extends this."""
        self._forget(request)
        if request.begun is None:
            self._begin(request)

    def _complete(self, request: RequestState) -> None:
        self._forget(request)
        request.complete()
        request.release()
        self.num_finished += 1

    def _cancel(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._remove(request)
            request.cancel()
            request.release()

    def _note_step(self, error: Exception | None = None) -> None:
        """Count failed steps. A device that fails again and again, as after a CUDA error, does not recover in this process.

        Raises:
            RuntimeError: So many steps in a row have failed.
        """
        if error is None:
            self._num_failed_steps = 0
        elif not isinstance(error, (InputError, torch.OutOfMemoryError)):
            self._num_failed_steps += 1
            if self._num_failed_steps == MAX_FAILED_STEPS:
                raise RuntimeError(f"{MAX_FAILED_STEPS} steps in a row failed, the last with: {error}") from error

    def _fail(self, request: RequestState, error: Exception) -> None:
        self._remove(request)
        request.release()
        if isinstance(error, InputError):
            request.handle.fail(error)
            return
        logger.exception("a step of the engine failed", exc_info=error)
        failure = EngineError(f"a step of the engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        request.handle.fail(failure)
