"""The engine's process: receives requests over a pipe, and sends what the engine gives.

In: how to load the model; then requests, and which to abort. Out: what the model is; then the events of the requests, those
of one step of the engine together. subprocess.py starts it, and it ends when the line does. It takes no
signals: a terminal and a service manager send theirs to every process, and answers on their way shall be finished.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llava.cli.waits import shown_waits
from llava.engine.base import BaseEngine, EngineStats
from llava.engine.config import EngineError, QueueFull
from llava.engine.handle import Outcome, RequestHandle
from llava.engine.request import Chunk, EmbedRequest, Request, ScoreRequest
from llava.engine.selection import open_engine
from llava.errors import InputError
from llava.serve.backends.pipe import MessagePipe
from llava.serve.backends.served_model import LocalModel
from llava.serve.process import freeze_heap, set_up_logging, shorten_switch_interval

if TYPE_CHECKING:
    from llava.engine.config import EngineConfig
    from llava.model.builder import LoadedModel

logger = logging.getLogger("llava.serve")

# Of each pool: prompts with images, and answers held to a grammar; the thread that reads the pipe does the rest.
BUILD_THREADS = 4
END_S = 10.0  # for the engine's thread to finish its step after the pipe has ended


@dataclass(frozen=True)
class StartCommand:
    """The first value on the pipe: which engine to start."""

    load: Callable[[], LoadedModel]
    name: str
    conv_mode: str | None
    config: EngineConfig | None
    adapters: Mapping[str, str]
    log_level: str


AnyRequest: TypeAlias = Request | ScoreRequest | EmbedRequest


class SubmitCommand(NamedTuple):
    number: int  # the sender's name for it
    request: AnyRequest
    streamed: bool


class AbortCommand(NamedTuple):
    number: int


class PingCommand(NamedTuple):
    """Asks for a message, which says that the process works."""


class RequestAccepted(NamedTuple):
    number: int


class ChunkEvent(NamedTuple):
    number: int
    chunk: tuple[Any, ...]  # the fields of a Chunk, which travel at a third of its cost


class EndEvent(NamedTuple):
    number: int
    result: Outcome | Exception  # the exception is what ended it


class StepEvents(NamedTuple):
    """All events since the last message, and the state of the engine."""

    events: list[RequestAccepted | ChunkEvent | EndEvent]
    stats: EngineStats
    alive: bool


class EngineHost:
    """An engine behind a pipe."""

    def __init__(self, engine: BaseEngine, pipe: MessagePipe) -> None:
        self._engine = engine
        self._pipe = pipe
        self._events: deque[RequestAccepted | ChunkEvent | EndEvent] = deque()
        self._image_pool = ThreadPoolExecutor(BUILD_THREADS, thread_name_prefix="llava-prompt")
        self._grammar_pool = ThreadPoolExecutor(BUILD_THREADS, thread_name_prefix="llava-grammar")
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._being_built: dict[int, bool] = {}  # by the pool, and whether they were aborted meanwhile

    def serve(self) -> None:
        for message in self._pipe:
            if isinstance(message, PingCommand):
                self.send_events()
            elif isinstance(message, AbortCommand):
                self._abort(message.number)
            elif isinstance(message.request, Request) and message.request.sampling.is_constrained:
                self._submit_by(self._grammar_pool, message)
            elif message.request.images:
                self._submit_by(self._image_pool, message)
            else:
                self._submit(message)
        for pool in (self._image_pool, self._grammar_pool):
            pool.shutdown(cancel_futures=True)

    def _submit_by(self, pool: ThreadPoolExecutor, command: SubmitCommand) -> None:
        self._being_built[command.number] = False
        pool.submit(self._build, command)

    def add_event(self, event: ChunkEvent | EndEvent) -> None:
        """From the engine's thread, which calls `send_events` after the step."""
        self._events.append(event)

    def send_events(self) -> None:
        with self._sending:  # else what one thread took first might be sent last
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._pipe.send(StepEvents(events, self._engine.stats(), self._engine.alive))

    def _submit(self, command: SubmitCommand) -> None:
        make_handle = partial(ForwardingHandle, self, command.number)
        try:
            if isinstance(command.request, ScoreRequest):
                self._engine.submit_score(command.request, make_handle=make_handle)
            elif isinstance(command.request, EmbedRequest):
                self._engine.submit_embed(command.request, make_handle=make_handle)
            else:
                self._engine.submit(command.request, streamed=command.streamed, make_handle=make_handle)
        except Exception as error:
            if not isinstance(error, (InputError, EngineError)):
                logger.exception("a request could not be submitted")
            self._events.append(EndEvent(command.number, picklable(error)))
        else:
            self._events.append(RequestAccepted(command.number))
        self.send_events()

    def _build(self, command: SubmitCommand) -> None:
        self._submit(command)
        with self._lock:
            unwanted = self._being_built.pop(command.number)
        if unwanted:
            self._engine.abort(request_id_of(command.number))

    def _abort(self, number: int) -> None:
        with self._lock:
            if number in self._being_built:
                self._being_built[number] = True
        self._engine.abort(request_id_of(number))


class ForwardingHandle(RequestHandle):
    """The handle of a request of the other process: forwards what comes, and keeps nothing."""

    def __init__(self, host: EngineHost, number: int, *given: Any) -> None:
        super().__init__(*given)
        self._host, self._number = host, number

    def put(self, chunk: Chunk) -> None:
        fields = (chunk.index, chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason, chunk.stop_string)
        self._forward(ChunkEvent(self._number, fields))

    def finish(self, result: Outcome) -> None:
        self._forward(EndEvent(self._number, result))

    def fail(self, error: BaseException) -> None:
        self._forward(EndEvent(self._number, picklable(error)))

    def _forward(self, event: ChunkEvent | EndEvent) -> None:
        self._host.add_event(event)
        self._wakeups.add_call(self._host.send_events)


def request_id_of(number: int) -> str:
    return f"request-{number}"


def picklable(error: BaseException) -> Exception:
    """An error that pickles: of its kind, as far as servers distinguish kinds, with its message."""
    kind = next((kind for kind in (InputError, QueueFull) if isinstance(error, kind)), EngineError)
    return kind(str(error) if isinstance(error, (InputError, EngineError)) else f"{type(error).__name__}: {error}")


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    shorten_switch_interval()
    pipe = MessagePipe(socket.socket(fileno=descriptor))
    command: StartCommand | None = pipe.read(default=None)
    if command is None:
        return
    set_up_logging(command.log_level)
    try:
        with shown_waits():
            loaded = command.load()
            opened = open_engine(loaded, command.config, adapters=command.adapters)
        with opened as engine:
            name, conv_mode = command.name, command.conv_mode
            about: dict[str, Any] = {"name": name, "conv_mode": conv_mode, "adapters": command.adapters}
            pipe.send(LocalModel.of(loaded, context_len=engine.context_len, **about))
            freeze_heap()
            EngineHost(engine, pipe).serve()
            # The server is gone. A step that hangs must not keep the GPU's memory.
            timer = threading.Timer(END_S, os._exit, args=[1])
            timer.daemon = True
            timer.start()
    except InputError as error:
        pipe.send(picklable(error))
    finally:
        pipe.close()
