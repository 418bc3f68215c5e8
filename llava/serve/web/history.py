"""What a visitor's browser remembers of a conversation, and how the page continues it.

In: turns and their images. Out: JSON for the browser's storage, bounded, with small copies of the images; and turns again, from
what a browser sends, which may be anything. The server keeps nothing of a conversation once its page is closed.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

from llava.errors import InputError
from llava.images.io import decode_base64
from llava.serve.web.client import PageTurn

if TYPE_CHECKING:
    from PIL import Image

COPY_SIDE = 512  # pixels
MAX_BYTES = 1_500_000  # of a conversation; browsers keep about five million for a site
MAX_TURNS = 100
MAX_COPY_BYTES = 400_000
PREFIX = "data:image/jpeg;base64,"


class StoredTurn(TypedDict):
    """One question and its answer; `images` are data: URLs, empty ones for images that were not kept."""

    question: str
    answer: str | None
    failed: bool
    images: list[str]


def copy_of(image: Image.Image) -> str:
    """Return a small copy of an image as a data: URL."""
    small = image.copy()
    small.thumbnail((COPY_SIDE, COPY_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return PREFIX + base64.b64encode(buffer.getvalue()).decode()


def stored(turns: Sequence[PageTurn], copies: Callable[[str], str]) -> list[StoredTurn]:
    """Return what a browser shall remember. Of a long conversation the oldest images are left out, then the oldest turns."""
    rows: list[StoredTurn] = [
        {
            "question": turn.question,
            "answer": turn.answer,
            "failed": turn.failed,
            "images": [copies(path) for path in turn.images],
        }
        for turn in turns[-MAX_TURNS:]
    ]
    sizes = [len(json.dumps(row)) for row in rows]
    for number, row in enumerate(rows):
        if sum(sizes) <= MAX_BYTES:
            break
        row["images"] = ["" for _ in row["images"]]
        sizes[number] = len(json.dumps(row))
    while rows and sum(sizes) > MAX_BYTES:
        del rows[0], sizes[0]
    return rows


def restored(value: object, keep: Callable[[bytes], str]) -> list[PageTurn]:
    """Return the turns that a browser remembers; `keep` writes an image and returns its path.

    What is malformed is left out: it is the visitor's own, and was written by another version or by hand.
    """
    turns = []
    for row in value[-MAX_TURNS:] if isinstance(value, list) else []:
        if not isinstance(row, dict):
            continue
        question, answer, images = row.get("question"), row.get("answer"), row.get("images")
        if not isinstance(question, str) or not isinstance(answer, (str, type(None))) or not isinstance(images, list):
            continue
        paths = []
        for url in images:
            if isinstance(url, str) and url.startswith(PREFIX) and len(url) <= MAX_COPY_BYTES:
                try:
                    paths.append(keep(decode_base64(url[len(PREFIX) :], "an image")))
                except InputError:
                    continue
        turns.append(PageTurn(question, tuple(paths), answer, bool(row.get("failed"))))
    return turns
