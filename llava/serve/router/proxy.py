"""Forward a request to a worker, and its response to the client.

In: a request, the model that it names, and the dispatcher. Out: the worker's response, chunk by chunk. Where a worker cannot be
reached, is full, or fails before the first byte of its response, another one is asked; after that, the response ends with
an error in the form of its protocol. The key that a worker gets is the one that it showed itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import httpx
from fastapi import Request, Response

from llava.cli.http_client import retry_seconds
from llava.serve.backends.base import BackendError
from llava.serve.bodies import IGNORED_HEADER
from llava.serve.http.errors import ApiError
from llava.serve.http.keys import current_client
from llava.serve.http.middleware import CLIENT_HEADER
from llava.serve.http.request_record import REQUEST_ID, current_id, note_header
from llava.serve.http.streams import StreamedResponse, cancel_on_disconnect
from llava.serve.openai.response_store import MAX_BYTES, NOT_FOUND
from llava.serve.openai.routes import unknown_model
from llava.serve.router.dispatch import Dispatcher, Worker
from llava.serve.router.protocol import MAX_ERROR, read_start, sentence_of

logger = logging.getLogger("llava.serve")

BUSY = (429, 503)  # statuses after which another worker is asked
FAILED = (500, 502)  # also then, but not one after another: the request may be what makes them fail
MAX_FAILED = 2
MAX_KEPT = MAX_BYTES  # bytes of an answer that a worker keeps
CONNECT_S = 10.0
TRIES = 2  # of one worker that accepts the connection: a kept-alive connection may have been closed meanwhile
# Shorter than the time after which servers close an idle connection, so that none is closed as it is used.
KEEP_ALIVE_S = 2.0


class WorkerLostError(BackendError):
    """A worker went away in the middle of its response."""


class Proxy:
    """Forwards requests to workers. The client's own Authorization header stays here."""

    def __init__(self, dispatcher: Dispatcher, *, deadline_s: float) -> None:
        self._dispatcher = dispatcher
        self._deadline_s = deadline_s
        self._waits: dict[str, set[asyncio.Timeout]] = {}
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,
        )

    async def forward(
        self,
        request: Request,
        path: str,
        *,
        model: str,
        conversation: str | None,
        final_chunk: Callable[[Exception], bytes],
    ) -> Response:
        """Forward a request, whose body is sent on as it is, to a worker of the model.

        Requests of one `conversation` go to one worker, for its prefix cache. `final_chunk` makes the last chunk of a response
        that failed in the middle.
        """
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        body = await request.body()
        headers = {
            "content-type": "application/json",
            REQUEST_ID: current_id() or "",
            CLIENT_HEADER: current_client.get(),
        }

        def build(worker: Worker) -> httpx.Request:
            return self.client.build_request(
                "POST", worker.url + path, content=body, headers=headers | headers_for(worker)
            )

        async with asyncio.timeout_at(deadline):
            response = await cancel_on_disconnect(self._first_response(build, model, conversation), request.receive)
        if response.ignored_fields:
            note_header(IGNORED_HEADER, response.ignored_fields)
        if response.rest is None:
            async with response.held:
                return Response(response.first, response.status, media_type=response.media_type)

        def on_close(end: str) -> None:
            if end == "failed":
                self._dispatcher.mark_unreachable(response.worker)

        return StreamedResponse(
            response.chunks(response.rest, partial(self._waiting_for, response.worker)),
            media_type=response.media_type,
            deadline=deadline,
            final_chunk=final_chunk,
            on_close=on_close,
            status=response.status,
        )

    async def body_of(self, worker: Worker, method: str, path: str) -> bytes | None:
        """Ask one worker in the name of the current client; returns what it answers, or None where it refuses."""
        named = {REQUEST_ID: current_id() or "", CLIENT_HEADER: current_client.get()}
        async with self.client.stream(method, worker.url + path, headers=named | headers_for(worker)) as response:
            if response.status_code != 200:
                return None
            body = await read_start(response, MAX_KEPT + 1)
            return body if len(body) <= MAX_KEPT else None

    def end_waits(self, worker: str) -> None:
        """End all waiting for a worker that does not say anything any more: requests go to others, streams get an error."""
        for wait in self._waits.get(worker, ()):
            wait.reschedule(0.0)

    @asynccontextmanager
    async def _waiting_for(self, worker: str) -> AsyncIterator[None]:
        """Wait for bytes of a worker; raises `httpx.ReadTimeout` where `end_waits` is called meanwhile."""
        waits = self._waits.setdefault(worker, set())
        try:
            async with asyncio.timeout(None) as wait:
                waits.add(wait)
                try:
                    yield
                finally:
                    waits.discard(wait)
        except TimeoutError as error:
            if not wait.expired():
                raise
            raise httpx.ReadTimeout("it does not answer any more") from error
        finally:
            if not waits:
                self._waits.pop(worker, None)

    async def _first_response(
        self, build: Callable[[Worker], httpx.Request], model: str, conversation: str | None
    ) -> WorkerResponse:
        """Ask workers until one has sent the first byte of its response."""
        tried: dict[str, ApiError] = {}
        failures: Counter[str] = Counter()
        num_failed = 0
        while (worker := self._dispatcher.choose(model, conversation=conversation, without=tried)) is not None:
            known = self._dispatcher.worker(worker)
            assert known is not None
            async with AsyncExitStack() as stack:
                stack.enter_context(self._dispatcher.serving(worker))
                try:
                    async with self._waiting_for(worker):
                        response = await self.client.send(build(known), stream=True)
                        stack.push_async_callback(response.aclose)
                        num_failed += response.status_code in FAILED
                        if response.status_code in BUSY:
                            tried[worker] = _busy(model, response, await read_start(response))
                            continue
                        if response.status_code in FAILED and num_failed < MAX_FAILED:
                            known.num_failures += 1
                            tried[worker] = _failed(response.status_code, await read_start(response))
                            continue
                        if _is_short_refusal(response) and NOT_FOUND.encode() in await response.aread():
                            tried[worker] = ApiError(400, sentence_of(response.content), code=NOT_FOUND)
                            continue
                        return await WorkerResponse.begin(worker, response, stack.pop_all())
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    logger.warning("worker %s failed: %s", worker, repr(error))
                    failures[worker] += 1
                    if isinstance(error, httpx.ConnectError) or failures[worker] == TRIES:
                        tried[worker] = ApiError(503, f"no worker for {model!r} can be reached", code="no_worker")
                        if not isinstance(error, httpx.TimeoutException):  # a slow worker may still be running
                            self._dispatcher.mark_unreachable(worker)
        if tried:
            raise _to_tell(list(tried.values()))
        if self._dispatcher.workers_of(model):
            raise ApiError(503, f"no worker for {model!r} can be reached at the moment", code="no_worker")
        raise unknown_model(model, self._dispatcher.model_names())


