"""The engine in a process of its own: what runs there.

In, on a line: how to load the model; then requests, and which to abort. Out: what the model is; then what comes of the
requests, all of a step of the engine together. subprocess.py starts it, and it ends when the line does. It takes no
signals: a terminal and a service manager send theirs to every process, and answers on their way shall be finished.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.engine.base import BaseEngine, EngineStats
from llava.engine.config import EngineError, QueueFull
from llava.engine.handle import RequestHandle
from llava.engine.request import Chunk, Request
from llava.engine.selection import open_engine
from llava.errors import InputError
from llava.serve.backends.pipe import Line
from llava.serve.backends.served_model import KnownModel
from llava.serve.process import freeze_heap, set_up_logging, shorten_switch_interval

if TYPE_CHECKING:
    from llava.engine.config import EngineConfig
    from llava.model.builder import LoadedModel

logger = logging.getLogger("llava.serve")

IMAGE_THREADS = 4  # make prompts with images; text is made by the thread that reads the line


@dataclass(frozen=True)
class Order:
    """The first value on the line: which engine is wanted."""

    load: Callable[[], LoadedModel]
    name: str
    conv_mode: str | None
    config: EngineConfig | None
    log_level: str


class Ask(NamedTuple):
    number: int  # the asker's name for it
    request: Request
    streamed: bool


class Abort(NamedTuple):
    number: int


class Taken(NamedTuple):
    number: int


class Said(NamedTuple):
    number: int
    chunk: tuple[Any, ...]  # the fields of a Chunk, which travel at a third of its cost


class Ended(NamedTuple):
    number: int
    result: Any  # or the exception that ended it


class News(NamedTuple):
    """What has come since the last time, and how the engine is."""

    events: list[Taken | Said | Ended]
    stats: EngineStats
    alive: bool


class Host:
    """An engine that is asked, and answers, over a line."""

    def __init__(self, engine: BaseEngine, line: Line) -> None:
        self._engine = engine
        self._line = line
        self._events: deque[Taken | Said | Ended] = deque()
        self._pool = ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="llava-prompt")
        self._telling, self._lock = threading.Lock(), threading.Lock()
        self._being_made: dict[int, bool] = {}  # prompts with images, and whether they are wanted no more

    def serve(self) -> None:
        for word in self._line:
            if isinstance(word, Abort):
                self._abort(word.number)
            elif word.request.images:
                self._being_made[word.number] = False
                self._pool.submit(self._make, word)
            else:
                self._hand_in(word)
        self._pool.shutdown(cancel_futures=True)

    def note(self, event: Said | Ended) -> None:
        """From the engine's thread, which calls `tell` after the step."""
        self._events.append(event)

    def tell(self) -> None:
        with self._telling:  # or what one thread took out first might be told last
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._line.tell(News(events, self._engine.stats(), self._engine.alive))

    def _hand_in(self, ask: Ask) -> None:
        make_handle = partial(ToldHandle, self, ask.number)
        try:
            self._engine.submit(ask.request, streamed=ask.streamed, make_handle=make_handle)
        except Exception as error:
            if not isinstance(error, (InputError, EngineError)):
                logger.exception("a request could not be handed in")
            self._events.append(Ended(ask.number, plain(error)))
        else:
            self._events.append(Taken(ask.number))
        self.tell()

    def _make(self, ask: Ask) -> None:
        self._hand_in(ask)
        with self._lock:
            unwanted = self._being_made.pop(ask.number)
        if unwanted:
            self._engine.abort(name_of(ask.number))

    def _abort(self, number: int) -> None:
        with self._lock:
            if number in self._being_made:
                self._being_made[number] = True
        self._engine.abort(name_of(number))


class ToldHandle(RequestHandle):
    """A request whose asker is elsewhere: what comes of it is told, and kept by nobody here."""

    def __init__(self, host: Host, number: int, *given: Any) -> None:
        super().__init__(*given)
        self._host, self._number = host, number

    def put(self, chunk: Chunk) -> None:
        fields = (chunk.index, chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason)
        self._tell(Said(self._number, fields))

    def finish(self, result: Any) -> None:
        self._tell(Ended(self._number, result))

    def fail(self, error: BaseException) -> None:
        self._tell(Ended(self._number, plain(error)))

    def _tell(self, event: Said | Ended) -> None:
        self._host.note(event)
        self._wakeups.add_call(self._host.tell)


def name_of(number: int) -> str:
    return f"asked-{number}"


def plain(error: BaseException) -> Exception:
    """An error in a form that can travel: its kind, as far as askers tell kinds apart, and its sentence."""
    kind = next((kind for kind in (InputError, QueueFull) if isinstance(error, kind)), EngineError)
    return kind(str(error) if isinstance(error, (InputError, EngineError)) else f"{type(error).__name__}: {error}")


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    shorten_switch_interval()
    line = Line(socket.socket(fileno=descriptor))
    order: Order | None = line.read(default=None)
    if order is None:
        return
    set_up_logging(order.log_level)
    try:
        loaded = order.load()
        with open_engine(loaded, order.config) as engine:
            line.tell(KnownModel.of(loaded, name=order.name, conv_mode=order.conv_mode, context_len=engine.context_len))
            freeze_heap()
            Host(engine, line).serve()
    except InputError as error:
        line.tell(plain(error))
    finally:
        line.close()
