"""The engine's loop: admit requests, schedule steps, launch them, and deliver what they gave.

In: requests, by way of worker.py's inbox. Out: chunks and results in their handles. A step that fails fails the requests that
were in it, and the loop goes on. On a GPU the next step is launched before the last one is read, so the device never waits
for Python.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from llava.engine.runner import InFlightStep, Runner, StepOutput
from llava.engine.scheduler import Scheduler, SchedulerOutput
from llava.engine.sequence import EmbeddingState, GenerationState, RequestState, ScoringState, Sequence
from llava.engine.worker import EngineWorker


@dataclass(frozen=True)
class LoopStats:
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed, not found in the cache
    num_new_tokens: int = 0

    def after(self, step: SchedulerOutput, outputs: list[StepOutput]) -> LoopStats:
        return replace(
            self,
            num_steps=self.num_steps + 1,
            num_prompt_tokens=self.num_prompt_tokens + sum(chunk.count - len(chunk.drafts) for chunk in step.prefill),
            num_new_tokens=self.num_new_tokens + sum(len(output.token_ids) for output in outputs),
        )


class EngineLoop(EngineWorker):
    """One thread over one scheduler and one runner. `overlap` launches a step before the last one is read."""

    def __init__(self, scheduler: Scheduler, runner: Runner, *, overlap: bool, max_waiting: int) -> None:
        super().__init__(max_waiting=max_waiting)
        self.scheduler, self.runner = scheduler, runner
        self._overlap = overlap
        self._encoding: deque[EmbeddingState] = deque()  # requests for the vision tower alone
        self._num_constrained = 0  # running ones whose next token depends on the last one's text
        self.stats = LoopStats()
        self._thread.start()

    def _loop(self) -> None:
        in_flight: InFlightStep | None = None
        while self._read_inbox(wait=in_flight is None and not self.scheduler.has_work and not self._encoding):
            self._encode_next()
            step = self._read_images(self.scheduler.schedule())
            launched = None
            if step.chunks:
                try:
                    launched = self.runner.launch(step)
                except Exception as error:
                    self._fail_all(step, error)
            self._collect(in_flight)
            in_flight = launched
            if not self._overlap or self._num_constrained:
                self._collect(in_flight)
                in_flight = None
            self.wakeups.send()

    def _encode_next(self) -> None:
        """Answer one request for the vision tower alone."""
        if not self._encoding:
            return
        request = self._encoding.popleft()
        self._begin(request)
        try:
            for states, count in self.runner.tower_states(request.prompt, summed=request.pooling == "mean"):
                request.add(states, count)
            self._complete(request)
        except Exception as error:
            self._fail(request, error)

    def _admit(self, request: RequestState) -> None:
        super()._admit(request)
        if isinstance(request, EmbeddingState) and not request.sequences:
            self._encoding.append(request)
            return
        self._num_constrained += sum(_is_constrained(sequence) for sequence in request.sequences)
        # Completions after the first wait for its prompt, whose blocks they share; without a cache each has its own.
        num_now = 1 if self.scheduler.pool.caching else len(request.sequences)
        for sequence in request.sequences[:num_now]:
            self.scheduler.add(sequence)
        request.later = request.sequences[num_now:]

    def _remove(self, request: RequestState) -> None:
        super()._remove(request)
        if request in self._encoding:
            self._encoding.remove(request)  # type: ignore[arg-type]
        for sequence in request.sequences:
            if not sequence.done:
                self._remove_sequence(sequence)

    def _remove_sequence(self, sequence: Sequence) -> None:
        self._num_constrained -= _is_constrained(sequence)
        self.scheduler.remove(sequence)

    def _read_images(self, step: SchedulerOutput) -> SchedulerOutput:
        """Make the pixels a step needs; returns the step without requests whose images turn out to be unusable."""
        for chunk in step.prefill:
            request = _request_of(chunk.sequence)
            if request.begun is None:
                self._begin(request)
            try:
                if not chunk.sequence.done:
                    self.runner.read_images(chunk)
            except Exception as error:
                self._fail(request, error)
        # Another completion of such a request may be anywhere in the step.
        decode, prefill = ([chunk for chunk in part if not chunk.sequence.done] for part in (step.decode, step.prefill))
        return SchedulerOutput(decode, prefill)

    def _collect(self, in_flight: InFlightStep | None) -> None:
        """Read a step's tokens and deliver them."""
        if in_flight is None:
            return
        try:
            outputs = self.runner.collect(in_flight)
        except Exception as error:
            self._fail_all(in_flight.step, error)
            return
        self._note_step()
        for output in outputs:
            if not output.chunk.sequence.done:
                try:
                    self._deliver(output)
                except Exception as error:  # its text or its grammar: no other request is concerned
                    self._fail(_request_of(output.chunk.sequence), error)
        for chunk in in_flight.step.prefill:  # parts of prompts, from which nothing came yet
            if not chunk.sequence.done:
                self.scheduler.cache_full_blocks(chunk.sequence)
        self.stats = self.stats.after(in_flight.step, outputs)

    def _deliver(self, output: StepOutput) -> None:
        sequence = output.chunk.sequence
        request = _request_of(sequence)
        if isinstance(request, EmbeddingState):
            assert output.states is not None
            request.add(output.states, output.num_states)
            has_ended = output.chunk.stop == len(sequence.ids)
        elif isinstance(request, ScoringState):
            has_ended = request.add(sequence, output.scores)
        else:
            assert isinstance(request, GenerationState)
            sequence.num_pending -= 1 + len(output.chunk.drafts)
            has_ended = request.add(sequence, output.token_ids, output.logprobs)
            if output.chunk.drafts:  # behind the last accepted draft, the cache holds rejected ones
                sequence.num_computed = len(sequence.ids) - 1
        self.scheduler.cache_full_blocks(sequence)
        self.scheduler.add_first(request.later)
        request.later = []
        if has_ended:
            self._remove_sequence(sequence)
        if request.done:
            self._complete(request)

    def _fail_all(self, step: SchedulerOutput, error: Exception) -> None:
        for request in {_request_of(chunk.sequence) for chunk in step.chunks if not chunk.sequence.done}:
            self._fail(request, error)
        self._note_step(error)


def _request_of(sequence: Sequence) -> RequestState:
    assert sequence.request is not None
    return sequence.request


def _is_constrained(sequence: Sequence) -> bool:
    return sequence.sampling is not None and sequence.sampling.grammar is not None
