"""One answer, as text that arrives piece by piece.

In: a loaded model and its tokenizer, a prompt as token ids (-200 for each image) and pixels. Out: an `AnswerStream`,
an iterator of text, and after its end an `Answer`; one token at most after `cancel()`. Prompts come from conversation.py
and processor.py, the text is read off the tokens by text/detokenizer.py, and the loop over tokens is the model's `generate`.
This is for what the engine does not do: beams, and language models that it has no arithmetic for.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import check_placeholders
from llava.engine.request import PromptSize
from llava.errors import InputError
from llava.images.layout import ImagePolicy, plan
from llava.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest one each time."""

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"the temperature is {self.temperature}; give 0 (always the likeliest token) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}; give a share of probability above 0 and at most 1")
        if self.num_beams < 1:
            raise InputError(f"the number of beams is {self.num_beams}; give 1 or more")
        if self.max_new_tokens < 1:
            raise InputError(f"the number of new tokens is limited to {self.max_new_tokens}; allow 1 or more")

    def fitted(self, prompt: PromptSize, context_len: int) -> Sampling:
        """The same with no more new tokens than the context has room for after a prompt."""
        return replace(self, max_new_tokens=prompt.room(context_len, self.max_new_tokens))

    def generate_arguments(self) -> dict[str, Any]:
        """The same for `model.generate`."""
        sampled = self.temperature > 0
        chosen = {"temperature": self.temperature, "top_p": self.top_p} if sampled else {}
        return {
            "do_sample": sampled,
            "num_beams": self.num_beams,
            **{name: value for name, value in chosen.items() if value is not None},
        }


def measure_prompt(
    input_ids: Sequence[int], image_sizes: Sequence[Sequence[int]], policy: ImagePolicy | None
) -> PromptSize:
    """Count a prompt's positions before anything is computed, and its image placeholders against its images."""
    num_placeholders = sum(1 for token in input_ids if token == IMAGE_TOKEN_INDEX)
    check_placeholders(num_placeholders, len(image_sizes))
    num_image_tokens = sum(plan(size, policy).num_features for size in image_sizes) if policy else 0
    return PromptSize(len(input_ids) - num_placeholders, num_image_tokens)


@dataclass(frozen=True)
class Answer:
    """A finished answer. `finish_reason` is "stop", "length" or "cancelled"; times count from the start, in seconds."""

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = field(repr=False)
    first_token_s: float | None
    total_s: float


def stream_answer(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    *,
    images: Tensor | Sequence[Tensor] | None = None,
    image_sizes: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> AnswerStream:
    """Start answering one prompt (1, L) in a thread of its own, and hand its text out as it comes.

    Use it as `with stream_answer(...) as stream:`; leaving the block early cancels. With several beams nothing is
    certain before the end, so the text then comes in one piece.
    """
    sampling = sampling or Sampling()
    return AnswerStream(model, tokenizer, input_ids, images, image_sizes, sampling, stop)


class AnswerStream:
    """Iterator of text pieces, never empty; joined they are `answer.text`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor] | None,
        image_sizes: Sequence[Sequence[int]] | None,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> None:
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._sampling = sampling
        self._started = time.perf_counter()
        self._first_token_s: float | None = None
        self._answer: Answer | None = None
        self._reader = IncrementalDetokenizer(tokenizer, stop)
        arguments = sampling.generate_arguments()
        self._num_prompt = 0
        if hasattr(model, "image_policy"):
            arguments.update(images=images, image_sizes=image_sizes)
        else:  # a plain language model: takes ids on its own device, and repeats them before the new ones
            input_ids, self._num_prompt = input_ids.to(model.device), input_ids.shape[1]
        if model.generation_config.pad_token_id is None:  # a single row is never padded; transformers wants one named
            arguments["pad_token_id"] = tokenizer.eos_token_id
        self._thread = threading.Thread(target=self._run, args=(model, input_ids, arguments), daemon=True)
        self._thread.start()
        # A program that ends in the middle of an answer waits for the token being computed: torch must not be cut short.
        weakref.finalize(self, _stop, self._cancelled, self._thread)

    # The reader's side.

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            try:
                # The timeout lets Ctrl-C through on systems where a waiting lock does not.
                piece = self._pieces.get(timeout=1.0)
            except queue.Empty:
                continue
            if piece is None:
                self._pieces.put(None)  # whoever asks again after the end is told again
                self._thread.join()
                raise StopIteration
            if isinstance(piece, BaseException):
                self._pieces.put(None)
                raise piece
            return piece

    def cancel(self) -> None:
        """Stop after the token that is being computed; what has come so far stays."""
        self._cancelled.set()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()
        self._thread.join()

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended or was cancelled; waits for that."""
        self._thread.join()
        if self._answer is None:
            raise RuntimeError("generation failed, so there is no answer; the iterator raised why")
        return self._answer

    # The model's side, in the thread.

    def _run(self, model: Any, input_ids: Tensor, arguments: dict[str, Any]) -> None:
        import torch

        try:
            with torch.inference_mode():
                output = model.generate(
                    input_ids,
                    max_new_tokens=self._sampling.max_new_tokens,
                    use_cache=True,
                    stopping_criteria=[self._watch],
                    **arguments,
                )
            if self._sampling.num_beams > 1:
                self._read(output[0, self._num_prompt :].tolist())
            self._put(self._reader.finish())
            self._answer = Answer(
                text=self._reader.text,
                finish_reason=self._finish_reason(),
                token_ids=tuple(self._reader.token_ids),
                first_token_s=self._first_token_s,
                total_s=time.perf_counter() - self._started,
            )
            self._pieces.put(None)
        except BaseException as error:  # handed to the thread that reads, which raises it
            self._pieces.put(error)

    def _watch(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by `generate` after every token with all new ones; says for each row whether to stop."""
        import torch

        if self._sampling.num_beams == 1:
            self._read(input_ids[0, self._num_prompt + len(self._reader.token_ids) :].tolist())
        done = self._reader.stopped or self._cancelled.is_set()
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)

    def _read(self, token_ids: list[int]) -> None:
        if self._first_token_s is None and token_ids:
            self._first_token_s = time.perf_counter() - self._started
        self._put(self._reader.read(token_ids))

    def _put(self, text: str) -> None:
        if text:
            self._pieces.put(text)

    def _finish_reason(self) -> str:
        if not self._reader.stopped and len(self._reader.token_ids) >= self._sampling.max_new_tokens:
            return "length"
        return "cancelled" if self._cancelled.is_set() and not self._reader.stopped else "stop"


def _stop(cancelled: threading.Event, thread: threading.Thread) -> None:
    cancelled.set()
    thread.join()
