"""Which worker answers next: the controller's table, without HTTP.

In: registrations, heart-beats, and a model's name for each request. Out: a worker's address, or None. Time comes in through
a clock, chance through a random generator, so that tests need neither.
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

MAX_CONVERSATIONS = 100_000  # remembered for stickiness; the oldest are forgotten
STICKY_SLACK = 4  # a conversation moves when its worker has so many more requests for its speed than the least loaded


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
    """The workers and the two ways of choosing among them.

    "shortest_queue" takes the least queue for its speed, and counts the request until the next heart-beat says better.
    "lottery" draws with probabilities proportional to speed. Workers of speed 0 are never chosen.
    """

    def __init__(
        self,
        method: str = "shortest_queue",
        *,
        expiration_s: float = CONTROLLER_HEART_BEAT_EXPIRATION,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"unknown dispatch method {method!r}; known: {', '.join(METHODS)}")
        self._choose = METHODS[method]
        self.expiration_s = expiration_s
        self._clock = clock
        self._chance = chance or random.Random()
        self._workers: dict[str, Worker] = {}
        self._homes: OrderedDict[str, str] = OrderedDict()  # conversation -> worker

    # The table.

    def register(self, name: str, status: WorkerStatus, *, check_heart_beat: bool) -> None:
        self._workers[name] = Worker(name, status, check_heart_beat, self._clock(), status.queue_length)

    def unregister(self, name: str) -> bool:
        return self._workers.pop(name, None) is not None

    def heart_beat(self, name: str, queue_length: int) -> bool:
        """Note a sign of life; False for a worker that must register first."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.last_heart_beat, worker.queue_length, worker.unreachable_since = self._clock(), queue_length, None
        return True

    def mark_unreachable(self, name: str) -> None:
        """Leave a worker out until it is heard of again, or until a heart-beat's expiration has passed."""
        if name in self._workers:
            self._workers[name].unreachable_since = self._clock()

    def drop_expired(self) -> list[str]:
        """Remove the workers whose heart-beats are checked and have stopped."""
        limit = self._clock() - self.expiration_s
        silent = [w.name for w in self._workers.values() if w.check_heart_beat and w.last_heart_beat < limit]
        for name in silent:
            del self._workers[name]
        return silent

    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def model_names(self) -> list[str]:
        """Every model once, in the order of registration."""
        return list(dict.fromkeys(name for worker in self._workers.values() for name in worker.status.model_names))

    # Choosing.

    def choose(self, model: str, *, conversation: str | None = None, without: Collection[str] = ()) -> str | None:
        """The worker for a request, counted into its queue; a conversation goes where it was, unless that is busy."""
        able = [
            worker
            for worker in self._workers.values()
            if model in worker.status.model_names
            and worker.status.speed > 0
            and worker.name not in without
            and self._seems_reachable(worker)
        ]
        if not able:
            return None
        worker = self._home(conversation, able) or self._choose(able, self._chance)
        worker.queue_length += 1
        if conversation is not None:
            self._homes[conversation] = worker.name
            self._homes.move_to_end(conversation)
            if len(self._homes) > MAX_CONVERSATIONS:
                self._homes.popitem(last=False)
        return worker.name

    @contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """Around a request that passes through the controller: at its end the chosen worker's queue is shorter again."""
        try:
            yield
        finally:
            worker = self._workers.get(name)
            if worker is not None:
                worker.queue_length = max(0, worker.queue_length - 1)

    def _seems_reachable(self, worker: Worker) -> bool:
        return worker.unreachable_since is None or self._clock() - worker.unreachable_since > self.expiration_s

    def _home(self, conversation: str | None, able: list[Worker]) -> Worker | None:
        name = self._homes.get(conversation) if conversation is not None else None
        home = next((worker for worker in able if worker.name == name), None)
        if home is None or home.load > min(worker.load for worker in able) + STICKY_SLACK / home.status.speed:
            return None
        return home


def _shortest_queue(able: list[Worker], chance: random.Random) -> Worker:
    return min(able, key=lambda worker: worker.load)


def _lottery(able: list[Worker], chance: random.Random) -> Worker:
    return chance.choices(able, weights=[worker.status.speed for worker in able])[0]


METHODS = {"lottery": _lottery, "shortest_queue": _shortest_queue}
