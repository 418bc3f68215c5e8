"""The interface of an engine, and what its two kinds share: submitting requests and waiting for them.

In: requests (request.py) from any thread. Out: results, or handles that give chunks as they come. Prompts are built in the
caller's thread; a thread of the engine's own computes (worker.py). engine.py computes many requests together; hf_engine.py
runs one after another through `model.generate`; selection.py chooses between them.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar, overload

from llava.conversation import Conversation, answer_end
from llava.engine.config import EngineConfig
from llava.engine.grammar import Grammar
from llava.engine.handle import RequestHandle
from llava.engine.prompt import Prompt
from llava.engine.request import (
    Embedding,
    EmbedRequest,
    PromptSize,
    Request,
    Result,
    SamplingDefaults,
    SamplingParams,
    Score,
    ScoreRequest,
)
from llava.engine.sequence import GenerationState, SamplingState
from llava.engine.sequence import Sequence as RunningSequence
from llava.engine.worker import EngineWorker
from llava.errors import InputError
from llava.model.builder import LoadedModel
from llava.model.protocols import LanguageModel
from llava.processor import Processor
from llava.text.detokenizer import IncrementalDetokenizer
from llava.text.tokenization import Tokenizer

T = TypeVar("T")
NUM_LAST_WORDS = 16  # tokens, which is enough to read the next one


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine now, and what it has done so far. An engine without a block pool has no blocks."""

    num_waiting: int
    num_running: int
    num_finished: int
    num_blocks: int = 0
    num_blocks_used: int = 0
    block_size: int = 0
    num_cached_blocks_found: int = 0
    num_features_found: int = 0
    feature_cache_bytes: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed; those found in the cache are not among them
    num_new_tokens: int = 0


