"""The backend that runs the engine in a process of its own.

In: requests from an event loop. Out: chunks for it. Server and engine each have an interpreter of
their own, so that reading requests and writing answers takes no time from the thread that feeds the GPU. The engine's process
runs subprocess_main.py.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.engine.config import EngineClosed, EngineError
from llava.engine.handle import PendingAnswer, Wakeups
from llava.engine.request import Chunk, Request, Result, Score, ScoreRequest
from llava.serve.backends.base import BackendError
from llava.serve.backends.in_process import EngineRequest, gauges, score_of, server_error
from llava.serve.backends.pipe import MessagePipe
from llava.serve.backends.served_model import LocalModel
from llava.serve.backends.subprocess_main import (
    AbortCommand,
    ChunkEvent,
    EndEvent,
    StartCommand,
    StepEvents,
    SubmitCommand,
    request_id_of,
)

if TYPE_CHECKING:
    from llava.engine.base import EngineStats
    from llava.engine.config import EngineConfig
    from llava.model.builder import LoadedModel

logger = logging.getLogger("llava.serve")

START = "import sys; from llava.serve.backends.subprocess_main import main; main(int(sys.argv[1]))"
CLOSE_S = 30.0  # for the other process to end by itself


class ProcessBackend:
    def __init__(
        self,
        load: Callable[[], LoadedModel],
        *,
        name: str,
        conv_mode: str | None = None,
        config: EngineConfig | None = None,
        log_level: str = "info",
    ) -> None:
        """Start the process, and wait until its engine is ready. `load` is called there, so it must be known by name."""
        here, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self._pipe = MessagePipe(here)
        try:
            self._pipe.send(StartCommand(load, name, conv_mode, config, log_level))
            first = self._pipe.read(default=None)
            if first is None:
                raise EngineClosed(f"the engine did not start: {self._exit_reason()}")
            if isinstance(first, Exception):
                raise first
        except BaseException:
            self._process.kill()
            self._pipe.close()
            self._process.wait()
            raise
        self.model: LocalModel = first
        self._numbers = itertools.count()
        self._pending: dict[int, PipeHandle] = {}
        self._lock = threading.Lock()  # of `_pending`, against the end of the pipe
        self._wakeups = Wakeups()
        self._stats: EngineStats | None = None
        self._alive = True  # as the engine itself says
        self._gone: str | None = None  # how its process ended
        self._closing = False
        self._listener = threading.Thread(target=self._listen, name="llava-listener", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self, request: Request, *, streamed: bool) -> EngineRequest:
        return EngineRequest(await self._submitted(request, streamed), streamed)

    async def score(self, request: ScoreRequest) -> Score:
        try:
            return await score_of(await self._submitted(request, streamed=False))
        except EngineError as error:
            raise server_error(error) from error

    async def _submitted(self, request: Request | ScoreRequest, streamed: bool) -> PipeHandle:
        """Send a request over the pipe, and wait until the engine has taken it."""
        number = next(self._numbers)
        name = request_id_of(number)
        pending = PipeHandle(name, lambda _: self._pipe.send(AbortCommand(number)), self._wakeups)
        with self._lock:
            if self._gone is not None:
                raise BackendError(f"the engine is gone: {self._gone}")
            self._pending[number] = pending
            self._pipe.send(SubmitCommand(number, replace(request, request_id=name), streamed))
        try:
            await pending.accepted.wait()
        except asyncio.CancelledError:
            pending.abort()
            raise
        if pending.refusal is not None:
            raise server_error(pending.refusal)
        return pending

    def gauges(self) -> Mapping[str, float]:
        return {} if self._stats is None else gauges(self._stats)

    async def is_alive(self) -> bool:
        return self._alive and self._gone is None

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._closing = True
        self._pipe.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()

    # The thread that reads the pipe.

    def _listen(self) -> None:
        for events in self._pipe:
            self._receive(events)
            self._wakeups.send()
        reason = self._exit_reason()
        with self._lock:
            self._gone = reason
        if not self._closing:
            logger.error("the engine is gone: %s", reason)
        for number in list(self._pending):
            self._end(number, EngineClosed(f"the engine ended before the answer did: {reason}"))
        self._wakeups.send()

    def _receive(self, events: StepEvents) -> None:
        self._stats, self._alive = events.stats, events.alive
        for event in events.events:
            pending = self._pending.get(event.number)
            if pending is None:  # it was over before it was said to be taken
                continue
            if isinstance(event, ChunkEvent):
                pending.put(Chunk(*event.chunk))
            elif isinstance(event, EndEvent):
                self._end(event.number, event.result)
            pending.note_accepted()

    def _end(self, number: int, result: Result | Score | Exception) -> None:
        pending = self._pending.pop(number)
        if not isinstance(result, Exception):
            pending.finish(result)
        else:
            pending.refuse_or_fail(result)

    def _exit_reason(self) -> str:
        """How the process ended, which may be a moment after its pipe did."""
        if self._closing:
            return "it was closed"
        try:
            status = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            return "its process hangs"
        return f"its process was ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


class PipeHandle(PendingAnswer):
    """The handle of a request in the other process, which may be refused until it is accepted."""

    def __init__(self, name: str, abort: Callable[[str], None], wakeups: Wakeups) -> None:
        super().__init__(name, abort, wakeups)
        self.accepted = asyncio.Event()  # or refused
        self.refusal: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()

    def note_accepted(self) -> None:
        """Note that the engine took it; called by the thread that reads."""
        if self._loop is not None:
            self._wakeups.add(self._loop, self.accepted)
            self._loop = None

    def refuse_or_fail(self, error: Exception) -> None:
        if self._loop is not None:
            self.refusal = error
        self.fail(error)
        self.note_accepted()