def headers_for(worker: Worker) -> dict[str, str]:
    """The headers for one worker: its own key, and the host name by which it registered."""
    headers = {"host": worker.host_header} if worker.host_header else {}
    return headers | ({"authorization": f"Bearer {worker.key}"} if worker.key else {})


def _is_short_refusal(response: httpx.Response) -> bool:
    """Whether a worker refuses a request, by a body that may be read as a whole."""
    length = response.headers.get("content-length", "")
    return response.status_code == 400 and length.isdecimal() and int(length) <= MAX_ERROR


def _busy(model: str, response: httpx.Response, body: bytes) -> ApiError:
    """The error for the client where no other worker takes the request either."""
    seconds = retry_seconds(response.headers.get("retry-after"))
    if response.status_code == 429:
        return ApiError(429, "all workers are full", code="server_full", retry_after_s=seconds)
    message = f"no worker for {model!r} takes requests at the moment: {sentence_of(body)}"
    return ApiError(503, message, code="no_worker", retry_after_s=seconds)


def _to_tell(errors: Sequence[ApiError]) -> ApiError:
    """The error for the client after several workers' refusals, with the soonest time to try again."""
    error = min(errors, key=lambda error: error.status)
    error.retry_after_s = min((one.retry_after_s for one in errors if one.retry_after_s is not None), default=None)
    return error


def _failed(status: int, body: bytes) -> ApiError:
    return ApiError(status, sentence_of(body), code="worker_failed")


@dataclass(frozen=True)
class WorkerResponse:
    """A worker's response whose first bytes are here."""

    worker: str
    status: int
    media_type: str | None
    first: bytes
    rest: AsyncIterator[bytes] | None  # the other bytes; None where there are none
    held: AsyncExitStack  # frees the connection and the slot in the worker's queue
    ignored_fields: str | None = None

    @classmethod
    async def begin(cls, worker: str, response: httpx.Response, held: AsyncExitStack) -> WorkerResponse:
        status, media_type = response.status_code, response.headers.get("content-type")
        ignored = response.headers.get(IGNORED_HEADER)
        try:
            if "content-length" in response.headers:
                return cls(worker, status, media_type, await response.aread(), None, held, ignored)
            rest = response.aiter_raw()
            return cls(worker, status, media_type, await anext(rest, b""), rest, held, ignored)
        except BaseException:
            await held.aclose()
            raise

    async def chunks(
        self, rest: AsyncIterator[bytes], waiting: Callable[[], AbstractAsyncContextManager[None]]
    ) -> AsyncIterator[bytes]:
        """Yield all bytes; each wait for more is within `waiting`."""
        async with self.held:
            yield self.first
            try:
                while True:
                    async with waiting():
                        chunk = await anext(rest, None)
                    if chunk is None:
                        break
                    yield chunk
            except httpx.HTTPError as error:
                raise WorkerLostError("the worker was lost in the middle of its answer; please ask again") from error
