"""HTTP as all of our servers speak it: JSON that came in, streams that go out, and clients that leave in between.

In: Starlette requests; iterators of bytes. Out: values, or `ApiError`; responses that stop their source within moments of the
client's leaving, or at a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llava.errors import InputError

T = TypeVar("T")

LAST_WORDS_S = 5.0


async def read_json(request: Request) -> Any:
    """The body as JSON, whatever the Content-Type says: the original's servers did not look at it either."""
    return parse_json(await request.body())


def parse_json(body: bytes) -> Any:
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if b"\\u" in body:  # half a character may have been written as an escape, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"the body is not JSON: {reason}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work; where the client leaves meanwhile, cancel it and raise `ClientDisconnect`. The body was read before."""
    return await _unless_left(work, request.receive)


async def _unless_left(work: Awaitable[T], receive: Callable[[], Any]) -> T:
    """The work is done in this task, which whoever looks out for the client's leaving cancels, as a timeout would."""
    worker = asyncio.current_task()
    assert worker is not None
    num_cancels = worker.cancelling()
    is_over = has_left = False

    def leave(watcher: asyncio.Future[None]) -> None:
        nonlocal has_left
        if not (is_over or watcher.cancelled()):
            watcher.exception()  # whatever it is, it is known now
            has_left = True
            worker.cancel()

    watcher = asyncio.ensure_future(_disconnect(receive))
    watcher.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and worker.uncancel() <= num_cancels:
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        watcher.cancel()


async def _disconnect(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A response whose body comes piece by piece.

    Whatever ends it early, the client's leaving, the deadline or an error, `pieces` is closed, and `closed` learns the reason:
    "finished", "cancelled", "deadline" or "failed". `last_words` makes the final piece from an error.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        *,
        media_type: str | None,
        deadline: float,
        last_words: Callable[[Exception], bytes],
        closed: Callable[[str], None],
        status: int = 200,
    ) -> None:
        self._pieces = pieces
        self._deadline = deadline  # in the event loop's time
        self._last_words = last_words
        self._closed = closed
        self.status_code, self.media_type, self.background = status, media_type, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})  # proxies shall not collect pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        end = "cancelled"
        try:
            # In a task of its own, a piece does not wake all the layers that the request came through.
            end = await _unless_left(asyncio.ensure_future(self._write(send)), receive)
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._closed(end)

    async def _write(self, send: Any) -> str:
        async def write(piece: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        end = "finished"
        async with contextlib.aclosing(self._pieces) as pieces:  # type: ignore[type-var]
            try:
                async with asyncio.timeout_at(self._deadline):
                    async for piece in pieces:
                        await write(piece)
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                    raise  # the client's end of the connection
                end = "deadline" if isinstance(error, TimeoutError) else "failed"
                async with asyncio.timeout(LAST_WORDS_S):  # a client that reads nothing does not hold us here
                    await write(self._last_words(error))
        await write(b"", more=False)
        return end
