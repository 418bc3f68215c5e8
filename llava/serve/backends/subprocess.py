"""The backend that runs the engine in a process of its own.

In: requests from an event loop. Out: chunks for it. Server and engine each have an interpreter of
their own, so that reading requests and writing answers takes no time from the thread that feeds the GPU. The engine's process
runs subprocess_main.py. One that ends or hangs is started again, a bounded number of times.
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
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.engine.config import EngineClosed, EngineError
from llava.engine.handle import Outcome, PendingAnswer, Wakeups
from llava.engine.request import Chunk, Embedding, EmbedRequest, Request, Score, ScoreRequest
from llava.serve.backends.base import UnreachableError
from llava.serve.backends.in_process import EngineRequest, ended, gauges, server_error
from llava.serve.backends.pipe import MessagePipe
from llava.serve.backends.served_model import LocalModel
from llava.serve.backends.subprocess_main import (
    AbortCommand,
    AnyRequest,
    ChunkEvent,
    EndEvent,
    PingCommand,
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
PING_S = 1.0  # between messages to an engine that says nothing
SILENT_S = 10.0  # without a message, after which the engine counts as not working
HANG_S = 60.0  # without a message, after which its process is killed
GOOD_RUN_S = 30.0  # an engine that ran so long begins a new count of failures
MAX_FAILURES = 5  # ends and failed starts in a row, after which no further start is tried
MAX_PAUSE_S = 10.0  # before a start


class ProcessBackend:
    """An engine in a process of its own, which is started again when it ends or hangs.

    After `MAX_FAILURES` in a row, `lost` says why no further start is tried.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        *,
        name: str,
        conv_mode: str | None = None,
        config: EngineConfig | None = None,
        adapters: Mapping[str, str] | None = None,
        log_level: str = "info",
    ) -> None:
        """Start the process, and wait until its engine is ready. `load` is called there, so it must be known by name."""
        self._command = StartCommand(load, name, conv_mode, config, adapters or {}, log_level)
        self._closing = threading.Event()
        self._engine = EngineProcess()
        self.model: LocalModel = self._engine.begin(self._command)
        self._lost: str | None = None
        self._keeper = threading.Thread(target=self._keep_running, name="llava-keeper", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        """The process that runs now, or was the last to run."""
        return self._engine.pid

    @property
    def lost(self) -> str | None:
        return self._lost

    async def start(self, request: Request, *, streamed: bool) -> EngineRequest:
        return EngineRequest(await self._engine.submit(request, streamed=streamed), streamed)

    async def score(self, request: ScoreRequest) -> Score:
        try:
            return (await ended(await self._engine.submit(request, streamed=False))).score(timeout=0)
        except EngineError as error:
            raise server_error(error) from error

    async def embed(self, request: EmbedRequest) -> Embedding:
        try:
            return (await ended(await self._engine.submit(request, streamed=False))).embedding(timeout=0)
        except EngineError as error:
            raise server_error(error) from error

    def gauges(self) -> Mapping[str, float]:
        stats = self._engine.stats
        return {} if stats is None else gauges(stats)

    async def is_alive(self) -> bool:
        return self._engine.is_alive

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._closing.set()
        self._engine.close()
        self._keeper.join()

    # The thread that keeps an engine running.

    def _keep_running(self) -> None:
        num_failures = 0
        while not self._closing.is_set():
            started = time.monotonic()
            self._watch()
            if self._closing.is_set():
                return
            num_failures = 1 if time.monotonic() - started > GOOD_RUN_S else num_failures + 1
            while not self._start_again(num_failures):
                num_failures += 1
                if num_failures > MAX_FAILURES or self._closing.is_set():
                    break
            if num_failures > MAX_FAILURES:
                self._lost = f"the engine failed {num_failures} times in a row: {self._engine.gone}"
                return

    def _watch(self) -> None:
        """Return when the engine has ended; end one that hangs."""
        engine = self._engine
        while not engine.ended.wait(PING_S):
            engine.ping()
            if engine.silent_s > HANG_S:
                logger.error("the engine has said nothing for %.0f s; ending its process", engine.silent_s)
                engine.kill()

    def _start_again(self, num_failures: int) -> bool:
        """Start a process after a pause that grows with the failures; returns whether its engine runs."""
        pause = min(MAX_PAUSE_S, 2.0 ** (num_failures - 2)) if num_failures > 1 else 0.0
        logger.warning("starting the engine again in %.0f s", pause)
        if self._closing.wait(pause):
            return False
        try:
            engine = self._engine = EngineProcess()  # so that `close` reaches it while it loads
            if self._closing.is_set():
                engine.kill()
            engine.begin(self._command)
        except Exception as error:
            logger.error("the engine did not start again: %s", error)
            return False
        logger.warning("the engine has been started again")
        return True


class EngineProcess:
    """One process with an engine, from its start to its end."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self._pipe = MessagePipe(here)
        self._numbers = itertools.count()
        self._pending: dict[int, PipeHandle] = {}
        self._lock = threading.Lock()  # of `_pending`, against the end of the pipe
        self._wakeups = Wakeups()
        self.stats: EngineStats | None = None
        self.ended = threading.Event()
        self.gone: str | None = "it is being started"  # else how its process ended
        self._heard = time.monotonic()
        self._closing = False
        self._listener = threading.Thread(target=self._listen, name="llava-listener", daemon=True)

    def begin(self, command: StartCommand) -> LocalModel:
        """Load the model in the process; returns what it is.

        Raises:
            EngineClosed: The process ended.
            InputError: The model cannot be loaded.
        """
        try:
            self._pipe.send(command)
            first = self._pipe.read(default=None)
            if first is None:
                raise EngineClosed(f"the engine did not start: {self._exit_reason()}")
            if isinstance(first, Exception):
                raise first
        except BaseException as error:
            self.gone = str(error) or type(error).__name__
            self._process.kill()
            self._pipe.close()
            self._process.wait()
            self.ended.set()
            raise
        self.gone, self._heard = None, time.monotonic()
        self._listener.start()
        assert isinstance(first, LocalModel)
        return first

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def silent_s(self) -> float:
        """Seconds since its last message; it answers a ping at once."""
        return time.monotonic() - self._heard

    @property
    def is_alive(self) -> bool:
        return self.gone is None and self.silent_s < SILENT_S

    def ping(self) -> None:
        self._pipe.send(PingCommand())

    def kill(self) -> None:
        self._process.kill()

    async def submit(self, request: AnyRequest, *, streamed: bool) -> PipeHandle:
        """Send a request over the pipe, and wait until the engine has taken it."""
        number = next(self._numbers)
        name = request_id_of(number)
        pending = PipeHandle(name, lambda _: self._pipe.send(AbortCommand(number)), self._wakeups)
        with self._lock:
            if self.gone is not None:
                raise UnreachableError(f"the engine is gone and will be started again ({self.gone}); try again soon")
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

    def close(self) -> None:
        self._closing = True
        if self.gone is not None and not self.ended.is_set():  # still loading, which nothing else interrupts
            self._process.kill()
            return
        self._pipe.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._listener.is_alive():
            self._listener.join()

    # The thread that reads the pipe.

    def _listen(self) -> None:
        for events in self._pipe:
            self._receive(events)
            self._wakeups.send()
        with self._lock:
            self.gone = "its process has ended"
        reason = self._exit_reason()
        with self._lock:
            self.gone = reason
        if not self._closing:
            logger.error("the engine is gone: %s", reason)
        for number in list(self._pending):
            self._end(number, EngineClosed(f"the engine ended before the answer did: {reason}"))
        self._wakeups.send()
        self._pipe.close()
        self.ended.set()

    def _receive(self, events: StepEvents) -> None:
        self.stats, self._heard = events.stats, time.monotonic()
        for event in events.events:
            pending = self._pending.get(event.number)
            if pending is None:  # it was over before it was said to be taken
                continue
            if isinstance(event, ChunkEvent):
                pending.put(Chunk(*event.chunk))
            elif isinstance(event, EndEvent):
                self._end(event.number, event.result)
            pending.note_accepted()
        if not events.alive and not self._closing:  # its thread has ended, and said so to all requests
            self._process.kill()

    def _end(self, number: int, result: Outcome | Exception) -> None:
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
            self._process.kill()
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