class BaseEngine(ABC):
    """Answers requests with one model, in a thread of its own. Use it as a context manager, or `close` it.

    Args:
        model: The loaded model.
        processor: Its tokenizer and image processor.
        config: How the engine is set up.
        worker: The thread that computes.
        max_running: How many sequences run together.
        context_len: Positions of one sequence.
        limit: Positions of one sequence that there is memory for.
        vocab_size: Token ids are below this.
    """

    def __init__(
        self,
        model: LanguageModel,
        processor: Processor,
        config: EngineConfig,
        worker: EngineWorker,
        *,
        max_running: int,
        context_len: int,
        limit: int,
        vocab_size: int,
    ) -> None:
        self.model = model
        self.tokenizer = processor.tokenizer
        self.config = config
        self.max_running = max_running
        self.context_len = context_len
        self.sampling_defaults = SamplingDefaults.of(model.generation_config)
        self._limit = limit
        self._vocab_size = vocab_size
        self._end_ids = end_ids_of(model, processor.tokenizer)
        self._numbers = itertools.count()
        self._worker = worker
        # The thread does not refer to this object, so dropping the engine, or leaving the program, ends the thread.
        self._close = weakref.finalize(self, worker.close)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig | None = None) -> Self:
        """The engine of what `llava.load` returned. A language model without a vision tower answers text."""
        processor = loaded.processor or Processor(loaded.tokenizer)
        return cls(loaded.model, processor, config)  # type: ignore[call-arg,arg-type]

    # Asking.

    @overload
    def generate(self, requests: Request) -> Result: ...
    @overload
    def generate(self, requests: Sequence[Request]) -> list[Result]: ...
    def generate(self, requests: Request | Sequence[Request]) -> Result | list[Result]:
        """Answer one request, or many in the order given; waits for all, and for room in the queue."""
        if isinstance(requests, Request):
            return self.submit(requests, streamed=False, wait=True).result()
        handles = [self.submit(request, streamed=False, wait=True) for request in requests]
        return self._wait_for_all(handles, RequestHandle.result)

    def submit(
        self,
        request: Request,
        *,
        streamed: bool = True,
        wait: bool = False,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        """Submit a request.

        Args:
            request: What to answer.
            streamed: Give chunks as they come. Without, there is only the result, which takes less work for every token.
            wait: Wait while the queue is full, rather than raise.
            make_handle: Another kind of handle, which may take chunks in the engine's own thread.

        Returns:
            The handle, which is the stream of chunks and has the result.

        Raises:
            InputError: The request cannot work.
            QueueFull: The queue is full, without `wait`.
            EngineClosed: The engine has been closed.
        """
        params = request.sampling.resolved(self.sampling_defaults)
        self._check(params)
        prompt = self._build_prompt(request)
        handle = self._handle(request.request_id, prompt, params.max_new_tokens, make_handle)
        ends, stop = self._ends_of(request)
        detokenizers = [
            IncrementalDetokenizer(
                self.tokenizer,
                stop,
                end_ids=ends,
                min_tokens=params.min_new_tokens,
                keep_space=params.is_constrained or params.keep_space,
                after=_last_words(prompt) if params.keep_space else (),
            )
            for _ in range(params.n)
        ]
        state = GenerationState(handle, prompt, streamed=streamed, has_stop_strings=detokenizers[0].has_stop_strings)
        state.sequences = [
            RunningSequence(
                prompt,
                max_total=len(prompt.ids) + handle.max_new_tokens,
                request=state,
                index=index,
                sampling=SamplingState(params, index, frozenset(detokenizer.end_ids), self._make_grammar(params)),
                detokenizer=detokenizer,
                client=request.client,
            )
            for index, detokenizer in enumerate(detokenizers)
        ]
        self._worker.add(state, wait=wait)
        return handle

    stream = submit  # the handle is the stream

    @overload
    def score(self, requests: ScoreRequest) -> Score: ...
    @overload
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...
    @abstractmethod
    def score(self, requests: ScoreRequest | Sequence[ScoreRequest]) -> Score | list[Score]:
        """The probabilities of given continuations, of one request or of many together."""

    @abstractmethod
    def submit_score(
        self,
        request: ScoreRequest,
        *,
        wait: bool = False,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        """Submit a request to score; the arguments are those of `submit`, and the handle has the score."""

    @overload
    def embed(self, requests: EmbedRequest) -> Embedding: ...
    @overload
    def embed(self, requests: Sequence[EmbedRequest]) -> list[Embedding]: ...
    @abstractmethod
    def embed(self, requests: EmbedRequest | Sequence[EmbedRequest]) -> Embedding | list[Embedding]:
        """The vectors of images or of a prompt's positions, of one request or of many together."""

    @abstractmethod
    def submit_embed(
        self,
        request: EmbedRequest,
        *,
        wait: bool = False,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        """Submit a request to embed; the arguments are those of `submit`, and the handle has the embedding."""

    def abort(self, request_id: str) -> None:
        """End a request within a step; one that is unknown, or over, is left alone."""
        self._worker.abort(request_id)

    @abstractmethod
    def stats(self) -> EngineStats:
        """The state now, and what was done so far."""

    @property
    def alive(self) -> bool:
        """Whether requests are answered; False after `close`, and where the engine's thread has died."""
        return self._worker.alive

    def close(self) -> None:
        """Cancel what runs, and end the thread. The model stays."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # What the kinds do differently.

    @abstractmethod
    def _build_prompt(self, request: Request) -> Prompt:
        """Tokenize a request and lay its images out."""

    def _make_grammar(self, params: SamplingParams) -> Grammar | None:
        """What the answer must match."""
        return None

    def _check(self, params: SamplingParams) -> None:
        """Raise for what this engine, or this model, cannot do. A subclass extends this."""
        for what, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((token for token in tokens if token >= self._vocab_size), None)
            if wrong is not None:
                raise InputError(f"{what} names token {wrong}, and this model's tokens are 0 to {self._vocab_size - 1}")

    # What they share.

    def _handle(
        self,
        request_id: str | None,
        prompt: Prompt,
        wanted: int,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        size = PromptSize(prompt.num_text_tokens, prompt.num_image_tokens)
        room = size.room(self._limit, wanted)
        # The handle keeps this engine alive until it is dropped itself.
        return make_handle(request_id or f"request-{next(self._numbers)}", self.abort, self._worker.wakeups, size, room)

    def _wait_for_all(self, handles: Sequence[RequestHandle], wait: Callable[[RequestHandle], T]) -> list[T]:
        try:
            return [wait(handle) for handle in handles]
        except BaseException:  # one has failed, or Ctrl-C: the others are not waited for
            for handle in handles:
                handle.abort()
            raise

    def _ends_of(self, request: Request) -> tuple[set[int], list[str]]:
        """Ids and strings that end an answer: the model's, the template's of a conversation, and the request's."""
        params = request.sampling
        ends, stop = set(params.stop_token_ids), list(params.stop)
        if not params.ignore_eos:
            ends |= self._end_ids
            if isinstance(request.prompt, Conversation):
                stop.append(answer_end(request.prompt))
        return ends, stop


def _last_words(prompt: Prompt) -> list[int]:
    """The last tokens of a prompt, behind its images."""
    tail = prompt.ids[-NUM_LAST_WORDS:]
    images = [at for at, token in enumerate(tail) if token < 0]
    return tail[images[-1] + 1 :] if images else tail


def end_ids_of(model: LanguageModel, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens at which `model.generate` ends too."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(int(token) for token in [*named, tokenizer.eos_token_id] if token is not None)
