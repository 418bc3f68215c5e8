"""The interface of a server's backends: an engine in this process or its own, or a remote server.

In: an `engine.Request`. Out: a `BackendRequest`, which yields `Chunk`s, can be aborted, and has its usage and timings at
the end. Backends are in_process.py, subprocess.py and remote.py. Nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from llava.conversation import Conversation
from llava.engine.request import (
    Chunk,
    Detail,
    Embedding,
    EmbedRequest,
    Request,
    SamplingDefaults,
    Score,
    ScoreRequest,
    Timings,
    Usage,
)
from llava.text.token_bytes import TokenPiece

if TYPE_CHECKING:
    from PIL import Image

    from llava.images.frames import Video
    from llava.processor import Layout


@dataclass(frozen=True)
class ModelCard:
    """What a server knows of its model."""

    name: str
    template: Conversation
    conv_mode: str
    context_len: int | None  # None: only the server elsewhere knows
    image_placeholder: str  # what stands for one image in a prompt
    takes_images: bool = True
    takes_videos: bool = False
    takes_grammar: bool = True  # False: answers are held to schemas alone
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)  # what is not given means
    # None where only the server elsewhere knows.
    architecture: str | None = None
    num_parameters: int | None = None
    dtype: str | None = None
    adapters: tuple[str, ...] = ()  # beside the model itself

    @property
    def model_names(self) -> list[str]:
        """What clients may ask for: the model, and each adapter as `model:adapter`."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters)]

    def adapter_of(self, model: str) -> str | None:
        """The adapter that one of these names asks for; None: the model itself."""
        return dict(zip(self.model_names, (None, *self.adapters), strict=True))[model]


class ServerBusyError(Exception):
    """No request is taken now; it may be tried again later, or elsewhere.

    `stopping`: never again by this server. `retry_after_s`: when to try again, where the server that answers has said so.
    """

    def __init__(self, message: str, *, stopping: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.stopping, self.retry_after_s = stopping, retry_after_s


class BackendError(Exception):
    """The backend failed at a valid request; the message is a sentence for the user."""


class UnreachableError(BackendError):
    """The engine or the remote server is not there. Where nothing has been answered, another worker may be tried."""


class BackendRequest(Protocol):
    """A request that a backend has accepted."""

    def batches(self, pause: Callable[[], float]) -> AsyncIterator[Sequence[Chunk]]:
        """Chunks that have come since the last batch. Without `streamed`, all at the end, one for each completion.

        After each batch chunks are collected for as many seconds as `pause` says, but not beyond the end.
        """

    def abort(self) -> None:
        """Stop and free what it holds; harmless after the end."""

    @property
    def usage(self) -> Usage:
        """After the end."""

    @property
    def timings(self) -> Timings:
        """After the end."""


class ServedModel(Protocol):
    """What is known of a model without running it."""

    @property
    def card(self) -> ModelCard: ...

    def plan(self, images: Sequence[Image.Image | Video], details: Sequence[Detail]) -> list[Layout]:
        """The layouts of images and videos; empty where only the remote server knows."""

    def with_times(
        self, prompt: Conversation | str | Sequence[int], images: Sequence[Image.Image | Video]
    ) -> Conversation | str | Sequence[int]:
        """The prompt as the backend will read it, with the times of videos where they are told."""

    def held_bytes(self, layouts: Sequence[Layout]) -> int:
        """Bytes held of planned images until the answer's end."""

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt of text alone; one thread at a time."""

    def token_piece(self, token_id: int) -> TokenPiece: ...

    def text_of(self, token_ids: Sequence[int]) -> str: ...

    def num_tokens(self, prompt: Conversation | str | Sequence[int], layouts: Sequence[Layout]) -> int | None:
        """Tokens of a prompt with images of these layouts; None where only the remote server knows. One thread at a time."""


class Backend(Protocol):
    @property
    def model(self) -> ServedModel: ...

    async def start(self, request: Request, *, streamed: bool) -> BackendRequest:
        """Submit a request; raises `InputError` where it cannot work, `ServerBusyError` where the queue is full."""

    async def score(self, request: ScoreRequest) -> Score:
        """The probabilities of given tokens; raises as `start` does, and where it knows none."""

    async def embed(self, request: EmbedRequest) -> Embedding:
        """The vectors of images or of a prompt; raises as `start` does, and where it knows none."""

    def gauges(self) -> Mapping[str, float]:
        """Numbers for monitoring, by name."""

    async def is_alive(self) -> bool: ...

    @property
    def lost(self) -> str | None:
        """Why it will never answer again, so that the server should end; None while it may."""

    async def close(self) -> None: ...
