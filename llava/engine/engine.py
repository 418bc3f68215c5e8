"""The engine: many questions to one model at a time, over a paged key-value cache.

In: requests (request.py) from any thread. Out: results, or handles that give chunks as they come. The interface is in
base.py. Prompts are built in the caller's thread (prompt_builder.py); loop.py computes in a thread of its own.

    with Engine.from_loaded(llava.load(path)) as engine:
        results = engine.generate([Request(conversation, [image]), ...])
        for chunk in engine.stream(Request(conversation, [image])): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self, overload

import torch

from llava.engine.adapters.adapter import AdapterReader, Base
from llava.engine.adapters.store import AdapterStore
from llava.engine.base import BaseEngine, EngineStats, end_ids_of
from llava.engine.config import EngineConfig
from llava.engine.decoder import Decoder
from llava.engine.encoder_cache import EncoderCache
from llava.engine.grammar import Grammar, GrammarMaker
from llava.engine.handle import RequestHandle
from llava.engine.kernels import pick_kernels
from llava.engine.kv_cache import BlockPool, num_blocks_for
from llava.engine.loop import EngineLoop
from llava.engine.prompt import Prompt, spans_of
from llava.engine.prompt_builder import PromptBuilder
from llava.engine.request import Embedding, EmbedRequest, Request, SamplingParams, Score, ScoreRequest
from llava.engine.runner import Runner
from llava.engine.sampler import Sampler
from llava.engine.scheduler import Scheduler
from llava.engine.sequence import EmbeddingState, ScoringState, StateRead
from llava.engine.sequence import Sequence as RunningSequence
from llava.errors import InputError
from llava.images.gpu_preprocess import GpuPreprocessor
from llava.model.builder import LoadedModel
from llava.model.protocols import LlavaModel
from llava.model.tokenizer_setup import context_len
from llava.processor import Processor
from llava.utils import waiting


class Engine(BaseEngine):
    """Answers requests with one model, as many together as there is memory for.

    The model stays usable by itself, except that `EngineConfig.weights` takes its full weights away.
    """

    def __init__(self, model: LlavaModel, processor: Processor, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        on_gpu = torch.device(model.device).type == "cuda"
        max_positions = min(config.context_len or context_len(model.config), context_len(model.config))
        max_running = config.max_running or (256 if on_gpu else 32)
        max_step_tokens = config.max_step_tokens or (4096 if on_gpu else 512)
        block_size = config.block_size or (64 if on_gpu else 16)
        kernels = pick_kernels(model.device, model.dtype)
        decoder = Decoder(model, kernels, weights=config.weights, max_positions=max_positions)
        num_blocks = config.num_blocks or num_blocks_for(
            decoder,
            block_size=block_size,
            memory_fraction=config.memory_fraction,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            context_len=max_positions,
        )
        decoder.allocate(num_blocks, block_size)
        limit = min(max_positions, num_blocks * block_size)
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
            max_blocks=-(-limit // block_size),
            pixel_table=None if processor.image_processor is None else processor.image_processor.table(),
            gpu_preprocessor=gpu_preprocessor,
        )
        if on_gpu and config.graphs and kernels.capturable:
            tower = model.get_vision_tower() if processor.image_processor is not None else None
            with torch.inference_mode(), waiting("compiling kernels and recording CUDA graphs"):
                runner.record_graphs(None if tower is None else (3, tower.tile_size, tower.tile_size))
        scheduler = Scheduler(
            self._pool,
            block_size=block_size,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            draft=(lambda sequence: sequence.draft_tokens(config.speculation)) if config.speculation else None,
        )
        self.adapters = AdapterStore(AdapterReader(model, decoder), decoder.device, max_bytes=config.adapter_bytes)
        self._prompt_builder = PromptBuilder(
            processor,
            vocab_size=vocab_size,
            is_cached=self._features.__contains__,
            adapter_of=self.adapters.get,
            on_device=gpu_preprocessor is not None,
        )
        self._make_grammar_of = GrammarMaker(
            processor.tokenizer, vocab_size=vocab_size, end_ids=end_ids_of(model, processor.tokenizer)
        )
        overlap = on_gpu and config.overlap and not config.speculation
        self._worker: EngineLoop
        super().__init__(
            model,
            processor,
            config,
            EngineLoop(scheduler, runner, overlap=overlap, max_waiting=config.max_waiting),
            max_running=max_running,
            context_len=max_positions,
            limit=limit,
            vocab_size=vocab_size,
        )

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig | None = None) -> Self:
        engine = super().from_loaded(loaded, config)
        engine.adapters.reader.base = Base(loaded.info.folder, loaded.conv_mode)
        return engine

    @overload
    def score(self, requests: ScoreRequest) -> Score: ...
    @overload
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...
    def score(self, requests: ScoreRequest | Sequence[ScoreRequest]) -> Score | list[Score]:
        """How likely given continuations are, of one request or of many together."""
        if isinstance(requests, ScoreRequest):
            return self.submit_score(requests, wait=True).score()
        return self._wait_for_all([self.submit_score(request, wait=True) for request in requests], RequestHandle.score)

    def submit_score(
        self,
        request: ScoreRequest,
        *,
        wait: bool = False,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        """Submit a request to score; the arguments are those of `submit`, and the handle has the score."""
        prompt, continuation = self._prompt_builder.with_continuation(request)
        handle = self._handle(request.request_id, prompt, len(continuation), make_handle)
        if handle.max_new_tokens < len(continuation):
            raise InputError(
                f"a prompt of {handle.size.total} tokens and a continuation of {len(continuation)} do not fit a context of "
                f"{self._limit}"
            )
        state = ScoringState(handle, prompt)
        total = len(prompt.ids) + len(continuation)
        num_top = min(request.num_top, self._vocab_size)
        state.sequences = [
            RunningSequence(
                prompt,
                max_total=total,
                request=state,
                continuation=continuation,
                num_top=num_top,
                client=request.client,
            )
        ]
        self._worker.add(state, wait=wait)
        return handle

    @overload
    def embed(self, requests: EmbedRequest) -> Embedding: ...
    @overload
    def embed(self, requests: Sequence[EmbedRequest]) -> list[Embedding]: ...
    def embed(self, requests: EmbedRequest | Sequence[EmbedRequest]) -> Embedding | list[Embedding]:
        """The vectors of images or of a prompt's positions, of one request or of many together."""
        if isinstance(requests, EmbedRequest):
            return self.submit_embed(requests, wait=True).embedding()
        handles = [self.submit_embed(request, wait=True) for request in requests]
        return self._wait_for_all(handles, RequestHandle.embedding)

    def submit_embed(
        self,
        request: EmbedRequest,
        *,
        wait: bool = False,
        make_handle: Callable[..., RequestHandle] = RequestHandle,
    ) -> RequestHandle:
        """Submit a request to embed; the arguments are those of `submit`, and the handle has the embedding."""
        prompt = self._prompt_builder(request)
        read = None if request.stage == "tower" else self._read_of(request, prompt)
        handle = self._handle(request.request_id, prompt, 1, make_handle)
        state = EmbeddingState(handle, prompt, request.pooling, normalize=request.normalize)
        if read is not None:
            state.sequences = [
                RunningSequence(prompt, max_total=read.stop, request=state, read=read, client=request.client)
            ]
        self._worker.add(state, wait=wait)
        return handle

    def _read_of(self, request: EmbedRequest, prompt: Prompt) -> StateRead:
        """The hidden states of a request; raises where the prompt or the model has none of these."""
        num_layers = len(self._worker.runner.decoder.layers)
        layer = 0 if request.stage == "projector" else request.layer + (num_layers + 1) * (request.layer < 0)
        if not 0 <= layer <= num_layers:
            raise InputError(
                f"layer is {request.layer}; this model has hidden states 0 to {num_layers}, or -{num_layers + 1} to -1"
            )
        spans = spans_of(prompt, "images" if request.stage == "projector" else request.span)
        return StateRead(layer, spans, request.pooling, is_last_layer=layer == num_layers)

    def stats(self) -> EngineStats:
        worker, scheduler, pool = self._worker, self._worker.scheduler, self._pool
        return EngineStats(
            num_waiting=worker.num_waiting,
            num_running=len(scheduler.running),
            num_finished=worker.num_finished,
            num_blocks=pool.num_blocks,
            num_blocks_used=pool.num_used,
            block_size=scheduler.block_size,
            num_cached_blocks_found=pool.num_hits,
            num_features_found=self._features.num_hits,
            feature_cache_bytes=self._features.num_bytes,
            num_preemptions=scheduler.num_preemptions,
            num_steps=worker.stats.num_steps,
            num_prompt_tokens=worker.stats.num_prompt_tokens,
            num_new_tokens=worker.stats.num_new_tokens,
        )

    def _build_prompt(self, request: Request) -> Prompt:
        return self._prompt_builder(request)

    def _make_grammar(self, params: SamplingParams) -> Grammar | None:
        return self._make_grammar_of(params)

    def _check(self, params: SamplingParams) -> None:
        super()._check(params)
        if params.num_beams > 1:
            raise InputError(
                f"num_beams is {params.num_beams}, and the engine searches one beam; give 1, or use llava.engine.HFEngine"
            )


def _gpu_preprocessor(processor: Processor, device: torch.device) -> GpuPreprocessor | None:
    """What makes tiles on the device, where it knows how."""
    if (
        processor.image_processor is None
        or processor.policy is None
        or not GpuPreprocessor.supports(processor.image_processor, processor.policy)
    ):
        return None
    return GpuPreprocessor(processor.image_processor, processor.policy, device)
