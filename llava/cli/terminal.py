"""Input and output of an interactive program: prompts, colors, line history, streamed answers.

In: what to show. Out: text on stdout (answers) and stderr (messages and errors), and the lines that were typed.
Without a terminal at both ends there are no prompts and no colors: only answers reach stdout, so that pipes work.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from llava.cli.colors import RESET, Colors, style_code, wants_colors
from llava.cli.inline_images import as_escape, asks_for_sixel, find_protocol
from llava.cli.line_completion import bind_tab
from llava.errors import InputError
from llava.files import state_folder
from llava.images.frames import Video

if TYPE_CHECKING:
    from llava.engine.handle import RequestHandle
    from llava.engine.request import Result
    from llava.session import LoadedImage


BLOCK_MARK = '"""'


class TypedLine(NamedTuple):
    """A line of input, or several between marks (`is_block`), which are never a command."""

    text: str
    is_block: bool = False


class Terminal:
    """Where a program reads lines and writes answers; `interactive` if stdin and stdout are both terminals."""

    def __init__(self, *, quiet: bool = False, image_protocol: str = "auto") -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.quiet = quiet
        self._image_protocol = image_protocol
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
        self.name_images(images)
        if images:
            self.info(f"asked: {question}" if question is not None else "waiting for a question about it")

    def name_images(self, images: Sequence[LoadedImage]) -> None:
        for image in images:
            if not image.frame:  # of frames that are images, one line says it all
                self.info(f"attached {image.describe()}")

    def show_images(self, images: Sequence[LoadedImage]) -> None:
        """Show images on a terminal that can; others get a line with name and size from `attached`."""
        if not (images and self.interactive) or self.quiet:
            return
        if self._image_protocol == "auto":
            found = find_protocol(os.environ)
            self._image_protocol = found or ("sixel" if asks_for_sixel() else "off")
        if self._image_protocol != "off":
            for image in images:
                shown = image.image.overview() if isinstance(image.image, Video) else image.image
                self.write(as_escape(shown, self._image_protocol) + "\n")

    def error(self, error: InputError) -> None:
        """Write an error to stderr; the program goes on."""
        print(self._styled("red", f"error: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)

    def lines(
        self, prompt: str = "> ", *, complete: Callable[[str, int], str | None] | None = None
    ) -> Iterator[TypedLine]:
        """Yield lines until the end of input. At a prompt, Ctrl-C drops the line; a second one in a row ends the input.

        At a prompt several lines between two `BLOCK_MARK`s are one, and Tab completes words by `complete`.
        """
        if not self.interactive:
            try:
                yield from (TypedLine(line.rstrip("\r\n")) for line in sys.stdin)
            except UnicodeDecodeError as error:
                raise InputError(
                    'stdin holds no text; read an image from it with a question: llava chat - "What is this?"'
                ) from error
            return
        # \001 and \002 tell readline that what is between them has no width.
        shown, more = (
            f"\001{style_code('bold')}\002{text}\001{RESET}\002" if self.use_colors else text
            for text in (prompt, "... ")
        )
        interrupted = False
        with _line_history(complete):
            while True:
                try:
                    line = _read_block(input(shown), more)
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


def _read_block(first: str, prompt: str) -> TypedLine:
    """Read on to the mark that ends a block, where a typed line begins one; without a mark the line is the end."""
    text = first.lstrip()
    if not text.startswith(BLOCK_MARK):
        return TypedLine(first)
    lines = [text.removeprefix(BLOCK_MARK)]
    while BLOCK_MARK not in lines[-1]:
        lines.append(input(prompt))
    last, _, rest = lines[-1].rpartition(BLOCK_MARK)
    return TypedLine("\n".join([*lines[:-1], last + (f" {rest.strip()}" if rest.strip() else "")]), is_block=True)


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
def _line_history(complete: Callable[[str, int], str | None] | None = None) -> Iterator[None]:
    """Edit, complete and recall typed lines within the block; they are kept between sessions. Nothing without readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    if complete is not None:
        bind_tab(complete)
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
