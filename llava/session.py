"""A conversation with a model as `llava chat` holds it: what was asked, shown and answered so far.

In: a loaded model, questions, images and videos. Out: handles that stream answers, and the conversation as JSON that can be
read back. One engine answers all questions, so a follow-up is computed for its new tokens only. How a conversation is typed
and shown is in cli/chat.py and cli/terminal.py; the prompt is rendered by conversation.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.conversation import Conversation, get_template, image_placeholder, with_image_placeholders
from llava.engine.config import EngineConfig
from llava.engine.request import Request, SamplingParams
from llava.errors import InputError
from llava.images.download import DEFAULT_LIMITS, ImageLimits
from llava.images.frames import DEFAULT_VIDEO_LIMITS, FrameSampling, Video
from llava.images.io import load_image
from llava.images.video import is_video, load_video

if TYPE_CHECKING:
    from PIL import Image

    from llava.engine.base import BaseEngine
    from llava.engine.handle import RequestHandle
    from llava.model.builder import LoadedModel

FORMAT = "llava-conversation-1"


@dataclass(frozen=True)
class VideoOptions:
    """How videos are opened, among what a user names."""

    sampling: FrameSampling = field(default_factory=FrameSampling)
    as_video: bool = False  # folders of frames and animated images are videos too
    as_images: bool = False  # each frame is an image of its own, for models that take no videos
    tells_times: bool | None = None  # as `Video` has it


@dataclass(frozen=True)
class LoadedImage:
    """An opened image or video, and where it came from; `frame` is the number of a video's frame that is an image here."""

    source: str
    image: Image.Image | Video
    videos: VideoOptions | None = None  # by which a video was opened
    frame: int | None = None

    @classmethod
    def open(cls, source: str | Path | bytes | Image.Image, limits: ImageLimits = DEFAULT_LIMITS) -> LoadedImage:
        """Open one image, or a video as the usual frames of it."""
        return cls.open_all(source, limits)[0]

    @classmethod
    def open_all(
        cls,
        source: str | Path | bytes | Image.Image,
        limits: ImageLimits = DEFAULT_LIMITS,
        videos: VideoOptions | None = None,
    ) -> list[LoadedImage]:
        """Open an image, or a video: as one, or as an image for each of its frames."""
        videos = videos or VideoOptions()
        name = str(source) if isinstance(source, (str, Path)) else "(an image in memory)"
        if not isinstance(source, (str, Path, bytes)) or not is_video(source, as_video=videos.as_video):
            return [cls(name, load_image(source, limits=limits))]
        allowed = replace(
            DEFAULT_VIDEO_LIMITS,
            timeout_s=max(DEFAULT_VIDEO_LIMITS.timeout_s, limits.timeout_s),
            allow_private_hosts=limits.allow_private_hosts,
        )
        video = replace(load_video(source, videos.sampling, allowed), tells_times=videos.tells_times)
        if not videos.as_images:
            return [cls(name, video, videos)]
        return [cls(name, frame, videos, number) for number, frame in enumerate(video.frames)]

    def describe(self) -> str:
        """What was opened, in one line: the size of an image, or the frames of a video."""
        if isinstance(self.image, Video):
            width, height = self.image.size
            return f"{self.source} ({self.image.describe()}, {width}x{height})"
        size = f"{self.image.width}x{self.image.height}"
        return f"{self.source} ({size})" if self.frame is None else f"{self.source} (its frames as images, {size})"

    def saved(self) -> str | dict[str, Any]:
        """What a file of a conversation says of it."""
        if self.videos is None:
            return self.source
        return {"source": self.source, "frame": self.frame, **asdict(self.videos)}

    @classmethod
    def reopen(cls, saved: str | dict[str, Any], limits: ImageLimits) -> LoadedImage:
        if isinstance(saved, str):
            return cls.open(saved, limits)
        values = dict(saved)
        source, frame = values.pop("source"), values.pop("frame", None)
        videos = VideoOptions(**{**values, "sampling": FrameSampling(**values["sampling"])})
        return cls.open_all(source, limits, videos)[frame or 0]


@dataclass(frozen=True)
class Exchange:
    """A question as it was typed, the images given with it, and the answer."""

    question: str
    images: tuple[LoadedImage, ...]
    answer: str


