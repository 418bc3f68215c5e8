"""Streamed responses, and the cancelling of work whose client has disconnected.

In: iterators of bytes. Out: responses whose source is stopped soon after the client disconnects, or at a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava.serve.backends.base import ServerBusyError

T = TypeVar("T")

FINAL_CHUNK_S = 5.0
STOP_S = 1.0
STOPPING = "the server is being stopped before the answer is finished; ask again"


async def cancel_on_disconnect(work: Awaitable[T], receive: Receive) -> T:
    """Await the work; where the client disconnects meanwhile, cancel it and raise `ClientDisconnect`.

    The work runs in this task, which a task that waits for the disconnect cancels, as `asyncio.timeout` would. `receive` is
    that of the request, whose body has been read.
    """
    worker = asyncio.current_task()
    assert worker is not None
    num_cancels = worker.cancelling()
    is_over = disconnected = False

    def cancel(watcher: asyncio.Future[None]) -> None:
        nonlocal disconnected
        if not (is_over or watcher.cancelled()):
            watcher.exception()  # retrieved here, so that asyncio does not report it
            disconnected = True
            worker.cancel()

    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    watcher.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and worker.uncancel() <= num_cancels:
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        watcher.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedResponse(Response):
    """A response whose body is sent chunk by chunk, until `deadline` in the event loop's time.

    `final_chunk` makes the last chunk from the error that ended the response. `on_close` is called once with the reason of the
    end: "finished", "cancelled", "deadline" or "failed".
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        media_type: str | None,
        deadline: float,
        final_chunk: Callable[[Exception], bytes],
        on_close: Callable[[str], None],
        status: int = 200,
    ) -> None:
        self._chunks = chunks
        self._deadline = deadline
        self._final_chunk = final_chunk
        self._on_close = on_close
        self.status_code, self.media_type, self.background = status, media_type, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})  # proxies must not buffer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end = "cancelled"
        try:
            # In a task of its own: a chunk does not resume all the layers that the request came through.
            end = await cancel_on_disconnect(asyncio.ensure_future(self._write(send)), receive)
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._on_close(end)

    async def _write(self, send: Send) -> str:
        async def write(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        end = "finished"
        async with contextlib.aclosing(self._chunks) as chunks:  # type: ignore[type-var]
            try:
                async with asyncio.timeout_at(self._deadline):
                    async for chunk in chunks:
                        await write(chunk)
            except asyncio.CancelledError:  # the server is being stopped, or the client has left, who reads no more
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(STOP_S):
                        await write(self._final_chunk(ServerBusyError(STOPPING, stopping=True)), more=False)
                raise
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                    raise  # the connection to the client
                end = "deadline" if isinstance(error, TimeoutError) else "failed"
                async with asyncio.timeout(FINAL_CHUNK_S):  # a client that does not read must not hold the response
                    await write(self._final_chunk(error))
        await write(b"", more=False)
        return end
