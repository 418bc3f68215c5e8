"""Small helpers, most of them for outside code that imports them from here.

Module attributes that are imported at first use, messages of the web server, loggers, the first process of a distributed
run, the switch that skips torch's random initialisation, and what a program is waiting for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

from llava.constants import LOGDIR

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
MODERATION_URL = "https://api.openai.com/v1/moderations"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."


@dataclass
class Wait:
    """Something that takes long: what it is, and how much is done of how much; None: not known."""

    what: str
    total: int | None = None
    in_bytes: bool = False
    done: int = 0
    started: float = field(default_factory=time.monotonic)


class WaitWatcher(Protocol):
    """Shows what a program is waiting for (cli/waits.py)."""

    def begin(self, wait: Wait) -> None: ...
    def end(self, wait: Wait) -> None: ...


# Set by programs. A library shows nothing by itself.
WATCHER: ContextVar[WaitWatcher | None] = ContextVar("WATCHER", default=None)


def is_watched() -> bool:
    """Whether a program shows what it is waiting for."""
    return WATCHER.get() is not None


@contextmanager
def waiting(what: str, total: int | None = None, *, in_bytes: bool = False) -> Iterator[Wait]:
    """Tell a program that the block may take long; the block may set `done` of the value as it goes on."""
    wait, watcher = Wait(what, total, in_bytes), WATCHER.get()
    if watcher is None:
        yield wait
        return
    watcher.begin(wait)
    try:
        yield wait
    finally:
        watcher.end(wait)


def lazy_exports(
    module: str, names_by_home: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a module that exports names of other modules without importing them.

    `module` is its `__name__`; each module in `names_by_home` is imported when one of its names is first used.
    """
    homes = {name: home for home, names in names_by_home.items() for name in names}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return get, names


def disable_torch_init() -> AbstractContextManager[None]:
    """Stop `nn.Linear` and `nn.LayerNorm` from drawing random weights, since loaded ones replace them.

    A plain call holds for the rest of the process. As `with disable_torch_init():` it ends with the block.
    """
    import torch

    layers: tuple[Any, ...] = (torch.nn.Linear, torch.nn.LayerNorm)
    originals = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None

    @contextmanager
    def until_block_ends() -> Iterator[None]:
        try:
            yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.reset_parameters = original

    return until_block_ends()


def build_logger(logger_name: str, logger_filename: str = "") -> logging.Logger:
    """Make a logger that writes to stderr and, with a file name, to that file under LOGDIR, a new one every day (UTC)."""
    import logging.handlers  # which loads sockets

    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if logger.handlers:  # built before
        return logger
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if logger_filename:
        folder = Path(LOGDIR)
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(
            logging.handlers.TimedRotatingFileHandler(folder / logger_filename, when="D", utc=True, encoding="utf-8")
        )
    line = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    for handler in handlers:
        handler.setFormatter(line)
        logger.addHandler(handler)
    logger.propagate = False  # the root logger would write every line again
    return logger


class StreamToLogger:
    """A text stream that writes whole lines to a logger; what else is asked of it goes to the stdout of its creation."""

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.terminal: TextIO = sys.stdout
        self.logger = logger
        self.log_level = log_level
        self.linebuf = ""  # of a line without its end

    def __getattr__(self, name: str) -> object:
        return getattr(self.terminal, name)

    def write(self, buf: str) -> None:
        *lines, self.linebuf = (self.linebuf + buf).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())

    def flush(self) -> None:
        if self.linebuf:
            self.logger.log(self.log_level, self.linebuf.rstrip())
        self.linebuf = ""


def pretty_print_semaphore(semaphore: Any) -> str:
    """Describe a semaphore of asyncio, or None."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def violates_moderation(text: str) -> bool:
    """Ask OpenAI's moderation service about a text, with the key in OPENAI_API_KEY; False where it gives no verdict.

    Nothing in this package calls it.
    """
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: object) -> None:
            """Follow none: the key would go along, to whatever host is named."""

    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    request = urllib.request.Request(MODERATION_URL, json.dumps({"input": text}).encode(), headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=5) as response:
            return bool(json.load(response)["results"][0]["flagged"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def rank0_print(*args: object) -> None:
    """Print on the first process of a distributed run only."""
    if is_first_process():
        print(*args)
