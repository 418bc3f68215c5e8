"""Show an image in the terminal, where the terminal can: by kitty's protocol, iTerm2's, or as sixels.

In: a Pillow image and the environment. Out: escape sequences, or none where nothing is known of the terminal. A terminal within
tmux or screen is left alone. Nothing here imports Pillow before there is an image.
"""

from __future__ import annotations

import base64
import io
import os
import re
import select
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PROTOCOLS = ("kitty", "iterm", "sixel")
MAX_SIDE = (480, 240)  # pixels of what is shown
CHUNK = 4096  # characters of kitty's chunks
MAX_COLOURS = 128  # of sixels
REPLY_S = 0.2  # a terminal that knows no question does not answer it
ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "mintty", "vscode", "Tabby")


def find_protocol(environment: Mapping[str, str]) -> str | None:
    """Return the protocol of the terminal that the environment names; None where it names none that shows images."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if environment.get("TMUX") or term.startswith(("screen", "tmux", "dumb")):
        return None
    if "kitty" in term or environment.get("KITTY_WINDOW_ID") or program == "ghostty" or "ghostty" in term:
        return "kitty"
    if program in ITERM_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    if environment.get("KONSOLE_VERSION"):
        return "kitty"
    if term.startswith(("foot", "mlterm", "yaft")) or "sixel" in term:
        return "sixel"
    return None


def asks_for_sixel() -> bool:
    """Ask the terminal what it can do, and return whether sixels are among it. Typed keys that come meanwhile are kept out."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return False
    source, target = sys.stdin.fileno(), sys.stdout.fileno()
    try:
        before = termios.tcgetattr(source)
    except termios.error:
        return False
    reply = b""
    try:
        tty.setcbreak(source, termios.TCSANOW)
        os.write(target, b"\033[c")
        deadline = time.monotonic() + REPLY_S
        while not reply.endswith(b"c") and (left := deadline - time.monotonic()) > 0:
            if not select.select([source], [], [], left)[0]:
                break
            reply += os.read(source, 64)
    finally:
        termios.tcsetattr(source, termios.TCSANOW, before)
    found = re.search(rb"\033\[\?([0-9;]*)c", reply)
    return found is not None and b"4" in found[1].split(b";")


def as_escape(image: Image.Image, protocol: str) -> str:
    """Return the sequence that shows an image, made smaller where it is large."""
    small = image.convert("RGB")
    small.thumbnail(MAX_SIDE)
    return {"kitty": _kitty, "iterm": _iterm, "sixel": _sixel}[protocol](small)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _kitty(image: Image.Image) -> str:
    data = base64.b64encode(_png(image)).decode()
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        keys = "f=100,a=T,q=2," if number == 0 else ""
        parts.append(f"\033_G{keys}m={int(number + 1 < len(chunks))};{chunk}\033\\")
    return "".join(parts)


def _iterm(image: Image.Image) -> str:
    data = _png(image)
    keys = f"inline=1;size={len(data)};width={image.width}px;height={image.height}px;preserveAspectRatio=1"
    return f"\033]1337;File={keys}:{base64.b64encode(data).decode()}\a"


def _sixel(image: Image.Image) -> str:
    """Six rows at a time: for each colour, the columns that have it, with runs counted."""
    indexed = image.quantize(MAX_COLOURS)
    palette = (indexed.getpalette() or [])[: 3 * MAX_COLOURS]
    pixels = list(indexed.tobytes())
    width, height = indexed.size
    parts = [f'\033Pq"1;1;{width};{height}']
    for number in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * number : 3 * number + 3])
        parts.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        rows = [pixels[row * width : (row + 1) * width] for row in range(top, min(top + 6, height))]
        for colour in sorted({value for row in rows for value in row}):
            columns = [sum((row[x] == colour) << bit for bit, row in enumerate(rows)) for x in range(width)]
            parts.append(f"#{colour}{_runs(columns)}$")
        parts.append("-")
    return "".join(parts) + "\033\\"


def _runs(columns: list[int]) -> str:
    text, at = "", 0
    while at < len(columns):
        end = at
        while end < len(columns) and columns[end] == columns[at]:
            end += 1
        character = chr(63 + columns[at])
        text += f"!{end - at}{character}" if end - at > 3 else character * (end - at)
        at = end
    return text
