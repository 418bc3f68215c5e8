"""Input and output of an interactive program: prompts, colors, line history, streamed answers.

In: what to show. Out: text on stdout (answers) and stderr (messages and errors), and the lines that were typed.
Without a terminal at both ends there are no prompts and no colors: only answers reach stdout, so that pipes work.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from llava.cli.colors import RESET, Colors, style_code, wants_colors
from llava.errors import InputError
from llava.files import state_folder

if TYPE_CHECKING:
    from llava.engine.handle import RequestHandle
    from llava.engine.request import Result
    from llava.session import LoadedImage


class Terminal:
    """Where a program reads lines and writes answers; `interactive` if stdin and stdout are both terminals."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.quiet = quiet
        self.use_colors = self.interactive and wants_colors(sys.stdout)

    def write(self, text: str) -> None:
        """Write part of an answer to stdout, and flush."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def info(self, text: str) -> None:
        """Write a message to stderr, unless the program is quiet."""
        if not self.quiet:
            print(self._styled("dim", text), file=sys.stderr, flush=True)

    def attached(self, images: Sequence[LoadedImage], question: str | None) -> None:
        """Say which images were found in what the user wrote, and what is asked about them."""
        for image in images:
            self.info(f"attached {image.source} ({image.image.width}x{image.image.height})")
        if images:
            self.info(f"asked: {question}" if question is not None else "waiting for a question about it")

    def error(self, error: InputError) -> None:
        """Write an error to stderr; the program goes on."""
        print(self._styled("red", f"error: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)

    def lines(self, prompt: str = "> ") -> Iterator[str]:
        """Yield lines until the end of input. At a prompt, Ctrl-C drops the line; a second one in a row ends the input."""
        if not self.interactive:
            try:
                yield from (line.rstrip("\r\n") for line in sys.stdin)
            except UnicodeDecodeError as error:
                raise InputError(
                    'stdin holds no text; read an image from it with a question: llava chat - "What is this?"'
                ) from error
            return
        # \001 and \002 tell readline that what is between them has no width.
        shown = f"\001{style_code('bold')}\002{prompt}\001{RESET}\002" if self.use_colors else prompt
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
                    self.info("Ctrl-C again, Ctrl-D or /exit leaves")
                    continue
                interrupted = False
                yield line

    def _styled(self, style: str, text: str) -> str:
        return Colors(self.use_colors and sys.stderr.isatty())(text, style)


def show(handle: RequestHandle, write: Callable[[str], None]) -> Result:
    """Write an answer as it is generated, and return its result. Ctrl-C aborts the answer and not the program."""
    with handle:
        try:
            for chunk in handle:
                write(chunk.text)
        except KeyboardInterrupt:
            handle.abort()
            for chunk in handle:  # text generated before that
                write(chunk.text)
        return handle.result()


def quiet_libraries() -> None:
    """Hide warnings and progress bars of libraries; log messages of this package still show."""
    warnings.simplefilter("ignore")
    quiet_bitsandbytes()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def quiet_bitsandbytes() -> None:
    """Hide its log messages: one at each product of matrices, and one about a kernel that is an option of some processors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def _line_history() -> Iterator[None]:
    """Edit and recall typed lines within the block; they are kept between sessions. Nothing without readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    try:
        file = state_folder() / "history"
    except InputError:  # a user without a home: no history
        yield
        return
    readline.set_history_length(1000)
    with suppress(OSError):  # the first session, or an unreadable file: the history starts empty
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError):  # an unwritable folder: no history next time
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)
