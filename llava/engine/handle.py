"""The handle of a submitted request, for whoever waits for it: in a thread, or in an event loop.

In: chunks and the end, put by the engine's thread. Out: an iterator of `Chunk` (`for` or `async for`), and the result.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Self, TypeAlias

from llava.engine.request import Chunk, Embedding, PromptSize, Result, Score

Outcome: TypeAlias = Result | Score | Embedding


class Wakeups:
    """Readers to wake after a step. All readers in an event loop are woken by one call."""

    def __init__(self) -> None:
        self._events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        self._calls: set[Callable[[], None]] = set()

    def add(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self._events.setdefault(loop, []).append(event)

    def add_call(self, call: Callable[[], None]) -> None:
        """Call this, once however often it was added; it must not wait."""
        self._calls.add(call)

    def send(self) -> None:
        if self._calls:
            calls, self._calls = self._calls, set()
            for call in calls:
                call()
        if self._events:
            waiting, self._events = self._events, {}
            for loop, events in waiting.items():
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


class PendingAnswer:
    """Chunks come once, to one reader. `result()` waits for the end, whether chunks are read or not.

    Leaving a `with` block aborts a request that is not finished.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None], wakeups: Wakeups) -> None:
        self.request_id = request_id
        self._abort = abort
        self._wakeups = wakeups
        self._changed = threading.Condition()
        self._chunks: deque[Chunk] = deque()
        self._result: Outcome | None = None
        self._error: BaseException | None = None
        self._done = False
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None  # an event loop's reader
        self._waits_for_end = False  # ... and for nothing else

    def abort(self) -> None:
        """Stop within a step. What has come stays; completions not finished end as "cancelled"."""
        self._abort(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._done:
            self.abort()
            self.wait_until_done()

    @property
    def done(self) -> bool:
        return self._done

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the request's result; raises what went wrong, or TimeoutError after `timeout` seconds."""
        result = self._wait_for_result(timeout)
        assert isinstance(result, Result)
        return result

    def score(self, timeout: float | None = None) -> Score:
        """`result` of a request to score."""
        score = self._wait_for_result(timeout)
        assert isinstance(score, Score)
        return score

    def embedding(self, timeout: float | None = None) -> Embedding:
        """`result` of a request to embed."""
        embedding = self._wait_for_result(timeout)
        assert isinstance(embedding, Embedding)
        return embedding

    def _wait_for_result(self, timeout: float | None) -> Outcome | None:
        if not self.wait_until_done(timeout):
            raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._result

    def wait_until_done(self, timeout: float | None = None) -> bool:
        """Wait for the end, whatever it is; returns False after `timeout` seconds without it."""
        with self._changed:
            # In pieces, which let Ctrl-C through on systems where a waiting lock does not.
            while timeout is None and not self._done:
                self._changed.wait(1.0)
            return self._changed.wait_for(lambda: self._done, timeout)

    async def wait(self) -> Result:
        """`result()` for an event loop."""
        async for _ in self:
            pass
        return self.result()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            with self._changed:
                while not self._chunks and not self._done:
                    self._changed.wait(1.0)
                chunk = self._next()
            if chunk is None:
                return
            yield chunk

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        async for chunks in self.batches():
            for chunk in chunks:
                yield chunk

    async def batches(self, pause: Callable[[], float] = lambda: 0.0) -> AsyncIterator[list[Chunk]]:
        """All chunks that have come since the last time, as soon as there are some.

        `pause` says for how many seconds what follows them is only collected (by default 0), unless the end comes before.
        Whoever asks again only after a while is not woken for every token in between.
        """
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._changed:
                chunks = list(self._chunks)
                self._chunks.clear()
                ended = not chunks and self._done
                self._waiting, self._waits_for_end = None if chunks or ended else (loop, event), False
                if ended and self._error is not None:
                    raise self._error
            if ended:
                return
            if not chunks:
                await event.wait()
                event.clear()
                continue
            yield chunks
            if (seconds := pause()) > 0:
                with self._changed:
                    self._waiting, self._waits_for_end = None if self._done else (loop, event), True
                if self._waiting is not None:
                    timer = loop.call_later(seconds, event.set)
                    await event.wait()
                    timer.cancel()
                    event.clear()

    def _next(self) -> Chunk | None:
        """The next chunk; None at the end, or the error that ended it."""
        if self._chunks:
            return self._chunks.popleft()
        if self._error is not None:
            raise self._error
        return None

    # The side of the thread that computes, which sends the wakeups when it has put all chunks of a step.

    def put(self, chunk: Chunk) -> None:
        with self._changed:
            self._chunks.append(chunk)
            self._notify()

    def finish(self, result: Outcome) -> None:
        self._end(result, None)

    def fail(self, error: BaseException) -> None:
        self._end(None, error)

    def _end(self, result: Outcome | None, error: BaseException | None) -> None:
        with self._changed:
            if not self._done:
                self._result, self._error, self._done = result, error, True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._waiting is not None and (self._done or not self._waits_for_end):
            self._wakeups.add(*self._waiting)
            self._waiting = None


class RequestHandle(PendingAnswer):
    """The handle of a request in an engine of this process, whose prompt is measured."""

    def __init__(
        self, request_id: str, abort: Callable[[str], None], wakeups: Wakeups, size: PromptSize, max_new_tokens: int
    ) -> None:
        super().__init__(request_id, abort, wakeups)
        self.size = size  # of the prompt
        self.max_new_tokens = max_new_tokens  # of each completion, after what the context has room for
