"""One model behind a server: admit requests within limits, open their images and videos, submit them, count them.

In: prompts, sampling parameters, image URLs. Out: an `AdmittedRequest`: the chunks of its answers, and at the end what they
took. Both protocols of a worker use this: openai/routes.py and router/worker_routes.py.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from llava.conversation import Conversation
from llava.engine.request import (
    Chunk,
    Detail,
    Embedding,
    EmbedRequest,
    Request,
    SamplingParams,
    Score,
    ScoreRequest,
    Timings,
    Usage,
)
from llava.errors import InputError
from llava.images.decoder_pool import missing_limits
from llava.serve.backends.base import Backend, BackendError, BackendRequest, ModelCard, ServerBusyError
from llava.serve.http.keys import current_client
from llava.serve.http.limits import ServeLimits, VideoUrl, open_images
from llava.serve.http.memory_budget import MemoryBudget, Reservation
from llava.serve.http.metrics import Metrics

if TYPE_CHECKING:
    from PIL import Image

    from llava.images.frames import Video
    from llava.processor import Layout

CHUNKS_PER_S = 1000  # of all streams together
MIN_PAUSE_S = 0.005  # where the pause would be shorter, each token is a chunk

Opener = Callable[[Sequence[str | VideoUrl], ServeLimits, Reservation], "list[Image.Image | Video]"]

logger = logging.getLogger("llava.serve")


class Service:
    """A backend within limits, with its counters.

    While `draining` is true, running requests are finished and no new ones are taken. `memory` limits what the bodies and
    images of all requests hold together.
    """

    def __init__(self, backend: Backend, limits: ServeLimits, memory: MemoryBudget) -> None:
        self.backend = backend
        self.limits = limits
        self.memory = memory
        self.metrics = Metrics(self._gauges)
        self.draining = False
        self.num_requests = 0
        self.num_answers = 0  # of them: each prompt, and each of its n completions
        self._counting = threading.Lock()  # counting tokens is for one thread at a time
        self.changed: Callable[[], None] = lambda: None  # called when a request begins or ends
        if (missing := missing_limits()) is not None:
            logger.warning("%s", missing)

    @property
    def card(self) -> ModelCard:
        return self.backend.model.card

    async def submit(
        self,
        prompts: Sequence[Conversation | str | Sequence[int]],
        sampling: SamplingParams,
        image_sources: Sequence[str | VideoUrl] = (),
        *,
        streamed: bool = True,
        details: Sequence[Detail] = (),
        opener: Opener = open_images,
        adapter: str | None = None,
    ) -> AdmittedRequest:
        """Submit a request; the caller reads the answers and calls `close` in any case.

        Each prompt is one request to the backend; the images, which `opener` opens, go with every prompt. With `streamed` this
        returns when the first chunk is there, so that what fails before has a status of its own, and a controller may ask
        another worker. Without, all chunks come at the end. `details` is "low" or "auto" for each image. `adapter` is one of
        the card's, beside the model.

        Raises:
            ServerBusyError: the server is full or being stopped.
            InputError: the request cannot be answered.
            BackendError: the backend failed before the first chunk.
        """
        admitted = self._admit(image_sources, len(prompts) * sampling.n)
        try:
            images = await self._open(admitted, image_sources, details, opener)
            admitted.prompts = [self.backend.model.with_times(prompt, images) for prompt in prompts]
            for prompt in prompts:
                about: dict[str, Any] = {"details": tuple(details), "client": current_client.get(), "adapter": adapter}
                request = Request(prompt, tuple(images), sampling, **about)
                admitted.add(await self.backend.start(request, streamed=streamed), sampling.n)
            admitted.reservation.shrink_to(self.backend.model.held_bytes(admitted.layouts))
            if streamed:
                await admitted.begin()
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            admitted.close("failed" if isinstance(error, BackendError) else "cancelled" if cancelled else "refused")
            raise
        return admitted

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Return the probabilities of given tokens, within the limits of a request; raises as `submit` does."""
        admitted = self._admit((), len(requests))
        client = current_client.get()
        try:
            scores = (self.backend.score(replace(request, client=client)) for request in requests)
            return list(await asyncio.gather(*scores))
        finally:
            admitted.close("scored")

    async def embed(
        self,
        prompts: Sequence[Conversation | str | Sequence[int] | None],
        make_request: Callable[..., EmbedRequest],
        image_sources: Sequence[str | VideoUrl] = (),
        *,
        details: Sequence[Detail] = (),
    ) -> list[Embedding]:
        """Return the vectors of prompts, within the limits of a request; the images go with every prompt.

        `make_request` is `EmbedRequest`, with what is asked of every prompt. Raises as `submit` does.
        """
        admitted = self._admit(image_sources, len(prompts))
        try:
            images = tuple(await self._open(admitted, image_sources, details, open_images))
            about = {"images": images, "details": tuple(details), "client": current_client.get()}
            requests = [make_request(prompt, **about) for prompt in prompts]
            admitted.reservation.shrink_to(self.backend.model.held_bytes(admitted.layouts))
            return list(await asyncio.gather(*(self.backend.embed(request) for request in requests)))
        finally:
            admitted.close("embedded")

    async def token_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt of text alone."""

        def encode() -> list[int]:
            with self._counting:
                return self.backend.model.token_ids(prompt)

        return await asyncio.to_thread(encode)

    async def count_tokens(
        self,
        prompt: Conversation | str | Sequence[int],
        image_sources: Sequence[str | VideoUrl] = (),
        *,
        details: Sequence[Detail] = (),
    ) -> int | None:
        """Return the tokens of a prompt with its images, within the limits of a request; None where they are not known.

        Raises:
            ServerBusyError, InputError: as `submit`.
        """
        admitted = self._admit(image_sources, 1)
        try:
            await self._open(admitted, image_sources, details, open_images)
            return await self.num_tokens(prompt, admitted.layouts)
        finally:
            admitted.close("counted")

    async def num_tokens(self, prompt: Conversation | str | Sequence[int], layouts: Sequence[Layout]) -> int | None:
        """Return the tokens of a prompt whose images have these layouts; None where they are not known."""

        def count() -> int | None:
            with self._counting:
                return self.backend.model.num_tokens(prompt, layouts)

        return await asyncio.to_thread(count)

    def _admit(self, image_sources: Sequence[str | VideoUrl], num_answers: int) -> AdmittedRequest:
        if self.draining:
            raise ServerBusyError("the server is being stopped; ask another one", stopping=True)
        most = self.limits.max_requests
        if num_answers > most:
            raise InputError(
                f"the request asks for {num_answers:,} answers, its prompts times n, and this server gives {most:,} at once; "
                "send fewer prompts in a request, or a smaller n"
            )
        if self.num_answers + num_answers > most:
            raise ServerBusyError(
                f"{self.num_answers:,} answers are running or waiting, and {most:,} may be; try again in a moment"
            )
        if image_sources and not self.card.takes_images:
            raise InputError(f"{self.card.name} is a language model without a vision tower; it takes no images")
        if not self.card.takes_videos and any(isinstance(source, VideoUrl) for source in image_sources):
            raise InputError(
                f"{self.card.name} takes images and no videos; send some frames of the video, as an image_url part for each"
            )
        return AdmittedRequest(self, num_answers)

    async def _open(
        self, admitted: AdmittedRequest, sources: Sequence[str | VideoUrl], details: Sequence[Detail], opener: Opener
    ) -> list[Image.Image | Video]:
        """Open the images and videos of a request, and plan their layouts."""
        if not sources:
            return []
        images = await asyncio.to_thread(opener, sources, self.limits, admitted.reservation)
        admitted.layouts = self.backend.model.plan(images, details)
        return images

    def pause(self) -> float:
        """Return the seconds for which tokens are collected before a chunk is sent."""
        pause = self.num_requests / CHUNKS_PER_S
        return pause if pause >= MIN_PAUSE_S else 0.0

    async def liveness(self) -> str | None:
        """Return None, or what is wrong with the server."""
        return None if await self.backend.is_alive() else "the model does not answer any more"

    def lost(self) -> str | None:
        """Return why the server should end and be started again, if it should."""
        return self.backend.lost

    async def readiness(self) -> str | None:
        """Return None, or why no requests are taken now."""
        return "being stopped" if self.draining else await self.liveness()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self.limits.decoder.close()
            await self.backend.close()

    def _gauges(self) -> Mapping[str, float]:
        counts = {"requests_in_flight": self.num_requests, "answers_in_flight": self.num_answers}
        return counts | {"held_bytes": self.memory.num_bytes, **self.backend.gauges()}


@dataclass(frozen=True)
class RequestStats:
    """What an answer took, known at its end."""

    usage: Usage
    timings: Timings
    layouts: Sequence[Layout] = ()


class AdmittedRequest:
    """One request of a client, which may have several prompts, and its answers."""

    def __init__(self, service: Service, num_answers: int) -> None:
        self._service = service
        self._num_answers = num_answers
        self._backend_requests: list[BackendRequest] = []
        self._num_choices: list[int] = []
        self._closed = False
        self._source = self._chunks()
        self._first: Chunk | None = None
        self.layouts: Sequence[Layout] = ()
        self.prompts: Sequence[Conversation | str | Sequence[int]] = ()  # as the backend reads them
        self.reservation = service.memory.reserve()
        service.num_requests += 1
        service.num_answers += num_answers
        service.changed()

    def add(self, request: BackendRequest, num_choices: int) -> None:
        self._backend_requests.append(request)
        self._num_choices.append(num_choices)

    @property
    def num_choices(self) -> int:
        return sum(self._num_choices)

    async def begin(self) -> None:
        """Wait for the first chunk."""
        self._first = await anext(self._source, None)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        if self._first is not None:
            yield self._first
        async for chunk in self._source:
            yield chunk

    async def _chunks(self) -> AsyncIterator[Chunk]:
        """Yield the chunks of all answers, prompt after prompt; the index of a choice counts through all prompts.

        The first chunk and the end come at once. In between, tokens of many streams are collected for a moment, which bounds
        the chunks per second of all streams together, so that the event loop does not slow the engine's thread.
        """
        first = 0
        for request, num_choices in zip(self._backend_requests, self._num_choices, strict=True):
            async for chunks in request.batches(self._service.pause):
                for chunk in merged(chunks):
                    yield replace(chunk, index=first + chunk.index) if first else chunk
            first += num_choices

    def stats(self) -> RequestStats:
        """Return what all answers took; after the end."""
        usages = [request.usage for request in self._backend_requests]
        timings = [request.timings for request in self._backend_requests]
        firsts = [timing.first_token_s for timing in timings if timing.first_token_s is not None]
        total = Timings(
            queued_s=max(timing.queued_s for timing in timings),
            first_token_s=min(firsts, default=None),
            total_s=max(timing.total_s for timing in timings),
        )
        counts = {field.name: sum(getattr(usage, field.name) for usage in usages) for field in fields(Usage)}
        return RequestStats(Usage(**counts), total, self.layouts)

    def close(self, end: str) -> None:
        """Release what is held. `end` is "finished", or the reason why it was not."""
        if self._closed:
            return
        self._closed = True
        self._service.num_requests -= 1
        self._service.num_answers -= self._num_answers
        self._service.changed()
        if end == "finished":
            stats = self.stats()
            self._service.metrics.record_answer(stats.usage, stats.timings)
        else:
            self._service.metrics.finished.labels(end).inc()
        for request in self._backend_requests:
            request.abort()
        self.reservation.release()


def merged(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """Join the chunks of each completion."""
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
            parts[-1].stop_string,
        )
        for index, parts in joined.items()
    ]
