"""What answers behind a server: an engine in this process, or a server elsewhere. Both look alike from here on.

In: an `engine.Request`. Out: an `Answering`, which yields `Chunk`s, can be aborted, and knows at its end what it cost. The
engine's side is here (`EngineBackend`); a server elsewhere is remote.py. HTTP is nobody's business in this file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llava.conversation import Conversation
from llava.engine.request import Chunk, Detail, Request, Timings, Usage

if TYPE_CHECKING:
    from llava.images.layout import ImageLayout


@dataclass(frozen=True)
class ModelCard:
    """What a server knows of its model."""

    name: str
    template: Conversation
    conv_mode: str
    context_len: int | None  # None: only the server elsewhere knows
    image_placeholder: str  # what stands for one image in a prompt
    takes_images: bool = True


class ServerBusyError(Exception):
    """No request is taken now; it may be tried again later, or elsewhere. `stopping`: never again by this server."""

    def __init__(self, message: str, *, stopping: bool = False) -> None:
        super().__init__(message)
        self.stopping = stopping


class BackendError(Exception):
    """The backend failed at a request that was in order; the message is a sentence for the user."""


class UnreachableError(BackendError):
    """The server elsewhere is not there. Nothing has been answered, so another worker may be asked."""


class Answering(Protocol):
    """One request on its way."""

    def batches(self, pause: Callable[[], float]) -> AsyncIterator[Sequence[Chunk]]:
        """The chunks that have come since the last time. Without `streamed`, all at the end, one for each completion.

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
    """What is known of a model without asking it."""

    @property
    def card(self) -> ModelCard: ...

    def plan(self, sizes: Sequence[tuple[int, int]], details: Sequence[Detail]) -> list[ImageLayout]:
        """What images of these sizes become; empty where only the server elsewhere knows."""

    def held_bytes(self, layouts: Sequence[ImageLayout]) -> int:
        """What is held of planned images until the answer's end."""

    def token_text(self, token_id: int) -> str: ...


class Backend(Protocol):
    @property
    def model(self) -> ServedModel: ...

    async def start(self, request: Request, *, streamed: bool) -> Answering:
        """Hand a request in; `InputError` where it cannot work, `ServerBusyError` where the queue is full."""

    def gauges(self) -> Mapping[str, float]:
        """Numbers for monitoring, by name."""

    async def is_alive(self) -> bool: ...

    async def close(self) -> None: ...
