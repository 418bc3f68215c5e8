"""Passing a request on to a worker, and its answer back.

In: a request, the model it names, and the dispatcher. Out: the worker's response, piece by piece. Where a worker cannot be
reached, is full, or dies before the first byte of its answer, another one is asked; once a byte has gone to the client,
the answer ends with the protocol's words for an error instead.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
from fastapi import Request, Response

from llava.serve.backends.base import BackendError
from llava.serve.http.errors import ApiError
from llava.serve.http.streams import Stream, while_connected
from llava.serve.openai.routes import unknown_model
from llava.serve.router.dispatch import Dispatcher

logger = logging.getLogger("llava.serve")

BUSY = (429, 503)  # a worker's way of saying: ask somebody else
CONNECT_S = 10.0
TRIES = 2  # of one worker, where it did answer the knock: a connection kept too long, or a moment without air
# Shorter than the time after which servers close a silent connection, so that none is closed while we reach for it.
KEEP_ALIVE_S = 2.0


class WorkerLostError(BackendError):
    """A worker went away in the middle of its answer."""


class Relay:
    """`key` opens the workers; without one, the client's own Authorization header is passed on."""

    def __init__(self, dispatcher: Dispatcher, *, key: str | None, deadline_s: float) -> None:
        self._dispatcher = dispatcher
        self._key = key
        self._deadline_s = deadline_s
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,
        )

    async def pass_on(
        self,
        request: Request,
        path: str,
        *,
        model: str,
        conversation: str | None,
        last_words: Callable[[Exception], bytes],
    ) -> Response | Stream:
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        body = await request.body()
        headers = {"content-type": "application/json"}
        authorization = f"Bearer {self._key}" if self._key else request.headers.get("authorization")
        if authorization:
            headers["authorization"] = authorization

        def build(worker: str) -> httpx.Request:
            return self.client.build_request("POST", worker + path, content=body, headers=headers)

        async with asyncio.timeout_at(deadline):
            answer = await while_connected(request, self._first_answer(build, model, conversation))
        if not answer.is_stream:
            async with answer.held:
                return Response(answer.first, answer.status, media_type=answer.media_type)

        def closed(end: str) -> None:
            if end == "failed":
                self._dispatcher.mark_unreachable(answer.worker)

        return Stream(
            answer.pieces(),
            media_type=answer.media_type,
            deadline=deadline,
            last_words=last_words,
            closed=closed,
            status=answer.status,
        )

    async def _first_answer(
        self, build: Callable[[str], httpx.Request], model: str, conversation: str | None
    ) -> _Answer:
        """The first worker's answer of which at least one byte has come."""
        tried: dict[str, ApiError] = {}
        failures: Counter[str] = Counter()
        while (worker := self._dispatcher.choose(model, conversation=conversation, without=tried)) is not None:
            async with AsyncExitStack() as stack:
                stack.enter_context(self._dispatcher.serving(worker))
                try:
                    response = await self.client.send(build(worker), stream=True)
                    stack.push_async_callback(response.aclose)
                    if response.status_code in BUSY:
                        tried[worker] = _passed_over(model, response.status_code, await response.aread())
                        continue
                    return await _Answer.begin(worker, response, stack.pop_all())
                except httpx.HTTPError as error:
                    logger.warning("worker %s failed: %s", worker, repr(error))
                    failures[worker] += 1
                    if isinstance(error, httpx.ConnectError) or failures[worker] == TRIES:
                        tried[worker] = ApiError(503, f"no worker for {model!r} can be reached", code="no_worker")
                        if not isinstance(error, httpx.TimeoutException):  # one that is slow is not gone
                            self._dispatcher.mark_unreachable(worker)
        if tried:
            raise min(tried.values(), key=lambda error: error.status)
        known = self._dispatcher.model_names()
        if model in known:
            raise ApiError(503, f"no worker for {model!r} can be reached at the moment", code="no_worker")
        raise unknown_model(model, known)


def _passed_over(model: str, status: int, told: bytes) -> ApiError:
    """What the client learns where no other worker takes the request either."""
    if status == 429:
        return ApiError(429, "all workers are full", code="server_full")
    try:
        value = json.loads(told.rstrip(b"\0"))
        words = value["text"] if "text" in value else value["error"]["message"]
    except (ValueError, TypeError, KeyError):
        words = "it does not say why"
    return ApiError(503, f"no worker for {model!r} takes requests at the moment: {words}", code="no_worker")


class _Answer:
    """A worker's response that has begun. `held` frees the connection and the place in the worker's queue."""

    def __init__(
        self, worker: str, response: httpx.Response, first: bytes, rest: AsyncIterator[bytes], held: AsyncExitStack
    ) -> None:
        self.worker = worker
        self.status = response.status_code
        self.media_type = response.headers.get("content-type")
        self.first = first
        self.held = held
        self._rest = rest

    @classmethod
    async def begin(cls, worker: str, response: httpx.Response, held: AsyncExitStack) -> _Answer:
        try:
            if "content-length" in response.headers:
                return cls(worker, response, await response.aread(), _nothing(), held)
            rest = response.aiter_raw()
            return cls(worker, response, await anext(rest, b""), rest, held)
        except BaseException:
            await held.aclose()
            raise

    @property
    def is_stream(self) -> bool:
        return not isinstance(self._rest, _Nothing)

    async def pieces(self) -> AsyncIterator[bytes]:
        async with self.held:
            yield self.first
            try:
                async for piece in self._rest:
                    yield piece
            except httpx.HTTPError as error:
                raise WorkerLostError("the worker was lost in the middle of its answer; please ask again") from error


class _Nothing:
    def __aiter__(self) -> _Nothing:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


def _nothing() -> Any:
    return _Nothing()
