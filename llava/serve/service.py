"""One model behind a server: requests are admitted, their images opened, handed to the backend, and accounted for.

In: prompts, sampling, image addresses. Out: an `Asked`, the chunks of the answers and at the end their cost. Both
protocols of a worker stand on this: serve/openai/routes.py and model_worker.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llava.conversation import Conversation
from llava.engine.request import Chunk, Detail, Request, SamplingParams, Timings, Usage
from llava.errors import InputError
from llava.serve.backends.base import Answering, Backend, ModelCard, ServerBusyError
from llava.serve.http.limits import ServeLimits, open_images
from llava.serve.http.memory_budget import Room, Share
from llava.serve.http.metrics import Metrics
from llava.serve.openai.replies import Cost
from llava.serve.router.protocol import WorkerStatus

if TYPE_CHECKING:
    from llava.images.layout import ImageLayout

PIECES_PER_S = 1000  # of all streams together
SHORTEST_PAUSE_S = 0.005  # fewer streams than this makes say every token by itself

Opener = Callable[[Sequence[str], ServeLimits, Share], list[Any]]


class Service:
    """A backend within limits, with its counters. `draining`: what is on its way is finished, nothing new is taken.

    `room` is what the images of all requests may hold together, with their bodies.
    """

    def __init__(self, backend: Backend, limits: ServeLimits, room: Room) -> None:
        self.backend = backend
        self.limits = limits
        self.room = room
        self.metrics = Metrics(self._gauges)
        self.draining = False
        self.num_requests = 0
        self.changed: Callable[[], None] = lambda: None  # called when a request begins or ends

    @property
    def card(self) -> ModelCard:
        return self.backend.model.card

    async def ask(
        self,
        prompts: Sequence[Conversation | str],
        sampling: SamplingParams,
        image_sources: Sequence[str] = (),
        *,
        streamed: bool = True,
        details: Sequence[Detail] = (),
        opener: Opener = open_images,
    ) -> Asked:
        """Start answering; the caller reads the answers and calls `close`, whatever happens."""
        if self.draining:
            raise ServerBusyError("the server is being stopped; ask another one", stopping=True)
        if self.num_requests >= self.limits.max_requests:
            raise ServerBusyError(f"{self.num_requests} requests are on their way already; try again in a moment")
        if image_sources and not self.card.takes_images:
            raise InputError(f"{self.card.name} is a language model without a vision tower; it takes no images")
        asked = Asked(self)
        try:
            images = await asyncio.to_thread(opener, image_sources, self.limits, asked.share) if image_sources else []
            asked.layouts = self.backend.model.plan([image.size for image in images], details) if images else []
            for prompt in prompts:
                request = Request(prompt, tuple(images), sampling, details=tuple(details))
                asked.add(await self.backend.start(request, streamed=streamed), sampling.n)
            asked.share.shrink_to(self.backend.model.held_bytes(asked.layouts))
        except BaseException:
            asked.close("refused")
            raise
        return asked

    def status(self) -> WorkerStatus:
        """What a controller is told. As in the original, the queue is all requests that are not finished."""
        return WorkerStatus((self.card.name,), 1, self.num_requests)

    def pause(self) -> float:
        """The seconds for which an answer is collected before a piece of it is sent."""
        pause = self.num_requests / PIECES_PER_S
        return pause if pause >= SHORTEST_PAUSE_S else 0.0

    async def trouble(self) -> str | None:
        return None if await self.backend.is_alive() else "the model does not answer any more"

    async def trouble_or_draining(self) -> str | None:
        return "being stopped" if self.draining else await self.trouble()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.backend.close()

    def _gauges(self) -> Mapping[str, float]:
        return {"requests_in_flight": self.num_requests, "held_bytes": self.room.num_bytes, **self.backend.gauges()}


class Asked:
    """The answers to one request of a client, which may be several prompts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._answerings: list[Answering] = []
        self._num_choices: list[int] = []
        self._closed = False
        self.layouts: Sequence[ImageLayout] = ()
        self.share = service.room.share()
        service.num_requests += 1
        service.changed()

    def add(self, answering: Answering, num_choices: int) -> None:
        self._answerings.append(answering)
        self._num_choices.append(num_choices)

    @property
    def num_choices(self) -> int:
        return sum(self._num_choices)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Chunks of all answers, prompt after prompt, their choices numbered through.

        The first comes at once, and so does the end. Between them, what many streams say is collected for a moment, so that all
        of them together cost the event loop a bounded number of pieces, and the engine's thread is not kept waiting for it.
        """
        first = 0
        for answering, num_choices in zip(self._answerings, self._num_choices, strict=True):
            async for chunks in answering.batches(self._service.pause):
                for chunk in merged(chunks):
                    yield replace(chunk, index=first + chunk.index) if first else chunk
            first += num_choices

    def cost(self) -> Cost:
        """What it all took, after the end."""
        usages = [answering.usage for answering in self._answerings]
        timings = [answering.timings for answering in self._answerings]
        firsts = [timing.first_token_s for timing in timings if timing.first_token_s is not None]
        return Cost(
            Usage(
                num_text_tokens=sum(usage.num_text_tokens for usage in usages),
                num_image_tokens=sum(usage.num_image_tokens for usage in usages),
                num_cached_tokens=sum(usage.num_cached_tokens for usage in usages),
                num_new_tokens=sum(usage.num_new_tokens for usage in usages),
            ),
            Timings(
                queued_s=max(timing.queued_s for timing in timings),
                first_token_s=min(firsts, default=None),
                total_s=max(timing.total_s for timing in timings),
            ),
            self.layouts,
        )

    def close(self, end: str) -> None:
        """Free what is still held. `end` is "finished", or else why it was not."""
        if self._closed:
            return
        self._closed = True
        self._service.num_requests -= 1
        self._service.changed()
        if end == "finished":
            cost = self.cost()
            self._service.metrics.answered(cost.usage, cost.timings, end)
        else:
            self._service.metrics.finished.labels(end).inc()
        for answering in self._answerings:
            answering.abort()
        self.share.shrink_to(0)


def merged(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """Chunks of one completion each, joined where there are several of one."""
    if len(chunks) < 2:
        return chunks
    joined: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        joined.setdefault(chunk.index, []).append(chunk)
    return [
        Chunk(
            index,
            "".join(chunk.text for chunk in parts),
            tuple(token for chunk in parts for token in chunk.token_ids),
            tuple(token for chunk in parts for token in chunk.logprobs),
            parts[-1].finish_reason,
        )
        for index, parts in joined.items()
    ]
