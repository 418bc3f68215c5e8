"""ANSI colors on a terminal.

In: a stream and a text. Out: the text, styled where the stream is a terminal that shows colors and NO_COLOR is not set.
Nothing here imports torch.
"""

from __future__ import annotations

import os
from typing import TextIO

RESET = "\033[0m"
STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}


def wants_colors(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shows_unicode(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def style_code(*styles: str) -> str:
    """Return the escape sequence that switches styles on; RESET switches them off."""
    return f"\033[{';'.join(str(STYLES[style]) for style in styles)}m"


class Colors:
    """`colors("word", "bold", "red")` is the styled word, or the plain one where colors are off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, text: str, *styles: str) -> str:
        if not self.enabled or not text:
            return text
        return style_code(*styles) + text + RESET
