"""Choose the worker for each request: the controller's table of workers, without HTTP.

In: registrations, heartbeats, and a model's name for each request. Out: a worker's address, or None. The clock and the random
generator are arguments, so that tests are deterministic.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.errors import InputError
from llava.serve.router.protocol import WorkerStatus

MAX_CONVERSATIONS = 100_000  # whose worker is remembered; the oldest are dropped
STICKY_SLACK = 4  # requests that a conversation's worker may have more than the least loaded one, before it moves


@dataclass
class Worker:
    """A registered worker."""

    name: str
    status: WorkerStatus
    check_heart_beat: bool
    last_heart_beat: float
    queue_length: int
    unreachable_since: float | None = None

    @property
    def load(self) -> float:
        return self.queue_length / self.status.speed


class Dispatcher:
    """The registered workers, and the choice among them.

    "shortest_queue" takes the shortest queue relative to speed; a chosen worker's queue counts the request until the next
    heartbeat reports its length. "lottery" draws with probabilities proportional to speed. Workers of speed 0 are
    never chosen.
    """

    def __init__(
        self,
        method: str = "shortest_queue",
        *,
        expiration_s: float = CONTROLLER_HEART_BEAT_EXPIRATION,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"unknown dispatch method {method!r}; known: {', '.join(METHODS)}")
        self._choose = METHODS[method]
        self.expiration_s = expiration_s
        self._clock = clock
        self._rng = rng or random.Random()
        self._workers: dict[str, Worker] = {}
        self._sticky: OrderedDict[str, str] = OrderedDict()  # conversation -> worker

    # The table.

    def register(self, name: str, status: WorkerStatus, *, check_heart_beat: bool) -> None:
        self._workers[name] = Worker(name, status, check_heart_beat, self._clock(), status.queue_length)

    def unregister(self, name: str) -> bool:
        return self._workers.pop(name, None) is not None

    def heart_beat(self, name: str, queue_length: int) -> bool:
        """Record a heartbeat; False for a worker that must register first."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.last_heart_beat, worker.queue_length, worker.unreachable_since = self._clock(), queue_length, None
        return True

    def mark_unreachable(self, name: str) -> None:
        """Do not choose a worker until its next heartbeat, or until a heartbeat's expiration has passed."""
        if name in self._workers:
            self._workers[name].unreachable_since = self._clock()

    def drop_expired(self) -> list[str]:
        """Remove the workers whose heartbeats are checked and have stopped; return their names."""
        limit = self._clock() - self.expiration_s
        expired = [w.name for w in self._workers.values() if w.check_heart_beat and w.last_heart_beat < limit]
        for name in expired:
            del self._workers[name]
        return expired

    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def model_names(self) -> list[str]:
        """Return every model once, in the order of registration."""
        return list(dict.fromkeys(name for worker in self._workers.values() for name in worker.status.model_names))

    # Choosing.

    def choose(self, model: str, *, conversation: str | None = None, without: Collection[str] = ()) -> str | None:
        """Choose a worker of a model and count the request in its queue; None where there is no such worker.

        A conversation keeps its worker, unless that is busy. Workers in `without` are not chosen.
        """
        candidates = [
            worker
            for worker in self._workers.values()
            if model in worker.status.model_names
            and worker.status.speed > 0
            and worker.name not in without
            and self._is_reachable(worker)
        ]
        if not candidates:
            return None
        worker = self._sticky_worker(conversation, candidates) or self._choose(candidates, self._rng)
        worker.queue_length += 1
        if conversation is not None:
            self._sticky[conversation] = worker.name
            self._sticky.move_to_end(conversation)
            if len(self._sticky) > MAX_CONVERSATIONS:
                self._sticky.popitem(last=False)
        return worker.name

    @contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """Remove the request from the chosen worker's queue when the block ends."""
        try:
            yield
        finally:
            worker = self._workers.get(name)
            if worker is not None:
                worker.queue_length = max(0, worker.queue_length - 1)

    def _is_reachable(self, worker: Worker) -> bool:
        return worker.unreachable_since is None or self._clock() - worker.unreachable_since > self.expiration_s

    def _sticky_worker(self, conversation: str | None, candidates: list[Worker]) -> Worker | None:
        name = self._sticky.get(conversation) if conversation is not None else None
        previous = next((worker for worker in candidates if worker.name == name), None)
        if (
            previous is None
            or previous.load > min(worker.load for worker in candidates) + STICKY_SLACK / previous.status.speed
        ):
            return None
        return previous


def _shortest_queue(candidates: list[Worker], rng: random.Random) -> Worker:
    return min(candidates, key=lambda worker: worker.load)


def _lottery(candidates: list[Worker], rng: random.Random) -> Worker:
    return rng.choices(candidates, weights=[worker.status.speed for worker in candidates])[0]


METHODS = {"lottery": _lottery, "shortest_queue": _shortest_queue}
