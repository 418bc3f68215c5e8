"""Colours on a terminal, and none anywhere else.

In: a stream and a text. Out: the text, painted where the stream is a terminal that shows colours and NO_COLOR is not set.
Nothing here imports torch.
"""

from __future__ import annotations

import os
from typing import TextIO

PLAIN = "\033[0m"
STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}


def wants_colours(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shows_blocks(stream: TextIO) -> bool:
    """Whether a stream can show blocks and marks beyond ASCII."""
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def begin(*styles: str) -> str:
    """What switches styles on; PLAIN switches them off."""
    return f"\033[{';'.join(str(STYLES[style]) for style in styles)}m"


class Paint:
    """`paint("word", "bold", "red")`: painted, if colours are on."""

    def __init__(self, colours: bool) -> None:
        self.colours = colours

    def __call__(self, text: str, *styles: str) -> str:
        if not self.colours or not text:
            return text
        return begin(*styles) + text + PLAIN
