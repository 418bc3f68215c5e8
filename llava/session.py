"""A conversation with a model as `llava chat` holds it: what was asked, shown and answered so far.

In: a loaded model, questions and images. Out: streams of answers, and the conversation as JSON that can be read back.
An engine answers, so that a follow-up pays for its new words only; where it has no arithmetic for a model, and for beams,
`model.generate` does. How it is typed and shown is in cli/chat.py and cli/terminal.py; the prompt is rendered by
conversation.py and processor.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.conversation import Conversation, answer_end, get_template, with_image_placeholders
from llava.engine.hf_engine import Answer, AnswerStream, Sampling, stream_answer
from llava.engine.request import PromptSize
from llava.errors import InputError
from llava.images.io import DEFAULT_LIMITS, ImageLimits, load_image

if TYPE_CHECKING:
    from PIL import Image

    from llava.engine.answer_stream import EngineStream
    from llava.engine.engine import Engine
    from llava.model.builder import LoadedModel

logger = logging.getLogger(__name__)

FORMAT = "llava-conversation-1"


@dataclass(frozen=True)
class LoadedImage:
    """An opened image and where it came from."""

    source: str
    image: Image.Image

    @classmethod
    def open(cls, source: str | Path | Image.Image, limits: ImageLimits = DEFAULT_LIMITS) -> LoadedImage:
        name = str(source) if isinstance(source, (str, Path)) else "(an image in memory)"
        return cls(name, load_image(source, limits=limits))


@dataclass(frozen=True)
class Exchange:
    """A question as it was typed, the images given with it, and the answer."""

    question: str
    images: tuple[LoadedImage, ...]
    answer: str


@dataclass(frozen=True)
class Asked:
    """A question on its way: its stream, its prompt, and how much of the context that takes."""

    stream: AnswerStream | EngineStream
    prompt: str
    size: PromptSize
    num_new_tokens: int  # at most, after what the context has room for


class Session:
    """The state of one conversation. `waiting` are images that go with the next question.

    `template` is the model's own unless one is given, `sampling` is greedy unless it says otherwise. `use_engine=False`
    answers by `model.generate`, for whoever wants to watch the model's own methods.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        template: Conversation | None = None,
        sampling: Sampling | None = None,
        *,
        use_engine: bool = True,
    ) -> None:
        from llava.model.config import LlavaSettings
        from llava.processor import Processor

        settings = LlavaSettings.from_hf(loaded.model.config)
        self._loaded = loaded
        self._template = template or get_template(loaded.conv_mode)
        self._sampling = sampling or Sampling()
        self._use_engine = use_engine and self._sampling.num_beams == 1
        # A language model without a vision tower comes without a processor; its prompts need only the tokenizer.
        self._processor = loaded.processor or Processor(loaded.tokenizer, None, settings)
        self.exchanges: list[Exchange] = []
        self.waiting: tuple[LoadedImage, ...] = ()

    def answer(self, question: str, *images: str | Path | Image.Image) -> str:
        """Ask about images (paths, URLs or Pillow images) and wait for the whole answer; both become history."""
        self.attach([LoadedImage.open(image) for image in images])
        with self.ask(question).stream as stream:
            for _ in stream:
                pass
        self.record(question, stream.answer)
        return stream.answer.text

    def attach(self, images: Sequence[LoadedImage]) -> None:
        self.refuse_without_tower(images)
        self.waiting = (*self.waiting, *images)

    def refuse_without_tower(self, images: Sequence[LoadedImage]) -> None:
        if images and self._loaded.image_processor is None:
            raise InputError(
                f"{self._loaded.info.folder} is a language model without a vision tower; it takes no images"
            )

    def ask(self, question: str) -> Asked:
        """Start answering. The question and the waiting images become history with `record`."""
        conversation = self.conversation(question)
        given = [*(image for exchange in self.exchanges for image in exchange.images), *self.waiting]
        images = [image.image for image in given]
        engine = self._engine if self._use_engine else None
        return (
            self._ask_model(conversation, images) if engine is None else self._ask_engine(engine, conversation, images)
        )

    def _ask_engine(self, engine: Engine, conversation: Conversation, images: list[Image.Image]) -> Asked:
        from llava.engine.answer_stream import EngineStream, sampling_params
        from llava.engine.request import Request

        stream = EngineStream(engine, Request(conversation, images, sampling_params(self._sampling)))
        return Asked(stream, conversation.get_prompt(), stream.size, stream.max_new_tokens)

    def _ask_model(self, conversation: Conversation, images: list[Image.Image]) -> Asked:
        inputs = self._processor(conversation, images)
        num_image_tokens = inputs.num_image_tokens
        size = PromptSize(inputs.num_tokens - num_image_tokens, num_image_tokens)
        sampling = self._sampling.fitted(size, self._loaded.context_len)
        stream = stream_answer(
            self._loaded.model,
            self._loaded.tokenizer,
            inputs.input_ids[None],
            images=inputs.images,
            image_sizes=inputs.image_sizes or None,
            sampling=sampling,
            stop=[answer_end(conversation)],
        )
        return Asked(stream, conversation.get_prompt(), size, sampling.max_new_tokens)

    @cached_property
    def _engine(self) -> Engine | None:
        """One for the whole conversation, made at its first question; None where it cannot run the model."""
        from llava.engine.engine import Engine, EngineConfig, unsupported_reason

        reason = unsupported_reason(self._loaded.model)
        if reason is not None:
            logger.info("answering by model.generate: %s", reason)
            return None
        return Engine.from_loaded(self._loaded, EngineConfig(max_running=1))

    def record(self, question: str, answer: Answer) -> None:
        """Keep an answered question, a broken off one too. Without any answer it leaves no trace, and its images wait."""
        if answer.text:
            self.exchanges.append(Exchange(question, self.waiting, answer.text))
            self.waiting = ()

    def conversation(self, question: str) -> Conversation:
        """The history and a question not answered yet, in the template's words."""
        conversation = self._template.copy()
        user, assistant = conversation.roles
        placeholder = self._processor.image_placeholder
        for exchange in self.exchanges:
            conversation.append_message(
                user, with_image_placeholders(exchange.question, len(exchange.images), placeholder)
            )
            conversation.append_message(assistant, exchange.answer)
        conversation.append_message(user, with_image_placeholders(question, len(self.waiting), placeholder))
        conversation.append_message(assistant, None)
        return conversation

    def undo(self) -> Exchange:
        """Take the last exchange back; its images wait for the next question again."""
        if not self.exchanges:
            raise InputError("there is no question to take back yet")
        last = self.exchanges.pop()
        self.waiting = (*last.images, *self.waiting)
        return last

    def reset(self) -> None:
        self.exchanges, self.waiting = [], ()

    # The conversation as a file.

    def save(self, path: str) -> None:
        exchanges = [
            {
                "images": [image.source for image in exchange.images],
                "question": exchange.question,
                "answer": exchange.answer,
            }
            for exchange in self.exchanges
        ]
        content = {
            "format": FORMAT,
            "model": str(self._loaded.info.folder),
            "system": self._template.system,
            "exchanges": exchanges,
        }
        try:
            Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"the conversation cannot be written to {path!r}: {error.strerror}") from error

    def load(self, path: str, limits: ImageLimits) -> None:
        """Take up a saved conversation in place of this one; its images are opened again from where they came."""
        exchanges = [
            Exchange(
                row["question"], tuple(LoadedImage.open(source, limits) for source in row["images"]), row["answer"]
            )
            for row in _read_saved(path)
        ]
        self.refuse_without_tower([image for exchange in exchanges for image in exchange.images])
        self.exchanges, self.waiting = exchanges, ()


def _read_saved(path: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the conversation {path!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path!r} is not a saved conversation: it is no JSON ({error})") from error
    rows = content.get("exchanges") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(rows, list) or not all(_is_exchange(row) for row in rows):
        raise InputError(f"{path!r} is not a conversation that /save wrote (its format is not {FORMAT!r})")
    return rows


def _is_exchange(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("question"), str)
        and isinstance(row.get("answer"), str)
        and isinstance(row.get("images"), list)
        and all(isinstance(source, str) for source in row["images"])
    )
