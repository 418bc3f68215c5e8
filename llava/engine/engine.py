"""Many questions to one model at a time: the interface of the engine.

In: requests (request.py) from any thread. Out: results, or handles that give chunks as they come. Prompts are made in the
caller's thread (prompt.py); loop.py computes in a thread of its own, whatever asks: chat, a server, an evaluation.

    with Engine.from_loaded(llava.load(path)) as engine:
        results = engine.generate([Request(conversation, [image]), ...])
        for chunk in engine.stream(Request(conversation, [image])): ...
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch

from llava.conversation import Conversation, answer_end
from llava.engine.config import EngineClosed, EngineConfig, EngineError, QueueFull, UnsupportedModelError
from llava.engine.decoder import Decoder, unsupported_reason
from llava.engine.encoder_cache import EncoderCache
from llava.engine.grammar import GrammarMaker
from llava.engine.handle import RequestHandle
from llava.engine.job import AnswerJob, Job, ScoreJob
from llava.engine.kernels import pick_kernels
from llava.engine.kv_cache import BlockPool
from llava.engine.loop import Loop
from llava.engine.memory import num_blocks_for
from llava.engine.ngram import guess
from llava.engine.prompt import PromptBuilder
from llava.engine.request import PromptSize, Request, Result, SamplingParams, Score, ScoreRequest
from llava.engine.runner import Runner
from llava.engine.sampler import Choice, Sampler
from llava.engine.scheduler import Scheduler
from llava.engine.sequence import Prompt
from llava.engine.sequence import Sequence as Completion
from llava.errors import InputError
from llava.images.gpu_preprocess import GpuPreprocessor
from llava.model.config import LlavaSettings
from llava.model.tokenizer_setup import context_len
from llava.processor import Processor
from llava.text.detokenizer import IncrementalDetokenizer

__all__ = [
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "QueueFull",
    "UnsupportedModelError",
    "unsupported_reason",
]


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine now, and what it has done so far."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_blocks_used: int
    block_size: int
    num_cached_blocks_found: int
    num_features_found: int
    feature_cache_bytes: int
    num_preemptions: int
    num_steps: int
    num_prompt_tokens: int  # computed; those found in the cache are not among them
    num_new_tokens: int
    num_finished: int


class Engine:
    """Answers requests with one model, as many together as there is memory for.

    The model stays usable by itself, except that `EngineConfig.weights` takes its full weights away.
    """

    def __init__(self, model: Any, processor: Processor, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.config = config
        self.model = model
        self.tokenizer = processor.tokenizer
        on_gpu = torch.device(model.device).type == "cuda"
        self.context_len = min(config.context_len or context_len(model.config), context_len(model.config))
        max_running = config.max_running or (256 if on_gpu else 32)
        max_step_tokens = config.max_step_tokens or (4096 if on_gpu else 512)
        block_size = config.block_size or (64 if on_gpu else 16)
        kernels = pick_kernels(model.device, model.dtype)
        decoder = Decoder(model, kernels, weights=config.weights, max_positions=self.context_len)
        num_blocks = config.num_blocks or num_blocks_for(
            decoder,
            block_size=block_size,
            memory_fraction=config.memory_fraction,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            context_len=self.context_len,
        )
        decoder.allocate(num_blocks, block_size)
        self._limit = min(self.context_len, num_blocks * block_size)
        vocab_size = decoder.embedding.shape[0]
        self._pool = BlockPool(num_blocks, caching=config.prefix_cache)
        self._features = EncoderCache(config.feature_cache_bytes)
        gpu_preprocessor = _gpu_preprocessor(processor, decoder.device) if on_gpu else None
        runner = Runner(
            model,
            decoder,
            Sampler(kernels, max_running=max_running, vocab_size=vocab_size, device=decoder.device),
            self._features,
            block_size=block_size,
            max_running=max_running,
            max_blocks=-(-self._limit // block_size),
            pixel_table=None if processor.image_processor is None else processor.image_processor.table(),
            gpu_preprocessor=gpu_preprocessor,
        )
        if on_gpu and config.graphs:
            tower = model.get_vision_tower() if processor.image_processor is not None else None
            with torch.inference_mode():
                runner.record_graphs(None if tower is None else (3, tower.tile_size, tower.tile_size))
        scheduler = Scheduler(
            self._pool,
            block_size=block_size,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            draft=(lambda sequence: guess(sequence, config.speculation)) if config.speculation else None,
        )
        self._build_prompt = PromptBuilder(
            processor,
            vocab_size=vocab_size,
            knows=self._features.__contains__,
            on_device=gpu_preprocessor is not None,
        )
        self._vocab_size = vocab_size
        self._end_ids = _end_ids(model, self.tokenizer)
        self._make_grammar = GrammarMaker(self.tokenizer, vocab_size=vocab_size, end_ids=self._end_ids)
        self._names = itertools.count()
        overlap = on_gpu and config.overlap and not config.speculation
        self._loop = Loop(scheduler, runner, overlap=overlap, max_waiting=config.max_waiting)
        # The loop knows nothing of this object, so forgetting the engine, or leaving the program, ends the thread.
        self._close = weakref.finalize(self, self._loop.close)

    @classmethod
    def from_loaded(cls, loaded: Any, config: EngineConfig | None = None) -> Engine:
        """The engine of what `llava.load` gave. A language model without a vision tower answers text."""
        processor = loaded.processor or Processor(loaded.tokenizer, None, LlavaSettings.from_hf(loaded.model.config))
        return cls(loaded.model, processor, config)

    # Asking.

    @overload
    def generate(self, requests: Request) -> Result: ...
    @overload
    def generate(self, requests: Sequence[Request]) -> list[Result]: ...
    def generate(self, requests: Request | Sequence[Request]) -> Result | list[Result]:
        """Answer one request, or many together in the order given; waits for all, and for room in the queue."""
        if isinstance(requests, Request):
            return self._submit(requests, streamed=False, wait=True).result()
        return self._results([self._submit(request, streamed=False, wait=True) for request in requests])

    def submit(
        self, request: Request, *, streamed: bool = True, make_handle: Callable[..., RequestHandle] = RequestHandle
    ) -> RequestHandle:
        """Hand a request in. Raises InputError for what cannot work, and QueueFull.

        Without `streamed` there are no chunks, only the result, for which less has to be done at every token. A handle
        of another kind can take what comes in the engine's own thread.
        """
        return self._submit(request, streamed=streamed, wait=False, make_handle=make_handle)

    stream = submit  # the handle is the stream

    @overload
    def score(self, requests: ScoreRequest) -> Score: ...
    @overload
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...
    def score(self, requests: ScoreRequest | Sequence[ScoreRequest]) -> Score | list[Score]:
        """How likely given continuations are, of one request or of many together."""
        if isinstance(requests, ScoreRequest):
            return self._submit_score(requests).result()
        return self._results([self._submit_score(request) for request in requests])

    def abort(self, request_id: str) -> None:
        """End a request within a step; one that is unknown, or over, is left alone."""
        self._loop.abort(request_id)

    def stats(self) -> EngineStats:
        loop, scheduler, pool = self._loop, self._loop.scheduler, self._pool
        return EngineStats(
            num_waiting=loop.num_waiting,
            num_running=len(scheduler.running),
            num_blocks=pool.num_blocks,
            num_blocks_used=pool.num_used,
            block_size=scheduler.block_size,
            num_cached_blocks_found=pool.num_hits,
            num_features_found=self._features.num_hits,
            feature_cache_bytes=self._features.num_bytes,
            num_preemptions=scheduler.num_preemptions,
            num_steps=loop.stats.num_steps,
            num_prompt_tokens=loop.stats.num_prompt_tokens,
            num_new_tokens=loop.stats.num_new_tokens,
            num_finished=loop.stats.num_finished,
        )

    @property
    def alive(self) -> bool:
        """Whether requests are being answered; False after `close`, and where the thread that computes has died."""
        return self._loop.alive

    def close(self) -> None:
        """Cancel what runs, and end the thread. The model stays."""
        self._close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Handing in.

    def _submit(
        self,
        request: Request,
        *,
        streamed: bool,
        wait: bool,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        params = request.sampling
        self._check(params)
        prompt = self._build_prompt(request)
        handle = self._handle(request.request_id, prompt, params.max_new_tokens, make_handle)
        ends, stop = self._ends_of(request)
        readers = [
            IncrementalDetokenizer(
                self.tokenizer, stop, end_ids=ends, min_tokens=params.min_new_tokens,
                keep_space=params.json_schema is not None or params.regex is not None,
            )
            for _ in range(params.n)
        ]  # fmt: skip
        job = AnswerJob(handle, prompt, readers, streamed=streamed)
        job.sequences = [
            Completion(
                prompt,
                max_total=len(prompt.ids) + handle.max_new_tokens,
                owner=job,
                index=index,
                choice=Choice(params, index, frozenset(readers[0].end_ids), self._make_grammar(params)),
            )
            for index in range(params.n)
        ]
        return self._hand_in(job, wait=wait)

    def _submit_score(self, request: ScoreRequest) -> RequestHandle:
        prompt, continuation = self._build_prompt.with_continuation(request)
        handle = self._handle(None, prompt, len(continuation))
        if handle.max_new_tokens < len(continuation):
            raise InputError(
                f"a prompt of {handle.size.total} tokens and a continuation of {len(continuation)} do not fit a context of "
                f"{self._limit}"
            )
        job = ScoreJob(handle, prompt)
        total = len(prompt.ids) + len(continuation)
        job.sequences = [Completion(prompt, max_total=total, owner=job, continuation=continuation)]
        return self._hand_in(job, wait=True)

    def _hand_in(self, job: Job, *, wait: bool) -> RequestHandle:
        self._loop.add(job, wait=wait)
        return job.handle

    def _handle(
        self,
        name: str | None,
        prompt: Prompt,
        wanted: int,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        size = PromptSize(prompt.num_text_tokens, prompt.num_image_tokens)
        # The handle keeps this engine alive until it is forgotten itself.
        room = size.room(self._limit, wanted)
        return make_handle(name or f"request-{next(self._names)}", self.abort, self._loop.wakeups, size, room)

    def _results(self, handles: list[RequestHandle]) -> list[Any]:
        try:
            return [handle.result() for handle in handles]
        except BaseException:  # one has failed, or Ctrl-C: nobody waits for the others
            for handle in handles:
                handle.abort()
            raise

    def _check(self, params: SamplingParams) -> None:
        for what, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((token for token in tokens if token >= self._vocab_size), None)
            if wrong is not None:
                raise InputError(f"{what} names token {wrong}, and this model's tokens are 0 to {self._vocab_size - 1}")

    def _ends_of(self, request: Request) -> tuple[set[int], list[str]]:
        """Ids and strings that end an answer: the model's, the template's of a conversation, and the request's."""
        params = request.sampling
        ends, stop = set(params.stop_token_ids), list(params.stop)
        if not params.ignore_eos:
            ends |= self._end_ids
            if isinstance(request.prompt, Conversation):
                stop.append(answer_end(request.prompt))
        return ends, stop


def _gpu_preprocessor(processor: Processor, device: torch.device) -> GpuPreprocessor | None:
    """What makes tiles on the device, where it knows how."""
    if (
        processor.image_processor is None
        or processor.policy is None
        or not GpuPreprocessor.supports(processor.image_processor)
    ):
        return None
    return GpuPreprocessor(processor.image_processor, processor.policy, device)


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens at which `model.generate` ends too."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(int(token) for token in [*named, tokenizer.eos_token_id] if token is not None)
