"""Decide what the next step computes: continuous batching over a pool of blocks.

In: sequences. Out: a `SchedulerOutput` for each step, which names positions of sequences to compute. Running sequences get
their next token first; the rest of the step's token budget goes to prompts in the order of arrival, long ones in chunks.
When the pool is full, the sequence admitted last is preempted: it gives its blocks back and is computed again later. The
sequence admitted first always advances, so every sequence ends. Where several clients wait, they take turns, and a client that
runs more than its share of sequences gives slots to those that run less (fair_queue.py), whose prompts are then computed in a
step before the decoding of others. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llava.engine.fair_queue import FairQueue
from llava.engine.kv_cache import BlockPool
from llava.engine.sequence import Sequence


@dataclass(frozen=True)
class ScheduledChunk:
    """Positions `start` to `stop` of a sequence. `drafts` are draft tokens at the last ones, after all known tokens."""

    sequence: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()
    samples: bool = False  # everything before is computed then, so a token follows (and one for each accepted draft)

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def slot(self) -> int:
        assert self.sequence.slot is not None
        return self.sequence.slot


@dataclass
class SchedulerOutput:
    """`decode` are running sequences with one position each whose token is on the device, `prefill` all other chunks."""

    decode: list[ScheduledChunk] = field(default_factory=list)
    prefill: list[ScheduledChunk] = field(default_factory=list)

    @property
    def chunks(self) -> list[ScheduledChunk]:
        return self.decode + self.prefill


class Scheduler:
    """`draft` proposes the next tokens of a sequence; without it nothing is proposed."""

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
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # in the order of admission
        self.num_preemptions = 0
        self._draft = draft
        self._max_running = max_running
        self._is_blocked = False  # there are slots, and no blocks for the sequence that is next
        self._were_prompts_first = False  # in the last step
        self._free_slots = list(range(max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def add_first(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences before all others of their client: they belong to a request that has begun."""
        for sequence in reversed(list(sequences)):
            self.waiting.put_back(sequence)

    def schedule(self) -> SchedulerOutput:
        """Plan the next step; its positions count as computed from now on."""
        step = SchedulerOutput()
        self._preempt_for_others()
        if self._prompts_come_first():
            self._schedule_prompts(step)
        self._were_prompts_first = bool(step.prefill)
        if not step.prefill:
            num_preempted = self.num_preemptions
            self._schedule_decoding(step)
            # Where the pool is full, preempted sequences wait for the blocks of others.
            self._schedule_prompts(step, admits=self.num_preemptions == num_preempted)
        return step

    def _prompts_come_first(self) -> bool:
        """Whether the next step computes prompts alone, so that their first tokens wait for no decoding.

        That is so where a client waits that runs less than its share beside others, and never in two steps in a row. Decoding
        loses nothing by it: the prompts would be computed in the same step, before its tokens are delivered.
        """
        if self._were_prompts_first or not self.waiting.has_several_clients(self.running):
            return False
        return self.waiting.num_owed(self._num_running(), self._max_running) > 0

    def _schedule_decoding(self, step: SchedulerOutput) -> None:
        """Add the next position of each sequence whose prompt is computed."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.num_missing == 1 and sequence.has_token_in_slot and not sequence.is_exhausted:
                drafts = self._draft(sequence)[: sequence.max_total - sequence.num_total - 1] if self._draft else ()
                if not self._grow(sequence, sequence.num_total + len(drafts)):
                    drafts = ()
                    if not self._grow_by_preemption(sequence):
                        continue  # it was itself the last one, and is not in `running` any more
                chunk = _schedule_positions(sequence, 1 + len(drafts), drafts)
                (step.prefill if drafts else step.decode).append(chunk)
            index += 1

    def _schedule_prompts(self, step: SchedulerOutput, *, admits: bool = True) -> None:
        """Add positions of prompts, of running sequences first and then of waiting ones that are admitted."""
        budget = self.max_step_tokens
        for sequence in self.running:
            if budget > 0 and (not sequence.has_token_in_slot or sequence.is_given):
                budget -= self._prefill(sequence, budget, step)
        if not admits:
            return
        self._is_blocked = False
        running = self._num_running()
        while self.waiting and budget > 0 and self._free_slots:
            sequence = self.waiting.next(running, self._max_running)
            if sequence.num_pending:  # preempted in this step, and a token is on its way
                return
            if not self._admit(sequence):
                self._is_blocked = True
                return
            running[sequence.client] += 1
            budget -= self._prefill(sequence, budget, step)

    def _num_running(self) -> Counter[str]:
        return Counter(sequence.client for sequence in self.running)

    def cache_full_blocks(self, sequence: Sequence) -> None:
        """Register the blocks of a sequence that have become full, once their tokens are known."""
        if self.pool.caching and sequence.is_cachable:
            for block, key in sequence.newly_full(self.block_size):
                self.pool.register_hash(block, key)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting; its blocks and its slot are free at once."""
        sequence.done = True
        if sequence.slot is not None:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _prefill(self, sequence: Sequence, budget: int, step: SchedulerOutput) -> int:
        count = min(sequence.num_missing, budget)
        if count <= 0:
            return 0
        step.prefill.append(_schedule_positions(sequence, count))
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and blocks for all its tokens, sharing those found by their content."""
        size, pool = self.block_size, self.pool
        num_known = len(sequence.ids)
        found = pool.find(sequence.block_hashes(size)) if pool.caching else []
        found = found[: sequence.first_output // size]
        pool.incref(found)
        needed = -(-(num_known + (not sequence.is_given)) // size)
        # Room for running sequences to grow a little, so that a new one is not preempted at once.
        spare = min(len(self.running), pool.num_blocks // 16)
        new = pool.allocate(needed - len(found)) if needed - len(found) + spare <= pool.num_available else None
        if new is None:
            pool.release(found)
            pool.num_hits -= len(found)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.assign_slot(self._free_slots.pop(), found + new, num_computed=len(found) * size)
        if sequence.num_new == 0:
            sequence.num_cached = sequence.num_computed
        return True

    def _grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Allocate blocks for `num_positions` positions; False where there are none."""
        missing = -(-num_positions // self.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        new = self.pool.allocate(missing)
        sequence.blocks += new or []
        return new is not None

    def _grow_by_preemption(self, sequence: Sequence) -> bool:
        """Get a block for the next position by preempting; False where the sequence itself was preempted."""
        while not self._grow(sequence, sequence.num_total):
            victim = self.running[-1]
            self._preempt(victim)
            self.waiting.put_first(victim)
            if victim is sequence:
                return False
        return True

    def _preempt_for_others(self) -> None:
        """Take slots from clients that run more than their share, for waiting ones that run less."""
        if (self._free_slots and not self._is_blocked) or not self.waiting.has_several_clients(self.running):
            return
        running = self._num_running()
        for _ in range(self.waiting.num_owed(running, self._max_running)):
            most, count = running.most_common(1)[0]
            if count <= self.waiting.share(running, self._max_running):
                return
            # The newest, of which least is computed again; never the first of all, so that every sequence ends.
            victim = next(sequence for sequence in reversed(self.running) if sequence.client == most)
            if victim is self.running[0]:
                return
            self._preempt(victim)
            self.waiting.put_back(victim)
            running[most] -= 1

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.num_preemptions += 1
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        self.pool.release(sequence.release_slot())


def _schedule_positions(sequence: Sequence, count: int, drafts: tuple[int, ...] = ()) -> ScheduledChunk:
    """Make the next `count` positions of a sequence a chunk, from now on counted as computed."""
    start = sequence.num_computed
    stop = start + count
    samples = not sequence.is_given and stop - len(drafts) == sequence.num_total
    sequence.num_computed = stop
    if samples:
        sequence.num_pending += 1 + len(drafts)
        sequence.has_token_in_slot = True
    return ScheduledChunk(sequence, start, stop, drafts, samples)
