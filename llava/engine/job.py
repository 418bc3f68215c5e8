"""A request within the engine: its completions, what has been said of each, and what it will cost.

In: tokens, as steps give them. Out: chunks and a result, handed to the request's handle. Text is read off the tokens by
text/detokenizer.py. Nothing here imports torch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as Items

from llava.engine.config import Cancelled
from llava.engine.handle import RequestHandle
from llava.engine.request import (
    Chunk,
    Completion,
    FinishReason,
    Result,
    Score,
    Timings,
    TokenLogprob,
    Usage,
)
from llava.engine.sequence import Prompt, Sequence
from llava.text.detokenizer import IncrementalDetokenizer


class Job(ABC):
    """What every kind of request has: sequences, a handle, and times."""

    def __init__(self, handle: RequestHandle, prompt: Prompt) -> None:
        self.handle = handle
        self.prompt = prompt
        self.sequences: list[Sequence] = []
        self.later: list[Sequence] = []  # those of them that wait for the first one's prompt
        self.submitted = time.perf_counter()
        self.begun: float | None = None
        self.first_token: float | None = None

    @property
    def done(self) -> bool:
        return all(sequence.done for sequence in self.sequences)

    def usage(self, num_new: int) -> Usage:
        prompt = self.prompt
        return Usage(prompt.num_text_tokens, prompt.num_image_tokens, self.sequences[0].num_cached, num_new)

    def timings(self) -> Timings:
        now = time.perf_counter()
        first = None if self.first_token is None else self.first_token - self.submitted
        return Timings((self.begun or now) - self.submitted, first, now - self.submitted)

    def let_go(self) -> None:
        """It is over. Its sequences know it, a cycle that would keep its images until garbage is collected."""
        self.sequences, self.later = [], []

    @abstractmethod
    def complete(self) -> None:
        """All its sequences have ended."""

    @abstractmethod
    def cancel(self) -> None:
        """It ends before it is finished; its sequences have been taken out."""


class Partial:
    """A completion that is being written."""

    def __init__(self, reader: IncrementalDetokenizer) -> None:
        self.reader = reader
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None


class AnswerJob(Job):
    """Completions of a prompt. Without `streamed`, and without stop strings, text is read off the tokens at the end."""

    def __init__(
        self,
        handle: RequestHandle,
        prompt: Prompt,
        readers: Items[IncrementalDetokenizer],
        *,
        streamed: bool,
    ) -> None:
        super().__init__(handle, prompt)
        self.partials = [Partial(reader) for reader in readers]
        self._streamed = streamed
        self._reads_at_once = not streamed and not readers[0].has_stop_strings

    def add(self, sequence: Sequence, token_ids: Items[int], logprobs: Items[TokenLogprob]) -> bool:
        """Tokens of one completion; True where they end it. What follows the end is dropped."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        partial, grammar = self.partials[sequence.index], sequence.choice.grammar
        num_before = len(partial.token_ids)
        text = ""
        for token in token_ids:
            is_end = partial.reader.is_end(token, len(partial.token_ids))
            partial.token_ids.append(token)
            sequence.ids.append(token)
            if not self._reads_at_once:
                text += partial.reader.read([token])
            if grammar is not None and not is_end:
                grammar.accept(token)
            if partial.reader.stopped or is_end or (grammar is not None and grammar.is_over):
                partial.finish_reason = "stop"
            elif len(sequence.ids) >= sequence.max_total:
                partial.finish_reason = "length"
            if partial.finish_reason is not None:
                break
        partial.logprobs += logprobs
        ended = partial.finish_reason is not None
        give = self._finish if ended else self._put
        give(sequence.index, text, partial.token_ids[num_before:], logprobs)
        return ended

    def cancel(self) -> None:
        for index, partial in enumerate(self.partials):
            if partial.finish_reason is None:
                partial.finish_reason = "cancelled"
                self._finish(index, "", (), ())
        self.complete()

    def complete(self) -> None:
        completions = tuple(
            Completion(index, partial.reader.text, tuple(partial.token_ids), tuple(partial.logprobs), reason)
            for index, partial in enumerate(self.partials)
            if (reason := partial.finish_reason) is not None
        )
        num_new = sum(len(partial.token_ids) for partial in self.partials)
        self.handle.finish(Result(self.handle.request_id, completions, self.usage(num_new), self.timings()))

    def _finish(self, index: int, text: str, token_ids: Items[int], logprobs: Items[TokenLogprob]) -> None:
        partial = self.partials[index]
        if self._reads_at_once:
            text += partial.reader.read(partial.token_ids)
        text += partial.reader.finish()
        self._put(index, text, token_ids, logprobs)

    def _put(self, index: int, text: str, token_ids: Items[int], logprobs: Items[TokenLogprob]) -> None:
        if self._streamed:
            reason = self.partials[index].finish_reason
            self.handle.put(Chunk(index, text, tuple(token_ids), tuple(logprobs), reason))


class ScoreJob(Job):
    """The probabilities of a continuation."""

    def __init__(self, handle: RequestHandle, prompt: Prompt) -> None:
        super().__init__(handle, prompt)
        self._scores: list[tuple[float, bool]] = []

    def add(self, sequence: Sequence, scores: Items[tuple[float, bool]]) -> bool:
        """More of them, in order; True when these were the last."""
        self._scores += scores
        return len(self._scores) == len(sequence.ids) - sequence.num_prompt

    def complete(self) -> None:
        sequence = self.sequences[0]
        self.handle.finish(
            Score(
                tuple(sequence.ids[sequence.num_prompt :]),
                tuple(logprob for logprob, _ in self._scores),
                all(likeliest for _, likeliest in self._scores),
                self.usage(0),
            )
        )

    def cancel(self) -> None:
        self.handle.fail(Cancelled(f"request {self.handle.request_id} was cancelled"))
