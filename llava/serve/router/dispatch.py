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
from llava.errors import InputError, shortened
from llava.serve.http.keys import same_key
from llava.serve.router.protocol import WorkerStatus

MAX_CONVERSATIONS = 100_000  # whose worker is remembered; the oldest are dropped
MAX_WORKERS = 1024
MAX_MODELS = 4096  # of all workers together
UNHEARD = 4  # times the expiration, after which a worker goes that was not heard of in any way
STICKY_SLACK = 4  # requests that a conversation's worker may have more than the least loaded one, before it moves


@dataclass
class Worker:
    """A registered worker.

    `url` is where it is reached, `host_header` its own name for that, `key` the key that it showed when it registered. It is
    `silent` where connections are accepted and nothing comes, as from a stopped process.
    """

    name: str
    status: WorkerStatus
    check_heart_beat: bool
    last_heart_beat: float
    last_heard: float
    queue_length: int
    url: str
    key: str | None = None
    host_header: str | None = None
    unreachable_since: float | None = None
    silent: bool = False
    num_failures: int = 0

    @classmethod
    def unknown(cls, name: str, *, url: str, host_header: str | None, key: str | None) -> Worker:
        """A worker that is to be asked for its status before it is registered."""
        return cls(name, WorkerStatus((), 0, 0), False, 0.0, 0.0, 0, url, key, host_header)

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
        self._by_model: dict[str, dict[str, Worker]] = {}
        self._sticky: OrderedDict[str, str] = OrderedDict()  # conversation -> worker

    # The table.

    def register(
        self,
        name: str,
        status: WorkerStatus,
        *,
        check_heart_beat: bool,
        url: str | None = None,
        host_header: str | None = None,
        key: str | None = None,
    ) -> None:
        """Add a worker, or take its new status.

        Raises:
            InputError: the table is full, or another key registered this name.
        """
        known = self._workers.get(name)
        if known is not None and not same_key(known.key, key):
            raise InputError(f"the worker {shortened(name)!r} was registered with another key")
        if known is None and len(self._workers) >= MAX_WORKERS:
            raise InputError(f"{MAX_WORKERS} workers are registered, and no more are taken")
        others = self._by_model.keys() if known is None else self._by_model.keys() - set(known.status.model_names)
        if len(set(others) | set(status.model_names)) > MAX_MODELS:
            raise InputError(f"the workers have {MAX_MODELS} models together, and no more are taken")
        now = self._clock()
        url = (url or name).rstrip("/")
        worker = Worker(name, status, check_heart_beat, now, now, status.queue_length, url, key, host_header)
        if known is not None:
            worker.num_failures = known.num_failures
        self.remove(name)
        self._workers[name] = worker
        for model in status.model_names:
            self._by_model.setdefault(model, {})[name] = worker

    def unregister(self, name: str, *, key: str | None = None) -> bool:
        """Remove a worker; False where there is none of this name and key."""
        worker = self._workers.get(name)
        return worker is not None and same_key(worker.key, key) and self.remove(name)

    def heart_beat(self, name: str, queue_length: int, *, key: str | None = None) -> bool:
        """Record a heartbeat; False for a worker that must register first."""
        worker = self._workers.get(name)
        if worker is None or not same_key(worker.key, key):
            return False
        worker.last_heart_beat = worker.last_heard = self._clock()
        worker.queue_length, worker.unreachable_since = queue_length, None
        return True

    def note_status(self, name: str, status: WorkerStatus) -> None:
        """Record that a worker has answered: it is chosen again where it was not."""
        worker = self._workers.get(name)
        if worker is None:
            return
        if status.model_names != worker.status.model_names or status.speed != worker.status.speed:
            known = {"url": worker.url, "host_header": worker.host_header, "key": worker.key}
            self.register(name, status, check_heart_beat=worker.check_heart_beat, **known)
            self._workers[name].last_heart_beat = worker.last_heart_beat
            return
        worker.last_heard, worker.unreachable_since, worker.silent = self._clock(), None, False

    def mark_unreachable(self, name: str, *, silent: bool = False) -> None:
        """Choose others before this worker, until it is heard of or a heartbeat's expiration has passed.

        A `silent` one is not chosen at all until it has answered.
        """
        worker = self._workers.get(name)
        if worker is not None:
            worker.unreachable_since = self._clock()
            worker.silent = worker.silent or silent
            worker.num_failures += 1

    def drop_expired(self) -> list[str]:
        """Remove the workers that are not heard of any more; return their names.

        One whose heartbeats are checked must send them; any other must answer questions about its status.
        """
        limit = self._clock() - self.expiration_s
        unheard = self._clock() - UNHEARD * self.expiration_s
        expired = [
            worker.name
            for worker in self._workers.values()
            if (worker.check_heart_beat and worker.last_heart_beat < limit) or worker.last_heard < unheard
        ]
        for name in expired:
            self.remove(name)
        return expired

    def remove(self, name: str) -> bool:
        """Remove a worker, whatever its key; False where there is none of this name."""
        worker = self._workers.pop(name, None)
        if worker is None:
            return False
        for model in worker.status.model_names:
            workers = self._by_model.get(model, {})
            workers.pop(name, None)
            if not workers:
                self._by_model.pop(model, None)
        return True

    def worker(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def workers_of(self, model: str) -> list[Worker]:
        return list(self._by_model.get(model, {}).values())

    def model_names(self) -> list[str]:
        """Return every model once, in the order of registration."""
        return list(self._by_model)

    # Choosing.

    def choose(self, model: str, *, conversation: str | None = None, without: Collection[str] = ()) -> str | None:
        """Choose a worker of a model and count the request in its queue; None where there is no such worker.

        A conversation keeps its worker, unless that is busy. Workers in `without` are not chosen, unreachable ones only
        where there is no other.
        """
        able = [
            worker
            for worker in self._by_model.get(model, {}).values()
            if worker.status.speed > 0 and worker.name not in without and not worker.silent
        ]
        candidates = [worker for worker in able if self.is_reachable(worker)] or able
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

    def is_reachable(self, worker: Worker) -> bool:
        if worker.silent:
            return False
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
