"""Show on stderr how far a run is and how long it will take.

In: numbers of answers. Out: in a terminal one line that is overwritten; elsewhere a line every 30 s. Nothing on stdout.
"""

from __future__ import annotations

import sys
import time

BAR = 28
EVERY_S = 0.2
EVERY_S_IN_A_FILE = 30.0


class ProgressBar:
    """The progress of `total` questions, of which `done` were answered before this run."""

    def __init__(self, title: str, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.title, self.total, self.done = title, total, done
        self._before = done
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self.begin()

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._shown = 0.0 if self._is_terminal else self._started

    def update(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self._shown >= (EVERY_S if self._is_terminal else EVERY_S_IN_A_FILE):
            self._shown = now
            self._write(self.line())

    def close(self) -> None:
        self._write(self.line(), end="\n")

    def line(self) -> str:
        elapsed = time.monotonic() - self._started
        rate = (self.done - self._before) / elapsed if elapsed > 0 else 0.0
        left = f"{_duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        filled = BAR * self.done // max(1, self.total)
        bar = "#" * filled + "." * (BAR - filled)
        state = left or f"in {_duration(elapsed)}"
        return f"{self.title} [{bar}] {self.done}/{self.total}  {rate:.1f}/s  {state}"

    def _write(self, text: str, end: str = "") -> None:
        if self._quiet:
            return
        if self._is_terminal:
            print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