class Session:
    """The state of one conversation. `waiting` are images that go with the next question.

    Args:
        template: The conversation so far, usually empty; None: the model's own template.
        sampling: How tokens are chosen, which may be changed between questions; None: greedy.
        engine: What answers; None: the one that `open_engine` chooses, opened at the first question.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        template: Conversation | None = None,
        sampling: SamplingParams | None = None,
        *,
        engine: BaseEngine | None = None,
    ) -> None:
        from llava.model.config import LlavaSettings

        self._loaded = loaded
        self._template = template or get_template(loaded.conv_mode)
        self.sampling = sampling or SamplingParams()
        self._given_engine = engine
        self._placeholder = image_placeholder(LlavaSettings.from_hf(loaded.model.config).tokens.use_im_start_end)
        self.exchanges: list[Exchange] = []
        self.waiting: tuple[LoadedImage, ...] = ()

    def answer(self, question: str, *images: str | Path | Image.Image) -> str:
        """Ask about images and videos (paths, URLs or Pillow images) and wait for the whole answer; both become history."""
        self.attach([LoadedImage.open(image) for image in images])
        with self.ask(question) as handle:
            text = handle.result().text
        self.record(question, text)
        return text

    def attach(self, images: Sequence[LoadedImage]) -> None:
        self.refuse_without_tower(images)
        self.waiting = (*self.waiting, *images)

    def refuse_without_tower(self, images: Sequence[LoadedImage]) -> None:
        """Refuse images where the model takes none, and videos where it takes none."""
        if images and self._loaded.image_processor is None:
            raise InputError(
                f"{self._loaded.info.folder} is a language model without a vision tower; it takes no images"
            )
        videos = [image.source for image in images if isinstance(image.image, Video)]
        if videos and (self._loaded.processor is None or self._loaded.processor.video_policy is None):
            raise InputError(
                f"{self._loaded.info.folder} takes images and no videos; give {videos[0]} with --frames-as-images, which makes "
                "an image of each frame"
            )

    @property
    def images(self) -> list[LoadedImage]:
        """All images of the conversation, in the order of their placeholders."""
        return [*(image for exchange in self.exchanges for image in exchange.images), *self.waiting]

    def ask(self, question: str) -> RequestHandle:
        """Start answering; iterate over the handle for chunks of text, its `result()` is the whole answer.

        The question and the waiting images become history with `record`.
        """
        request = Request(self.conversation(question), [image.image for image in self.images], self.sampling)
        return self._engine.stream(request)

    @cached_property
    def _engine(self) -> BaseEngine:
        """One for the whole conversation."""
        if self._given_engine is not None:
            return self._given_engine
        from llava.engine.selection import open_engine

        return open_engine(self._loaded, EngineConfig(max_running=1), num_beams=self.sampling.num_beams)

    def record(self, question: str, answer: str) -> None:
        """Keep a question and its answer, a cancelled one too. An empty answer is not kept, and its images wait."""
        if answer:
            self.exchanges.append(Exchange(question, self.waiting, answer))
            self.waiting = ()

    def conversation(self, question: str) -> Conversation:
        """The history and a question not answered yet, in the template's words."""
        conversation = self._template.copy()
        user, assistant = conversation.roles
        for exchange in self.exchanges:
            conversation.append_message(
                user, with_image_placeholders(exchange.question, len(exchange.images), self._placeholder)
            )
            conversation.append_message(assistant, exchange.answer)
        conversation.append_message(user, with_image_placeholders(question, len(self.waiting), self._placeholder))
        conversation.append_message(assistant, None)
        return conversation

    def prompt(self, question: str) -> str:
        """The text of a question's prompt, with all that is added to it."""
        conversation = self.conversation(question)
        if self._loaded.processor is None:
            return conversation.get_prompt()
        told = self._loaded.processor.with_times(conversation, [image.image for image in self.images])
        return told if isinstance(told, str) else told.get_prompt()

    @property
    def system(self) -> str:
        """The system text, without the markup that some templates keep in it."""
        text, markup = self._template.system, self._template.system_markup
        return text.partition(markup)[2] if markup and markup in text else text

    def set_system(self, text: str) -> None:
        """Give the conversation another system text, from its beginning on."""
        self._template = self._template.with_system(text)

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
                "images": [image.saved() for image in exchange.images],
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
                row["question"], tuple(LoadedImage.reopen(saved, limits) for saved in row["images"]), row["answer"]
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


def _is_video(saved: object) -> bool:
    """Whether something is what `LoadedImage.saved` says of a video."""
    if not (
        isinstance(saved, dict) and isinstance(saved.get("source"), str) and isinstance(saved.get("sampling"), dict)
    ):
        return False
    names = {entry.name for entry in fields(VideoOptions)} | {"source", "frame"}
    return saved.keys() <= names and saved["sampling"].keys() <= {entry.name for entry in fields(FrameSampling)}


def _is_exchange(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("question"), str)
        and isinstance(row.get("answer"), str)
        and isinstance(row.get("images"), list)
        and all(isinstance(saved, str) or _is_video(saved) for saved in row["images"])
    )
