"""The thread that computes: takes requests in, schedules, launches steps, and hands out what they gave.

In: jobs and aborts from other threads, through a mailbox. Out: chunks and results in their handles. A step that fails
takes down the requests that were in it, with words, and the loop goes on. On a GPU the next step is launched before the
last one is read, so the device never waits for Python.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llava.engine.config import EngineClosed, EngineError, QueueFull
from llava.engine.handle import Wakeups
from llava.engine.job import Job, ScoreJob
from llava.engine.runner import Launched, Outcome, Runner
from llava.engine.scheduler import Scheduler, Step
from llava.engine.sequence import Sequence
from llava.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopStats:
    num_steps: int
    num_prompt_tokens: int  # computed, not found in the cache
    num_new_tokens: int
    num_finished: int

    def after(self, step: Step, outcomes: list[Outcome]) -> LoopStats:
        return replace(
            self,
            num_steps=self.num_steps + 1,
            num_prompt_tokens=self.num_prompt_tokens + sum(work.count - len(work.drafts) for work in step.prefill),
            num_new_tokens=self.num_new_tokens + sum(len(outcome.token_ids) for outcome in outcomes),
        )


class Loop:
    """One thread over one scheduler and one runner. `overlap` launches a step before the last one is read."""

    def __init__(self, scheduler: Scheduler, runner: Runner, *, overlap: bool, max_waiting: int) -> None:
        self.scheduler, self.runner = scheduler, runner
        self._overlap = overlap
        self._max_waiting = max_waiting
        self.wakeups = Wakeups()
        self._names: set[str] = set()  # of requests handed in and not finished
        self._jobs: dict[str, Job] = {}
        self._num_constrained = 0  # running ones whose next choice depends on the last token's text
        self._mail: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.num_waiting = 0
        self.stats = LoopStats(0, 0, 0, 0)
        self._thread = threading.Thread(target=self._run, name="llava-engine", daemon=True)
        self._thread.start()

    # Other threads' side.

    def add(self, job: Job, *, wait: bool) -> None:
        """Take a request in, or wait until the queue has room for it."""
        name = job.handle.request_id
        with self._changed:
            while self.num_waiting >= self._max_waiting and not self._closing:
                if not wait:
                    raise QueueFull(f"{self.num_waiting} requests are waiting, and no more are taken; try again later")
                self._changed.wait(1.0)
            if self._closing:
                raise EngineClosed("the engine is closed; make a new one")
            if name in self._names:
                raise InputError(f"there is a request {name!r} already; give each one a name of its own")
            self._names.add(name)
            self.num_waiting += 1
            self._mail.append(lambda: self._take_in(job))
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def abort(self, request_id: str) -> None:
        self._post(lambda: self._cancel(request_id))

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, letter: Callable[[], None]) -> None:
        with self._changed:
            self._mail.append(letter)
            self._changed.notify_all()

    # The thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._work()
        except Exception as error:  # not a step's fault but ours: what is counted may be wrong from here on
            logger.exception("the engine stopped")
            with self._changed:
                self._closing = True
            self._read_mail(wait=False)
            for job in list(self._jobs.values()):
                self._forget(job)
                job.handle.fail(EngineError(f"the engine stopped: {type(error).__name__}: {error}"))
        for request_id in list(self._jobs):
            self._cancel(request_id)
        self.wakeups.send()

    def _work(self) -> None:
        launched: Launched | None = None
        while self._read_mail(wait=launched is None and not self.scheduler.has_work):
            following = self._launch()
            self._collect(launched)
            launched = following
            if not self._overlap or self._num_constrained:
                self._collect(launched)
                launched = None
            self.wakeups.send()

    def _read_mail(self, *, wait: bool) -> bool:
        """Do what other threads asked for; False when the engine is closed."""
        with self._changed:
            while wait and not self._mail and not self._closing:
                self._changed.wait()
            letters, self._mail = self._mail, deque()
        for letter in letters:
            letter()
        return not self._closing

    def _take_in(self, job: Job) -> None:
        self._jobs[job.handle.request_id] = job
        self._num_constrained += sum(_is_constrained(sequence) for sequence in job.sequences)
        # Completions after the first wait for its prompt, whose blocks they share; without a cache each has its own.
        num_now = 1 if self.scheduler.pool.caching else len(job.sequences)
        for sequence in job.sequences[:num_now]:
            self.scheduler.add(sequence)
        job.later = job.sequences[num_now:]

    def _cancel(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            self._take_out(job)
            job.cancel()
            job.let_go()

    def _take_out(self, job: Job) -> None:
        """Forget a job; what it holds is free at once."""
        self._forget(job)
        if job.begun is None:
            self._begin(job)
        for sequence in job.sequences:
            if not sequence.done:
                self._remove(sequence)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.handle.request_id]
        with self._changed:
            self._names.discard(job.handle.request_id)

    def _begin(self, job: Job) -> None:
        job.begun = time.perf_counter()
        with self._changed:
            self.num_waiting -= 1
            self._changed.notify_all()  # whoever waits for room in the queue

    def _remove(self, sequence: Sequence) -> None:
        self._num_constrained -= _is_constrained(sequence)
        self.scheduler.remove(sequence)

    def _launch(self) -> Launched | None:
        step = self._ready(self.scheduler.schedule())
        if not step.work:
            return None
        try:
            return self.runner.launch(step)
        except Exception as error:
            self._fail_all(step, error)
            return None

    def _ready(self, step: Step) -> Step:
        """A step without requests whose images turn out to be unusable."""
        for work in step.prefill:
            job = work.sequence.owner
            if job.begun is None:
                self._begin(job)
            try:
                if not work.sequence.done:
                    self.runner.read_images(work)
            except Exception as error:
                self._fail(job, error)
        # Another completion of such a request may be anywhere in the step.
        decode, prefill = ([work for work in part if not work.sequence.done] for part in (step.decode, step.prefill))
        return Step(decode, prefill)

    def _collect(self, launched: Launched | None) -> None:
        if launched is None:
            return
        try:
            outcomes = self.runner.collect(launched)
        except Exception as error:
            self._fail_all(launched.step, error)
            return
        for outcome in outcomes:
            if not outcome.work.sequence.done:
                try:
                    self._hand_out(outcome)
                except Exception as error:  # its text or its grammar: nobody else's matter
                    self._fail(outcome.work.sequence.owner, error)
        for work in launched.step.prefill:  # pieces of prompts, from which nothing came yet
            if not work.sequence.done:
                self.scheduler.settle(work.sequence)
        self.stats = self.stats.after(launched.step, outcomes)

    def _hand_out(self, outcome: Outcome) -> None:
        sequence = outcome.work.sequence
        job = sequence.owner
        if isinstance(job, ScoreJob):
            has_ended = job.add(sequence, outcome.scores)
        else:
            sequence.num_pending -= 1 + len(outcome.work.drafts)
            has_ended = job.add(sequence, outcome.token_ids, outcome.logprobs)
            if outcome.work.drafts:  # behind the last right guess, what is in the cache is of wrong ones
                sequence.num_computed = len(sequence.ids) - 1
        self.scheduler.settle(sequence)
        self.scheduler.add_first(job.later)
        job.later = []
        if has_ended:
            self._remove(sequence)
        if job.done:
            self._forget(job)
            job.complete()
            job.let_go()
            self.stats = replace(self.stats, num_finished=self.stats.num_finished + 1)

    def _fail_all(self, step: Step, error: Exception) -> None:
        for job in {work.sequence.owner for work in step.work if not work.sequence.done}:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self._take_out(job)
        job.let_go()
        if isinstance(error, InputError):
            job.handle.fail(error)
            return
        logger.exception("a step of the engine failed", exc_info=error)
        told = EngineError(f"a step of the engine failed: {type(error).__name__}: {error}")
        told.__cause__ = error
        job.handle.fail(told)


def _is_constrained(sequence: Sequence) -> bool:
    return sequence.choice is not None and sequence.choice.grammar is not None
