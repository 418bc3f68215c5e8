"""The queue of sequences that wait for a slot, in which clients take turns (deficit round robin).

In: sequences, each of a client. Out: which one is admitted next. A client pays for a sequence with the positions that it may
take, and gets a quantum of positions in every round, so that long answers and many short ones count alike. With one client it
is a plain queue. No torch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf

from llava.engine.sequence import Sequence

QUANTUM = 1024  # positions, of each client in a round


class FairQueue:
    """Waiting sequences. Those put first, which were preempted for want of memory, come before all others."""

    def __init__(self) -> None:
        self._first: deque[Sequence] = deque()
        self._queues: OrderedDict[str, deque[Sequence]] = OrderedDict()  # of each client, in the order of turns
        self._deficits: dict[str, int] = {}  # positions that a client may still take in its turn

    def __len__(self) -> int:
        return len(self._first) + sum(len(queue) for queue in self._queues.values())

    def __bool__(self) -> bool:
        return bool(self._first or self._queues)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._first
        for queue in self._queues.values():
            yield from queue

    def append(self, sequence: Sequence) -> None:
        self._queue_of(sequence.client).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence before all others of its client."""
        self._queue_of(sequence.client).appendleft(sequence)

    def put_first(self, sequence: Sequence) -> None:
        self._first.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence in self._first:
            self._first.remove(sequence)
            return
        queue = self._queues[sequence.client]
        if queue[0] is sequence:
            queue.popleft()
            self._deficits[sequence.client] = max(0, self._deficits[sequence.client] - sequence.max_total)
        else:
            queue.remove(sequence)
        if not queue:
            del self._queues[sequence.client], self._deficits[sequence.client]

    def next(self, running: Mapping[str, int], max_running: int) -> Sequence:
        """Return the sequence to admit next. Clients that run less than their share come before the others.

        Args:
            running: How many sequences of each client run.
            max_running: How many may run in all.
        """
        if self._first:
            return self._first[0]
        if len(self._queues) == 1:
            return next(iter(self._queues.values()))[0]
        share = self.share(running, max_running)
        below = {client for client in self._queues if running.get(client, 0) < share}
        while True:
            for client in list(self._queues):
                if below and client not in below:
                    continue
                head = self._queues[client][0]
                if self._deficits[client] >= head.max_total:
                    return head
                self._deficits[client] += QUANTUM
                self._queues.move_to_end(client)

    def share(self, running: Mapping[str, int], max_running: int) -> int:
        """How many sequences each client may run that runs or waits."""
        return max(1, max_running // max(1, len(running.keys() | self._queues.keys())))

    def num_owed(self, running: Mapping[str, int], max_running: int) -> int:
        """How many waiting sequences belong to clients that run less than their share."""
        share = self.share(running, max_running)
        return sum(min(len(queue), max(0, share - running.get(client, 0))) for client, queue in self._queues.items())

    def has_several_clients(self, running: SequenceOf[Sequence]) -> bool:
        """Whether a client waits that is not the only one which runs."""
        return any(client != running[0].client for client in self._queues) if running else False

    def _queue_of(self, client: str) -> deque[Sequence]:
        if client not in self._queues:
            self._queues[client] = deque()
            self._deficits[client] = QUANTUM
        return self._queues[client]
