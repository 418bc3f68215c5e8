"""The limits of one request, and the opening of its images within them.

In: limits, and the images of a request as URLs or base64. Out: PIL images, or an `InputError`. Body sizes, hosts and API keys
are checked in middleware.py; downloads are in images/download.py. Images are decoded in processes of their own
(images/decoder_pool.py), and what that takes is reserved before.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.images.decoder_pool import DecoderPool
from llava.images.download import ImageLimits
from llava.images.io import decode_base64, load_image

if TYPE_CHECKING:
    from PIL import Image

    from llava.serve.http.memory_budget import Reservation


@dataclass(frozen=True)
class ServeLimits:
    """What one request may take. The defaults suit a server on a network."""

    max_images: int = 16  # of one request
    max_requests: int = (
        2048  # answers at once, waiting ones, prompts and completions counted one by one; one more gets 429
    )
    deadline_s: float = 600.0  # from the first byte of a request to the last of its answer
    images: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=20 * 2**20, timeout_s=10.0))
    allow_urls: bool = True  # download images from http and https addresses
    strict: bool = False  # refuse fields of bodies that are not known
    image_folder: Path | None = None  # file:// addresses are read in this folder; None: nowhere
    decoder: DecoderPool = field(default_factory=DecoderPool, compare=False)  # starts its processes when an image comes

    def __post_init__(self) -> None:
        for name in ("max_requests", "deadline_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"the limit {name} is {getattr(self, name)!r}; it must be above 0")
        if self.max_images < 0:
            raise InputError(f"the limit max_images is {self.max_images!r}; it must be 0 or more")
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise InputError(f"there is no image folder {str(self.image_folder)!r}")

    def check_count(self, num_images: int) -> None:
        if num_images > self.max_images:
            raise InputError(f"the request has {num_images} images, and this server takes at most {self.max_images}")


Source = str | bytes | Path


def open_images(urls: Sequence[str], limits: ServeLimits, reservation: Reservation) -> list[Image.Image]:
    """Open the images of data:, http(s): and file: URLs, whose pixels together are limited as those of one image."""
    return _open_all(urls, lambda url, allowed: _source_of(url, limits), limits, reservation)


def decode_images(texts: Sequence[str], limits: ServeLimits, reservation: Reservation) -> list[Image.Image]:
    """Open the images of the original protocol: base64, with or without the head of a data: URL."""

    def source(text: str, allowed: ImageLimits) -> Source:
        return text if text.startswith("data:") else decode_base64(text, "an image", allowed)

    return _open_all(texts, source, limits, reservation)


def _open_all(
    given: Sequence[str], source_of: Callable[[str, ImageLimits], Source], limits: ServeLimits, reservation: Reservation
) -> list[Image.Image]:
    limits.check_count(len(given))
    images, left = [], limits.images.max_pixels

    for number, one in enumerate(given, start=1):
        if left <= 0:
            raise InputError(
                f"the images before image {number} have all {limits.images.max_pixels:,} pixels that are allowed"
            )
        allowed = replace(limits.images, max_pixels=left)
        try:
            source = source_of(one, allowed)
            image = load_image(source, limits=allowed, decoder=limits.decoder, reserve=reservation.change)
        except InputError as error:
            raise InputError(f"image {number}: {error}") from error
        left -= image.width * image.height
        images.append(image)
    return images


def _source_of(url: str, limits: ServeLimits) -> Source:
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https") and not limits.allow_urls:
        raise InputError("this server downloads no images; send them as data: URLs")
    if scheme in ("data", "http", "https"):
        return url
    if scheme == "file":
        return _inside(url, limits.image_folder)
    raise InputError("the url must begin with data:, http:// or https://; images in base64 go into a data: URL")


def _inside(url: str, folder: Path | None) -> Path:
    """Return the file of a file: URL, which must be in the folder, with links followed."""
    if folder is None:
        raise InputError("this server opens no file:// addresses; send the image as a data: URL")
    try:
        path = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a loop of links
        inside = False
    if not inside:
        raise InputError("the file:// address leaves the folder that this server reads images from")
    return path
