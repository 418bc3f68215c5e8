"""The backend that runs the engine in the server's process.

In: requests from an event loop. Out: chunks for it. What blocks, making a prompt of text and images, is done in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llava.engine.base import EngineStats
from llava.engine.config import EngineClosed, EngineError, QueueFull
from llava.engine.request import Chunk, Embedding, EmbedRequest, Request, Result, Score, ScoreRequest, Timings, Usage
from llava.engine.selection import open_engine
from llava.errors import InputError
from llava.serve.backends.base import BackendError, ServerBusyError, UnreachableError
from llava.serve.backends.served_model import LocalModel

if TYPE_CHECKING:
    from llava.engine.config import EngineConfig
    from llava.engine.handle import PendingAnswer, RequestHandle
    from llava.model.builder import LoadedModel


class EngineBackend:
    def __init__(
        self,
        loaded: LoadedModel,
        *,
        name: str,
        conv_mode: str | None = None,
        config: EngineConfig | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = open_engine(loaded, config, adapters=adapters)
        about: dict[str, Any] = {"name": name, "conv_mode": conv_mode, "adapters": adapters or {}}
        self.model = LocalModel.of(loaded, context_len=self.engine.context_len, **about)

    async def start(self, request: Request, *, streamed: bool) -> EngineRequest:
        submitting = asyncio.ensure_future(asyncio.to_thread(self.engine.submit, request, streamed=streamed))
        try:
            return EngineRequest(await asyncio.shield(submitting), streamed)
        except asyncio.CancelledError:  # the thread continues; abort what it submits
            submitting.add_done_callback(_abort)
            raise
        except EngineError as error:
            raise server_error(error) from error

    async def score(self, request: ScoreRequest) -> Score:
        try:
            pending = await asyncio.to_thread(self.engine.submit_score, request)
            return (await ended(pending)).score(timeout=0)
        except EngineError as error:
            raise server_error(error) from error

    async def embed(self, request: EmbedRequest) -> Embedding:
        try:
            pending = await asyncio.to_thread(self.engine.submit_embed, request)
            return (await ended(pending)).embedding(timeout=0)
        except EngineError as error:
            raise server_error(error) from error

    def gauges(self) -> Mapping[str, float]:
        return gauges(self.engine.stats())

    async def is_alive(self) -> bool:
        return self.engine.alive

    @property
    def lost(self) -> str | None:
        return None if self.engine.alive else "the engine has stopped"

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)


async def ended(pending: PendingAnswer) -> PendingAnswer:
    """Wait for a score or an embedding; where nobody waits any more, it is not computed further."""
    try:
        async for _ in pending:
            pass
        return pending
    finally:
        if not pending.done:
            pending.abort()


def _abort(submitting: asyncio.Future[RequestHandle]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().abort()


def server_error(error: Exception) -> Exception:
    """The server's error for an engine's."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, QueueFull):
        return ServerBusyError(str(error))
    return (UnreachableError if isinstance(error, EngineClosed) else BackendError)(str(error))


def gauges(stats: EngineStats) -> Mapping[str, float]:
    return {f"engine_{name.removeprefix('num_')}": value for name, value in asdict(stats).items()}


class EngineRequest:
    """A request in an engine, in this process or another."""

    def __init__(self, pending: PendingAnswer, streamed: bool) -> None:
        self._pending = pending
        self._streamed = streamed

    async def batches(self, pause: Callable[[], float]) -> AsyncIterator[Sequence[Chunk]]:
        try:
            async for chunks in self._pending.batches(pause):
                yield chunks
        except EngineError as error:
            raise server_error(error) from error
        if not self._streamed:
            yield [
                Chunk(whole.index, whole.text, whole.token_ids, whole.logprobs, whole.finish_reason, whole.stop_string)
                for whole in self._result.completions
            ]

    def abort(self) -> None:
        if not self._pending.done:
            self._pending.abort()

    @property
    def usage(self) -> Usage:
        return self._result.usage

    @property
    def timings(self) -> Timings:
        return self._result.timings

    @property
    def _result(self) -> Result:
        return self._pending.result(timeout=0)
