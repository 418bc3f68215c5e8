"""Show what a program is waiting for: a bar on a terminal, a line now and then in a log.

In: the waits that `llava.utils.waiting` announces. Out: text on stderr about each that takes longer than two seconds. A thread
looks at them, so that one which cannot say how far it is shows its time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from llava.utils import WATCHER, Wait

OFF = "LLAVA_PROGRESS"  # in the environment
PATIENCE_S = 2.0  # a shorter wait shows nothing
BETWEEN_LINES_S = 10.0  # of a log
BETWEEN_FRAMES_S = 0.25  # of a terminal
RATE_OVER_S = 10.0
BAR_WIDTH = 24
CLEAR_LINE = "\r\033[K"


class WaitDisplay:
    """Shows the innermost wait. It has a thread while there is one."""

    def __init__(self, stream: TextIO | None = None, *, patience_s: float = PATIENCE_S) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.patience_s = patience_s
        self._waits: list[Wait] = []
        self._shown: dict[int, float] = {}  # by identity: when a line of it was last written
        self._samples: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, wait: Wait) -> None:
        with self._lock:
            self._waits.append(wait)
            self._samples.clear()
            if self._thread is None:
                self._wake.clear()
                self._thread = threading.Thread(target=self._run, name="llava-waits", daemon=True)
                self._thread.start()

    def end(self, wait: Wait) -> None:
        with self._lock:
            self._waits.remove(wait)
            self._samples.clear()
            if self._shown.pop(id(wait), None) is not None:
                self._write(self._ended(wait, time.monotonic() - wait.started))
            if not self._waits:
                self._thread = None
                self._wake.set()

    def _ended(self, wait: Wait, elapsed: float) -> str:
        """What is left of a wait: a line, unless it was short and moved nothing."""
        is_counted = wait.in_bytes and wait.done > 0
        if elapsed < BETWEEN_LINES_S and not is_counted:
            return ""
        amount = f", {size_text(wait.done)}" if is_counted else ""
        return f"{wait.what}: {duration_text(elapsed)}{amount}\n"

    def _run(self) -> None:
        wake = self._wake
        while not wake.wait(BETWEEN_FRAMES_S):
            with self._lock:
                if self._waits:
                    self._show(self._waits[-1], time.monotonic())

    def _show(self, wait: Wait, now: float) -> None:
        self._samples.append((now, wait.done))
        while now - self._samples[0][0] > RATE_OVER_S:
            self._samples.popleft()
        last = self._shown.get(id(wait))
        if now - wait.started < self.patience_s or (
            not self.is_terminal and last is not None and now - last < BETWEEN_LINES_S
        ):
            return
        self._shown[id(wait)] = now
        self._write(self.text(wait, now) + ("" if self.is_terminal else "\n"))

    def text(self, wait: Wait, now: float) -> str:
        """One line about a wait: how much of it, how fast, how long still; without a total, how long already."""
        elapsed = duration_text(now - wait.started)
        if not wait.done and not wait.total:
            return f"{wait.what} ... {elapsed}"
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        rate = (after - before) / (last - first) if last > first else 0.0
        show = size_text if wait.in_bytes else str
        parts = [f"{show(wait.done)} of {show(wait.total)}" if wait.total else show(wait.done)]
        if wait.in_bytes:
            parts.append(f"{size_text(int(rate))}/s")
        if wait.total and rate > 0:
            parts.append(f"{duration_text((wait.total - wait.done) / rate)} left")
        bar = ""
        if self.is_terminal and wait.total:
            full = min(BAR_WIDTH, BAR_WIDTH * wait.done // wait.total)
            bar = f" [{'#' * full}{'.' * (BAR_WIDTH - full)}]"
        return f"{wait.what}{bar} {', '.join(parts)}"

    def _write(self, text: str) -> None:
        if self.is_terminal:  # an empty text clears the line
            text = CLEAR_LINE + text
        self.stream.write(text)
        self.stream.flush()


class SilentDisplay:
    """For programs that are asked to be quiet."""

    def begin(self, wait: Wait) -> None:
        pass

    def end(self, wait: Wait) -> None:
        pass


@contextmanager
def shown_waits() -> Iterator[None]:
    """Within the block, show what the program waits for, unless the variable `OFF` is 0; an outer block stays in charge."""
    if WATCHER.get() is not None:
        yield
        return
    token = WATCHER.set(SilentDisplay() if os.environ.get(OFF) == "0" else WaitDisplay())
    try:
        yield
    finally:
        WATCHER.reset(token)


def hide_waits() -> None:
    """Show no waits from now on."""
    WATCHER.set(SilentDisplay())


def size_text(num_bytes: int) -> str:
    """Format a number of bytes with three figures."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes < 1000 * size else f"{num_bytes // size} {unit}"
    return f"{num_bytes} B"


def duration_text(seconds: float) -> str:
    """Format seconds as `12 s`, `3:05` (minutes) or `1:02:03` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
