"""Locate the images of samples: files inside the image folder, or bytes in the sample.

In: a path, a data: URL or bytes, and the image folder. Out: an argument for `llava.images.io.load_image`. Training reads
every image in every epoch and on every rank, so network addresses are refused here.
"""

from __future__ import annotations

import os
import re

from llava.data.formats import ImageSource
from llava.errors import InputError

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_FLAG = "--image_folder"


def locate_image(source: ImageSource, image_folder: str | None, *, flag: str = _FLAG) -> ImageSource:
    """Return an image's path inside the folder (links there may lead out of it), or the bytes or data: URL as they are."""
    if isinstance(source, bytes) or source.startswith("data:"):
        return source
    if _ADDRESS.match(source):
        raise InputError(f"image {source!r} is an address; download the images of a data set into its image folder")
    if not image_folder:
        raise InputError(f"image {source!r} cannot be found: say where the images are with {flag}")
    folder = os.path.abspath(image_folder)
    path = os.path.normpath(os.path.join(folder, source))
    if os.path.commonpath([folder, path]) != folder:
        raise InputError(f"image {source!r} lies outside the image folder {folder!r}")
    return path


def image_label(source: ImageSource) -> str:
    """Name an image for messages."""
    if isinstance(source, bytes):
        return f"{len(source):,} bytes in the file"
    return "a data: URL" if source.startswith("data:") else source
