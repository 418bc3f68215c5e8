"""A request while it is computed: its sequences, their tokens, and how these are sampled.

In: a prompt with a position for every image feature; then tokens, as steps give them. Out: chunks and a result, put into
the request's handle. The scheduler decides what is computed of a sequence and gives it blocks; text is read off its tokens by
text/detokenizer.py. No torch.

Positions count text tokens and image features alike. An image feature has the id -1 minus its index in its image.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from abc import ABC, abstractmethod
from collections import abc
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llava.engine.config import Cancelled
from llava.engine.grammar import Grammar
from llava.engine.handle import RequestHandle
from llava.engine.kv_cache import block_hash
from llava.engine.ngram import NgramProposer
from llava.engine.prompt import Prompt
from llava.engine.request import (
    MAX_SEED,
    Chunk,
    Completion,
    Embedding,
    FinishReason,
    Pooling,
    Result,
    SamplingParams,
    Score,
    Timings,
    TokenLogprob,
    Usage,
)
from llava.text.detokenizer import IncrementalDetokenizer

SEED_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of a request's completions: odd, and far from small numbers


class TokenScore(NamedTuple):
    """What a given token of a continuation scored."""

    logprob: float
    is_argmax: bool
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens there


@dataclass(frozen=True)
class StateRead:
    """Which hidden states of a prompt are asked for.

    Args:
        layer: 0 enters the first layer, k leaves the k-th one.
        spans: Positions (start, stop), ascending and not empty.
        pooling: What is made of them.
        is_last_layer: Whether all layers must be computed.
    """

    layer: int
    spans: tuple[tuple[int, int], ...]
    pooling: Pooling
    is_last_layer: bool

    @property
    def start(self) -> int:
        """The first position whose state is needed."""
        return self.stop - 1 if self.pooling == "last" else self.spans[0][0]

    @property
    def stop(self) -> int:
        return self.spans[-1][1]

    def positions(self, start: int, stop: int) -> list[int]:
        """Those that lie from `start` to `stop` and whose states are needed."""
        if self.pooling == "last":
            return [self.stop - 1] if start < self.stop <= stop else []
        return [at for first, end in self.spans for at in range(max(first, start), min(end, stop))]


class SamplingState:
    """How one completion's tokens are chosen.

    Args:
        params: With the model's defaults filled in; a value of None does nothing.
        index: Which of the request's completions this is.
        end_ids: Tokens that end it, held back until `min_new_tokens` are there.
        grammar: What the completion must match, and how far it has come.
    """

    def __init__(
        self, params: SamplingParams, index: int, end_ids: frozenset[int], grammar: Grammar | None = None
    ) -> None:
        seed = random.getrandbits(62) if params.seed is None else params.seed
        self.params = params
        self.seed = (seed + index * SEED_STRIDE) & MAX_SEED
        self.top_p = 1.0 if params.top_p is None else params.top_p
        self.top_k = params.top_k or 0
        self.min_p = params.min_p or 0.0
        self.repetition_penalty = params.repetition_penalty or 1.0
        self.end_ids = end_ids
        self.grammar = grammar
        self.is_penalized = (
            self.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        # The argmax and nothing else: what draft tokens are exact for.
        self.is_plain = (
            params.greedy
            and not self.is_penalized
            and not params.logit_bias
            and grammar is None
            and params.logprobs is None
        )

    def biases(self, num_new: int) -> dict[int, float]:
        """What is added to single logits after `num_new` tokens, by token id."""
        biases = dict(self.params.logit_bias)
        if num_new < self.params.min_new_tokens:
            biases |= dict.fromkeys(self.end_ids, -math.inf)
        return biases


class Sequence:
    """One completion, one scored continuation, or one prompt whose hidden states are read.

    It knows its tokens, how far they are computed, and where its keys and values are.

    Args:
        prompt: What it begins with.
        max_total: The number of positions it may take altogether.
        request: The request it belongs to.
        index: Which of the request's completions it is.
        sampling: How its tokens are chosen; None where they are given.
        detokenizer: Reads its text; None where its tokens are given.
        continuation: Given tokens whose probabilities are asked for; nothing is sampled then.
        num_top: How many of the most likely tokens are reported beside each of these.
        read: The hidden states that are asked for; nothing is sampled then.
        client: Who asked for it.
    """

    _assignments = itertools.count()

    def __init__(
        self,
        prompt: Prompt,
        *,
        max_total: int,
        request: RequestState | None = None,
        index: int = 0,
        sampling: SamplingState | None = None,
        detokenizer: IncrementalDetokenizer | None = None,
        continuation: abc.Sequence[int] = (),
        num_top: int = 0,
        read: StateRead | None = None,
        client: str = "",
    ):
        self.request = request
        self.index = index
        self.sampling = sampling
        self.detokenizer = detokenizer
        self.images = prompt.images
        self.adapter = prompt.adapter
        self.num_prompt = len(prompt.ids)
        self.ids = [*prompt.ids, *continuation] if read is None else prompt.ids[: read.stop]
        self.is_scored = bool(continuation)
        self.read = read
        self.num_top = num_top
        self.max_total = max_total
        self.client = client
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.num_computed = 0  # positions whose keys and values are there, or being computed by a step in flight
        self.num_pending = 0  # tokens being sampled by a step in flight
        self.num_observed = 0  # positions whose scores or states a step has taken, in flight or not
        self.num_cached = 0  # positions found in the prefix cache when it was first admitted
        self.blocks: list[int] = []
        self.slot: int | None = None  # its index among the running ones, where its newest token and counts are kept
        self.assignment = -1  # a new number whenever it gets blocks and a slot
        self.has_token_in_slot = False
        self.done = False
        self._proposer = NgramProposer()
        self._hashes: list[bytes] = []
        self._num_cached_blocks = 0

    @property
    def num_new(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def num_total(self) -> int:
        """Positions with a token, sampled or being sampled."""
        return len(self.ids) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Positions still to be computed before the next token can be sampled."""
        return self.num_total - self.is_scored - self.num_computed

    @property
    def is_given(self) -> bool:
        """Whether all its tokens are given, so that nothing is sampled."""
        return self.is_scored or self.read is not None

    @property
    def is_cachable(self) -> bool:
        """Whether its keys and values are those of all layers, which others may use."""
        return self.read is None or self.read.is_last_layer

    @property
    def first_output(self) -> int:
        """The first position whose hidden state is still needed: to sample from, to score, or to be read."""
        if not self.is_given:
            return len(self.ids) - 1
        return max(self.num_prompt - 1 if self.read is None else self.read.start, self.num_observed)

    @property
    def is_exhausted(self) -> bool:
        """Whether the last token it may have is sampled, or being sampled."""
        return self.num_total >= self.max_total and not self.is_given

    def block_hashes(self, block_size: int) -> list[bytes]:
        """The hash of every full block of known tokens."""
        for index in range(len(self._hashes), len(self.ids) // block_size):
            start, stop = index * block_size, (index + 1) * block_size
            keys = [image.key for image in self.images if image.start < stop and image.stop > start]
            before = self._hashes[-1] if index else b"" if self.adapter is None else self.adapter.key
            self._hashes.append(block_hash(before, self.ids[start:stop], keys))
        return self._hashes

    def newly_full(self, block_size: int) -> list[tuple[int, bytes]]:
        """Blocks that have become full since the last call, with their hashes."""
        num_full = min(self.num_computed, len(self.ids)) // block_size
        first, self._num_cached_blocks = self._num_cached_blocks, max(num_full, self._num_cached_blocks)
        if num_full <= first:
            return []
        hashes = self.block_hashes(block_size)
        return [(self.blocks[index], hashes[index]) for index in range(first, num_full)]

    def assign_slot(self, slot: int, blocks: list[int], *, num_computed: int) -> None:
        """Begin to run in a slot with these blocks, of which the first hold `num_computed` positions already."""
        self.slot, self.blocks, self.num_computed = slot, blocks, num_computed
        self.assignment = next(self._assignments)
        self._num_cached_blocks = 0

    def release_slot(self) -> list[int]:
        """Give up the slot and everything computed; returns the blocks."""
        blocks, self.blocks = self.blocks, []
        self.slot, self.num_computed, self.has_token_in_slot = None, 0, False
        return blocks

    def draft_tokens(self, count: int) -> tuple[int, ...]:
        """Propose at most `count` next tokens; none where sampling is more than the argmax, as drafts are exact only there."""
        sampling = self.sampling
        if sampling is None or not sampling.is_plain or self.num_new < sampling.params.min_new_tokens:
            return ()
        return self._proposer.propose(self.ids, count)


class RequestState(ABC):
    """A request on the side of the thread that computes it: its sequences, its handle, and its times."""

    def __init__(self, handle: RequestHandle, prompt: Prompt) -> None:
        self.handle = handle
        self.prompt = prompt
        self.sequences: list[Sequence] = []
        self.later: list[Sequence] = []  # those that wait for the first one's prompt
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

    def release(self) -> None:
        """Drop the sequences of a request that is over: they refer to it, a cycle that would keep its images."""
        self.sequences, self.later = [], []

    @abstractmethod
    def complete(self) -> None:
        """Finish the handle; all sequences have ended."""

    @abstractmethod
    def cancel(self) -> None:
        """Finish the handle before the sequences have ended; they have been removed."""


class GenerationState(RequestState):
    """Completions of a prompt. Without `streamed` and without stop strings, text is read off the tokens at the end."""

    def __init__(self, handle: RequestHandle, prompt: Prompt, *, streamed: bool, has_stop_strings: bool) -> None:
        super().__init__(handle, prompt)
        self._streamed = streamed
        self._reads_at_end = not streamed and not has_stop_strings

    def add(self, sequence: Sequence, token_ids: abc.Sequence[int], logprobs: abc.Sequence[TokenLogprob] = ()) -> bool:
        """Append tokens to one completion and put their text into the handle.

        Returns:
            Whether they ended it. Tokens after the end are dropped.
        """
        if self.first_token is None:
            self.first_token = time.perf_counter()
        detokenizer, sampling = sequence.detokenizer, sequence.sampling
        assert detokenizer is not None
        assert sampling is not None
        grammar = sampling.grammar
        num_before = len(sequence.ids)
        text = ""
        for token in token_ids:
            is_end = detokenizer.is_end(token, sequence.num_new)
            sequence.ids.append(token)
            if not self._reads_at_end:
                text += detokenizer.read([token])
            if grammar is not None and not is_end:
                grammar.accept(token)
            if detokenizer.stopped or is_end or (grammar is not None and grammar.is_over):
                sequence.finish_reason = "stop"
            elif len(sequence.ids) >= sequence.max_total:
                sequence.finish_reason = "length"
            if sequence.finish_reason is not None:
                break
        logprobs = [replace(token, top=token.top[: sampling.params.logprobs]) for token in logprobs]
        sequence.logprobs += logprobs
        ended = sequence.finish_reason is not None
        if ended:
            text += self._rest_of_text(sequence)
        self._put(sequence, text, sequence.ids[num_before:], logprobs)
        return ended

    def cancel(self) -> None:
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                self.end(sequence, "cancelled")
        self.complete()

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a completion without another token."""
        sequence.finish_reason = reason
        self._put(sequence, self._rest_of_text(sequence))

    def complete(self) -> None:
        completions = tuple(
            Completion(
                sequence.index,
                sequence.detokenizer.text,
                tuple(sequence.ids[sequence.num_prompt :]),
                tuple(sequence.logprobs),
                sequence.finish_reason,
                sequence.detokenizer.stop_string,
            )
            for sequence in self.sequences
            if sequence.detokenizer is not None and sequence.finish_reason is not None
        )
        num_new = sum(sequence.num_new for sequence in self.sequences)
        self.handle.finish(Result(self.handle.request_id, completions, self.usage(num_new), self.timings()))

    def _rest_of_text(self, sequence: Sequence) -> str:
        """The last of a completion's text: what was held back, or all of it where nothing was read before."""
        detokenizer = sequence.detokenizer
        assert detokenizer is not None
        read = detokenizer.read(sequence.ids[sequence.num_prompt :]) if self._reads_at_end else ""
        return read + detokenizer.finish()

    def _put(
        self,
        sequence: Sequence,
        text: str,
        token_ids: abc.Sequence[int] = (),
        logprobs: abc.Sequence[TokenLogprob] = (),
    ) -> None:
        if self._streamed:
            detokenizer, reason = sequence.detokenizer, sequence.finish_reason
            stop = detokenizer.stop_string if detokenizer is not None and reason is not None else None
            self.handle.put(Chunk(sequence.index, text, tuple(token_ids), tuple(logprobs), reason, stop))


class ScoringState(RequestState):
    """The probabilities of a continuation."""

    def __init__(self, handle: RequestHandle, prompt: Prompt) -> None:
        super().__init__(handle, prompt)
        self._scores: list[TokenScore] = []

    def add(self, sequence: Sequence, scores: abc.Sequence[TokenScore]) -> bool:
        """Append scores, in order; returns whether these were the last."""
        self._scores += scores
        return len(self._scores) == len(sequence.ids) - sequence.num_prompt

    def complete(self) -> None:
        sequence = self.sequences[0]
        self.handle.finish(
            Score(
                tuple(sequence.ids[sequence.num_prompt :]),
                tuple(score.logprob for score in self._scores),
                all(score.is_argmax for score in self._scores),
                self.usage(0),
                tuple(score.top for score in self._scores) if sequence.num_top else (),
            )
        )

    def cancel(self) -> None:
        self.handle.fail(Cancelled(f"request {self.handle.request_id} was cancelled"))


class EmbeddingState(RequestState):
    """Hidden states, pooled while they come, or what the vision tower makes of the images (then without a sequence)."""

    def __init__(self, handle: RequestHandle, prompt: Prompt, pooling: Pooling, *, normalize: bool) -> None:
        super().__init__(handle, prompt)
        self.pooling, self._normalize = pooling, normalize
        self._parts: list[np.ndarray] = []
        self._num_states = 0

    def add(self, states: np.ndarray, num_states: int) -> None:
        """Append states (n, D), or the sum (1, D) of `num_states` of them where the mean is asked for."""
        self._parts.append(states)
        self._num_states += num_states

    def complete(self) -> None:
        vectors = np.concatenate(self._parts)
        if self.pooling == "mean":
            vectors = vectors.sum(axis=0, keepdims=True) / np.float32(self._num_states)
        if self._normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        self.handle.finish(Embedding(vectors, self.usage(0)))

    def usage(self, num_new: int) -> Usage:
        if self.sequences:
            return super().usage(num_new)
        return Usage(self.prompt.num_text_tokens, self.prompt.num_image_tokens, 0, num_new)

    def cancel(self) -> None:
        self.handle.fail(Cancelled(f"request {self.handle.request_id} was cancelled"))
