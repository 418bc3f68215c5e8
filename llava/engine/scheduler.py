"""Who is computed in the next step: continuous batching over a pool of blocks.

In: sequences. Out: for each step, which positions of which sequences to compute. Running answers get their next token
first; what remains of the step goes to prompts, in the order of arrival, long ones in pieces. When the pool runs out,
whoever was admitted last gives its blocks back and is computed again later; the one admitted first always gets on, so
every sequence ends. Nothing here imports torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llava.engine.kv_cache import BlockPool
from llava.engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """Positions `start` to `stop` of a sequence. `drafts` are guesses for the last ones, after all known tokens."""

    sequence: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()
    chooses: bool = False  # all before is computed then, so a token follows (and one for each right guess)

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass
class Step:
    """`decode` are running answers with one position each whose token is on the device, `prefill` all other work."""

    decode: list[Work] = field(default_factory=list)
    prefill: list[Work] = field(default_factory=list)

    @property
    def work(self) -> list[Work]:
        return self.decode + self.prefill


class Scheduler:
    """`draft` guesses the next tokens of a sequence; without it nothing is guessed."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_running: int,
        max_step_tokens: int,
        draft: Callable[[Sequence], tuple[int, ...]] | None = None,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission
        self.num_preemptions = 0
        self._draft = draft
        self._rows = list(range(max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def add_first(self, sequences: Iterable[Sequence]) -> None:
        """Before all others: they belong to a request that has begun."""
        self.waiting.extendleft(reversed(list(sequences)))

    def schedule(self) -> Step:
        """The next step, counted as computed from now on."""
        step = Step()
        num_preempted = self.num_preemptions
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.num_missing == 1 and sequence.has_token_in_row and not sequence.is_exhausted:
                drafts = self._draft(sequence)[: sequence.max_total - sequence.num_total - 1] if self._draft else ()
                if not self._grow(sequence, sequence.num_total + len(drafts)):
                    drafts = ()
                    if not self._grow_by_preemption(sequence):
                        continue  # it was itself the last one, and is not in `running` any more
                work = _count(sequence, 1 + len(drafts), drafts)
                (step.prefill if drafts else step.decode).append(work)
            index += 1
        budget = self.max_step_tokens
        for sequence in self.running:
            if budget > 0 and (not sequence.has_token_in_row or sequence.is_scored):
                budget -= self._prefill(sequence, budget, step)
        if self.num_preemptions == num_preempted:  # else the pool is full, and tokens of the displaced are on their way
            while self.waiting and budget > 0 and self._rows and self._admit(self.waiting[0]):
                budget -= self._prefill(self.running[-1], budget, step)
        return step

    def settle(self, sequence: Sequence) -> None:
        """Tokens of a sequence have become known: make its full blocks findable."""
        if self.pool.caching:
            for block, key in sequence.newly_full(self.block_size):
                self.pool.remember(block, key)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its blocks and its row are free at once."""
        sequence.done = True
        if sequence.row is not None:
            self.running.remove(sequence)
            self._displace(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _prefill(self, sequence: Sequence, budget: int, step: Step) -> int:
        count = min(sequence.num_missing, budget)
        if count <= 0:
            return 0
        step.prefill.append(_count(sequence, count))
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all tokens that it has, sharing those that are found by their content."""
        size, pool = self.block_size, self.pool
        num_known = len(sequence.ids)
        found = pool.find(sequence.block_hashes(size)) if pool.caching else []
        # The position before the first token to choose (or to score) must be computed: its logits are needed.
        last = (sequence.num_prompt if sequence.is_scored else num_known) - 1
        found = found[: last // size]
        pool.share(found)
        needed = -(-(num_known + (not sequence.is_scored)) // size)
        # Room for those already running to grow a little, so that a newcomer is not displaced at once.
        spare = min(len(self.running), pool.num_blocks // 16)
        taken = pool.take(needed - len(found)) if needed - len(found) + spare <= pool.num_available else None
        if taken is None:
            pool.release(found)
            pool.num_hits -= len(found)
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.place(found + taken, len(found) * size, self._rows.pop())
        if sequence.num_new == 0:
            sequence.num_cached = sequence.num_computed
        return True

    def _grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Blocks for so many positions, if there are any."""
        missing = -(-num_positions // self.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        taken = self.pool.take(missing)
        sequence.blocks += taken or []
        return taken is not None

    def _grow_by_preemption(self, sequence: Sequence) -> bool:
        """A block for the next position, taken from those admitted last; False where that is the sequence itself."""
        while not self._grow(sequence, sequence.num_total):
            victim = self.running.pop()
            self.num_preemptions += 1
            self._displace(victim)
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        return True

    def _displace(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._rows.append(sequence.row)
        self.pool.release(sequence.displace())


def _count(sequence: Sequence, num_positions: int, drafts: tuple[int, ...] = ()) -> Work:
    """The next positions of a sequence as work, from now on counted as done."""
    start = sequence.num_computed
    stop = start + num_positions
    chooses = not sequence.is_scored and stop - len(drafts) == sequence.num_total
    sequence.num_computed = stop
    if chooses:
        sequence.num_pending += 1 + len(drafts)
        sequence.has_token_in_row = True
    return Work(sequence, start, stop, drafts, chooses)
