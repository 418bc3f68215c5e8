"""A terminal as a person or a pipe sees it: prompts, colours, history of lines, and answers that appear as they are written.

In: what to show. Out: characters on stdout (answers) and stderr (notes and complaints), and the lines that were typed.
Without a terminal at both ends there are no prompts and no colours: only answers reach stdout, so that pipes work.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli.colors import PLAIN, Paint, begin, wants_colours
from llava.engine.hf_engine import Answer, AnswerStream
from llava.errors import InputError

if TYPE_CHECKING:
    from llava.engine.answer_stream import EngineStream


class Terminal:
    """What the programs print with. `interactive`: a person types and reads; else a pipe or a file is at one end."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.quiet = quiet
        self.colours = self.interactive and wants_colours(sys.stdout)

    def write(self, text: str) -> None:
        """A piece of an answer, shown at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Something beside the answers."""
        if not self.quiet:
            print(self._painted("dim", text), file=sys.stderr, flush=True)

    def complain(self, error: InputError) -> None:
        """What was wrong with one line, where the program goes on."""
        print(self._painted("red", f"error: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)

    def lines(self, prompt: str = "> ") -> Iterator[str]:
        """Lines until the end of input. At a prompt, Ctrl-C drops the line and a second one in a row ends as Ctrl-D does."""
        if not self.interactive:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        # The marks around colours tell readline that they take no room.
        shown = f"\001{begin('bold')}\002{prompt}\001{PLAIN}\002" if self.colours else prompt
        interrupted = False
        with _line_history():
            while True:
                try:
                    line = input(shown)
                except EOFError:
                    print(file=sys.stderr)
                    return
                except KeyboardInterrupt:
                    print(file=sys.stderr)
                    if interrupted:
                        return
                    interrupted = True
                    self.note("Ctrl-C again, Ctrl-D or /exit leaves")
                    continue
                interrupted = False
                yield line

    def _painted(self, style: str, text: str) -> str:
        return Paint(self.colours and sys.stderr.isatty())(text, style)


def show(stream: AnswerStream | EngineStream, write: Callable[[str], None]) -> Answer:
    """Write an answer as it comes. Ctrl-C ends the answer, after the token being computed, and not the program."""
    with stream:
        try:
            for piece in stream:
                write(piece)
        except KeyboardInterrupt:
            stream.cancel()
            for piece in stream:  # what had come before the stop
                write(piece)
        return stream.answer


def quiet_libraries() -> None:
    """Keep libraries' advice to programmers off a user's terminal; our own warnings still show."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class _line_history:
    """Editing and recalling of typed lines, kept between sessions where the system has readline."""

    def __init__(self) -> None:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self._file = Path(state) / "llava" / "history"
        self._readline: Any = None

    def __enter__(self) -> None:
        try:
            import readline
        except ImportError:  # Windows
            return
        self._readline = readline
        readline.set_history_length(1000)
        with suppress(OSError):  # the first session, or a home that cannot be read: recalling starts empty
            readline.read_history_file(self._file)

    def __exit__(self, *exception: object) -> None:
        if self._readline is None:
            return
        with suppress(OSError):  # a home that cannot be written: nothing to recall next time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._readline.write_history_file(self._file)
            self._file.chmod(0o600)
