"""An engine over `model.generate`: one request after another, for what the engine does not do.

In: requests (request.py) from any thread. Out: results, or handles that give chunks as they come. This runs beam search, and
language models that the engine has no arithmetic for. serve/cli.py, eval/run_llava.py and diagnose/tracer/generation.py ask for
it by name, because it calls the model's own `generate` and `forward`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, check_placeholders
from llava.engine.base import BaseEngine, EngineStats
from llava.engine.config import EngineConfig
from llava.engine.handle import RequestHandle
from llava.engine.prompt import Prompt
from llava.engine.prompt_builder import check_token_ids
from llava.engine.request import CONSTRAINTS, EmbedRequest, Request, SamplingParams, ScoreRequest
from llava.engine.sequence import GenerationState, RequestState, SamplingState
from llava.engine.sequence import Sequence as RunningSequence
from llava.engine.worker import EngineWorker
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.model.config import LlavaSettings
from llava.model.protocols import LanguageModel, LlavaModel
from llava.model.tokenizer_setup import context_len
from llava.processor import ModelInputs, Processor
from llava.text.tokenization import Tokenizer

NO_EMBEDDINGS = "model.generate gives no embeddings; the engine does, for models that it can run"
NO_SCORES = "model.generate scores no continuations; the engine does, for models that it can run"


@dataclass(frozen=True)
class ModelPrompt(Prompt):
    """A prompt as `model.generate` takes it. In `ids`, every image feature is -1."""

    inputs: ModelInputs = field(kw_only=True)

    @property
    def num_image_tokens(self) -> int:
        return self.inputs.num_image_tokens


class HFEngine(BaseEngine):
    """Answers requests through `model.generate`, one after another."""

    def __init__(self, model: LanguageModel, processor: Processor, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        if config.weights is not None:
            raise InputError(
                f"weights is {config.weights!r}, and model.generate takes the model's weights as they are; load the model "
                "with load_8bit or load_4bit instead"
            )
        positions = min(config.context_len or context_len(model.config), context_len(model.config))
        self._processor = processor
        self._lock = threading.Lock()  # tokenizers change settings of theirs while they work
        self._worker: GenerateLoop
        super().__init__(
            model,
            processor,
            config,
            GenerateLoop(model, processor.tokenizer, max_waiting=config.max_waiting),
            max_running=1,
            context_len=positions,
            limit=positions,
            vocab_size=model.get_input_embeddings().weight.shape[0],
        )

    @classmethod
    def of_parts(cls, model: LlavaModel, tokenizer: Tokenizer, image_processor: ClipImageProcessor) -> HFEngine:
        """The engine of what `load_pretrained_model` returned."""
        use_im_start_end = LlavaSettings.from_hf(model.config).tokens.use_im_start_end
        return cls(
            model, Processor(tokenizer, image_processor, model.image_policy(), use_im_start_end=use_im_start_end)
        )

    def score(self, requests: ScoreRequest | Sequence[ScoreRequest]) -> Any:
        raise InputError(NO_SCORES)

    def submit_score(self, request: ScoreRequest, **options: Any) -> RequestHandle:
        raise InputError(NO_SCORES)

    def embed(self, requests: EmbedRequest | Sequence[EmbedRequest]) -> Any:
        raise InputError(NO_EMBEDDINGS)

    def submit_embed(self, request: EmbedRequest, **options: Any) -> RequestHandle:
        raise InputError(NO_EMBEDDINGS)

    def stats(self) -> EngineStats:
        worker = self._worker
        return EngineStats(worker.num_waiting, worker.num_running, worker.num_finished)

    def _build_prompt(self, request: Request) -> Prompt:
        if request.adapter is not None:
            raise InputError(
                f"model.generate answers here, and takes no adapter {request.adapter!r} of a request; load the adapter's "
                "folder as the model"
            )
        if request.images and self._processor.image_processor is None:
            raise InputError("this model has no vision tower, so it cannot look at images")
        prompt, images = request.prompt, request.images
        with self._lock:
            if isinstance(prompt, (Conversation, str)):
                inputs = self._processor(prompt, images, details=request.details)
            else:
                given = check_token_ids(prompt, self._vocab_size, with_images=True)
                check_placeholders(given.count(IMAGE_TOKEN_INDEX), len(images))
                inputs = self._processor.inputs(given, images, details=request.details)
        ids: list[int] = []
        layouts = iter(inputs.layouts)
        for token in inputs.input_ids.tolist():
            ids += [-1] * next(layouts).num_features if token == IMAGE_TOKEN_INDEX else [token]
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        return ModelPrompt(ids, (), inputs=inputs)

    def _check(self, params: SamplingParams) -> None:
        super()._check(params)
        for name in ("logprobs", *CONSTRAINTS):
            if getattr(params, name) is not None:
                raise InputError(
                    f"model.generate answers this request, and takes no {name}; leave it out, or use a model that the engine "
                    "can run, and num_beams 1"
                )


class GenerateLoop(EngineWorker):
    """The thread that calls `model.generate`."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, max_waiting: int) -> None:
        super().__init__(max_waiting=max_waiting)
        self._model, self._tokenizer = model, tokenizer
        self._queue: deque[RequestState] = deque()
        self.num_running = 0
        self._thread.start()

    def _loop(self) -> None:
        while self._read_inbox(wait=not self._queue):
            if not self._queue:
                continue
            request = self._queue.popleft()
            assert isinstance(request, GenerationState)
            self._begin(request)
            self.num_running = 1
            try:
                for sequence in request.sequences:
                    with _seeded(sequence, self._model.device):
                        output = self._model.generate(**self._arguments(request, sequence))
                    if sequence.done or self._closing:  # cancelled
                        break
                    self._finish(request, sequence, output)
                else:
                    self._complete(request)
                    self._note_step()
            except Exception as error:
                if not request.handle.done:
                    self._fail(request, error)
                if isinstance(error, torch.AcceleratorError):  # others are `generate`'s, about one request
                    self._note_step(error)
            self.num_running = 0
            self.wakeups.send()

    def _admit(self, request: RequestState) -> None:
        super()._admit(request)
        self._queue.append(request)

    def _remove(self, request: RequestState) -> None:
        super()._remove(request)
        for sequence in request.sequences:
            sequence.done = True
        if request in self._queue:
            self._queue.remove(request)

    def _arguments(self, request: GenerationState, sequence: RunningSequence) -> dict[str, Any]:
        """What `generate` is called with; every field of the sampling parameters is in it."""
        prompt, state = request.prompt, sequence.sampling
        assert isinstance(prompt, ModelPrompt)
        assert state is not None
        params, inputs = state.params, prompt.inputs
        input_ids = inputs.input_ids[None]
        arguments: dict[str, object] = {
            "max_new_tokens": sequence.max_total - sequence.num_prompt,
            "min_new_tokens": params.min_new_tokens or None,
            "do_sample": not params.greedy,
            "num_beams": params.num_beams,
            "repetition_penalty": 1.0,  # by _LogitsAdjustment, which also knows the prompt's tokens
            "eos_token_id": sorted(state.end_ids),
            "use_cache": True,
        }
        if not params.greedy:
            arguments |= {"temperature": params.temperature, "top_p": state.top_p, "top_k": state.top_k}
            arguments["min_p"] = state.min_p or None
        if state.is_penalized or params.logit_bias:
            arguments["logits_processor"] = [
                _LogitsAdjustment(prompt.ids, state, num_echoed=self._num_echoed(sequence))
            ]
        if hasattr(self._model, "image_policy"):
            arguments |= {"images": inputs.images, "image_sizes": inputs.image_sizes or None}
            if "video" in inputs.modalities:
                arguments["modalities"] = inputs.modalities
        else:  # a plain language model takes ids on its own device
            input_ids = input_ids.to(self._model.device)
        if (
            self._model.generation_config.pad_token_id is None
        ):  # a single row is never padded; transformers wants one named
            arguments["pad_token_id"] = self._tokenizer.eos_token_id
        watch = partial(self._watch, request, sequence)
        return {"inputs": input_ids, "stopping_criteria": [watch], **arguments}

    def _watch(
        self,
        request: GenerationState,
        sequence: RunningSequence,
        input_ids: Tensor,
        scores: object,
        **kwargs: object,
    ) -> Tensor:
        """Called by `generate` after every token with all so far; delivers new ones, and says for each row whether to stop.

        With several beams nothing is certain before the end.
        """
        self._read_inbox(wait=False)
        if not sequence.done and len(input_ids) == 1:
            request.add(sequence, self._new_tokens(sequence, input_ids))
            self.wakeups.send()
        stop = sequence.done or sequence.finish_reason is not None or self._closing
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    def _finish(self, request: GenerationState, sequence: RunningSequence, output: Tensor) -> None:
        """Deliver what `generate` returned beyond the tokens seen before, and the end."""
        if sequence.finish_reason is None:
            request.add(sequence, self._new_tokens(sequence, output))
        if sequence.finish_reason is None:  # by a limit of the checkpoint's generation_config
            request.end(sequence, "length")
        sequence.done = True

    def _new_tokens(self, sequence: RunningSequence, ids: Tensor) -> list[int]:
        """The tokens in `generate`'s (B, L) that the sequence does not have yet."""
        return ids[0, self._num_echoed(sequence) + sequence.num_new :].tolist()

    def _num_echoed(self, sequence: RunningSequence) -> int:
        """How many tokens of the prompt `generate` puts before the new ones: all, for a plain language model."""
        return 0 if hasattr(self._model, "image_policy") else sequence.num_prompt


@contextmanager
def _seeded(sequence: RunningSequence, device: torch.device) -> Iterator[None]:
    """Draw by the sequence's own seed where the request has one, else by torch's generator as it is."""
    state = sequence.sampling
    assert state is not None
    if state.params.seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(state.seed)
        yield


class _LogitsAdjustment:
    """Penalties and biases, as sampler.py applies them: `generate` has some of them, and does not see the prompt's tokens."""

    def __init__(self, prompt_ids: Sequence[int], state: SamplingState, *, num_echoed: int) -> None:
        self._prompt = torch.tensor([token for token in prompt_ids if token >= 0])
        self._state, self._num_echoed = state, num_echoed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adjust scores (B, V) for the tokens so far (B, L)."""
        state, params = self._state, self._state.params
        new = input_ids[:, self._num_echoed :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        seen = counts > 0
        seen[:, self._prompt.to(scores.device)] = True
        factor = torch.where(seen, state.repetition_penalty, 1.0)
        scores = torch.where(scores > 0, scores / factor, scores * factor)
        scores = scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
        for token, bias in params.logit_bias.items():
            scores[:, token] += bias
        return scores
