"""The images and videos of a sample as its file names them: paths, addresses, bytes, or base64 of bytes.

In: the value of a field or of a content part. Out: `MediaSource`s. Where they are found is in media_files.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llava.errors import InputError
from llava.images.io import decode_base64

ImageSource = str | bytes  # a path inside the image folder, a data: URL or an address; or the bytes of an image's file


@dataclass(frozen=True)
class VideoSource:
    """A video: its file or folder of frames, its bytes, or the images of its frames."""

    source: str | bytes | tuple[ImageSource, ...]


MediaSource = ImageSource | VideoSource

# The first characters of JPEG, PNG, GIF and WebP in base64. No path is that long without a dot.
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\r\n_-]{60,}={0,2}\s*")


def read_media(value: object, name: str) -> list[ImageSource]:
    """Read one image's source or a list of them; `name` is the field's."""
    return [_source(entry, name) for entry in _entries(value)]


def read_videos(value: object, name: str) -> list[VideoSource]:
    """Read one video's source or a list of them, of which each may be the list of its frames."""
    return [
        VideoSource(tuple(read_media(entry, name)) if isinstance(entry, (list, tuple)) else _source(entry, name))
        for entry in _entries(value)
    ]


def _entries(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _source(entry: object, name: str) -> ImageSource:
    """Read one: its path, its bytes, or an object that holds either, like image columns and content parts."""
    if isinstance(entry, Mapping):
        entry = next((entry[key] for key in ("bytes", "path", "url", "base64") if entry.get(key)), None)
    if isinstance(entry, str) and entry:
        return decode_base64(entry, f"{name!r}") if _BASE64.fullmatch(entry) else entry.removeprefix("file://")
    if isinstance(entry, (bytes, bytearray)) and entry:
        return bytes(entry)
    raise InputError(f"{name!r} is neither a path nor a list of paths (nor holds the bytes of images)")


def is_plain(value: object) -> bool:
    """Whether a field of images needs no reading: a path or bytes, or a list of them."""
    entries = value if isinstance(value, list) else [value]
    return all(
        (isinstance(entry, str) and bool(entry) and not entry.startswith("file://") and not _BASE64.fullmatch(entry))
        or (isinstance(entry, bytes) and bool(entry))
        for entry in entries
    )
