"""Settings of a Python process that serves: logging, thread switching, garbage collection.

In: a log level. Out: changed settings of the interpreter. Used by servers (http/server.py) and by the engine in a process of
its own (backends/subprocess_main.py).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time

from llava.cli.terminal import quiet_bitsandbytes
from llava.serve.http.request_record import RequestIdFilter

SWITCH_S = 0.0005  # Python's default is ten times as long
ORPHAN_S = 10.0  # for the answers of a process whose parent is gone
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s"


def set_up_logging(level: str) -> None:
    """Log to stderr: this package from `level` up, uvicorn its errors only."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RequestIdFilter())
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every malformed request
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves in the middle
    quiet_bitsandbytes()
    logging.getLogger("llava").setLevel(level.upper())


def shorten_switch_interval() -> None:
    """Let threads take turns sooner: the engine's thread must not wait long for the event loop after each step."""
    sys.setswitchinterval(SWITCH_S)


def freeze_heap() -> None:
    """Exclude all objects that exist now, modules and a model, from garbage collection.

    A full collection over them takes a quarter of a second, in which no thread runs.
    """
    gc.collect()
    gc.freeze()


def end_with_stdin() -> None:
    """End this process, as by SIGTERM, when standard input is closed: whoever started it is gone, however it ended."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_S)
        os._exit(1)

    threading.Thread(target=watch, name="llava-parent", daemon=True).start()
