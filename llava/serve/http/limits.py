"""What a server grants to strangers: sizes, counts, time, addresses, and who may ask at all.

In: limits, and what came with a request: an Authorization header, image addresses. Out: yes or no, and opened images, or
an `InputError`. Bytes of the body and the door itself are middleware.py; downloads obey images/download.py.
"""

from __future__ import annotations

import hashlib
import hmac
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.images.io import decode_base64, load_image
from llava.serve.http.memory_budget import BYTES_PER_PIXEL

if TYPE_CHECKING:
    from PIL import Image

    from llava.serve.http.memory_budget import Share

MIN_KEY_LENGTH = 8


@dataclass(frozen=True)
class ServeLimits:
    """What one server allows. The defaults suit a server that is reached by others."""

    max_body_bytes: int = 64 * 2**20  # of a request, images in base64 included
    max_images: int = 16  # of one request
    max_requests: int = 2048  # on their way at once, waiting ones included; one more gets 429
    deadline_s: float = 600.0  # from the first byte of a request to the last of its answer
    images: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=20 * 2**20, timeout_s=10.0))
    allow_urls: bool = True  # download images from http and https addresses
    image_folder: Path | None = None  # file:// addresses are read in this folder; None: nowhere

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_requests", "deadline_s"):
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


def open_images(addresses: Sequence[str], limits: ServeLimits, share: Share) -> list[Image.Image]:
    """Images from data:, http(s): and file: URLs; all of them together have no more pixels than one may have."""
    return _open_all(addresses, lambda url, allowed: _source_of(url, limits), limits, share)


def decode_images(texts: Sequence[str], limits: ServeLimits, share: Share) -> list[Image.Image]:
    """Images of the original protocol: base64, with or without the head of a data: URL."""

    def source(text: str, allowed: ImageLimits) -> Source:
        return text if text.startswith("data:") else decode_base64(text, "an image", allowed)

    return _open_all(texts, source, limits, share)


def _open_all(
    given: Sequence[str], source_of: Callable[[str, ImageLimits], Source], limits: ServeLimits, share: Share
) -> list[Image.Image]:
    limits.check_count(len(given))
    images, left = [], limits.images.max_pixels
    for number, one in enumerate(given, start=1):
        if left <= 0:
            raise InputError(
                f"the images before image {number} have all the {limits.images.max_pixels:,} pixels that are allowed"
            )
        allowed = replace(limits.images, max_pixels=left)
        try:
            source = source_of(one, allowed)
            image = load_image(source, limits=allowed, reserve=lambda count: share.take(BYTES_PER_PIXEL * count))
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
    """The file of a file: URL, which must lie in the folder also after links are followed."""
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


def read_keys(path: str | None, variable: str | None) -> list[str]:
    """Keys from a file, one a line with # for comments, then from an environment variable's value, with commas."""
    keys = []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the file of API keys {path!r} cannot be read: {error}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"the file of API keys {path!r} holds no key; put one on a line")
    return keys + [key.strip() for key in (variable or "").split(",") if key.strip()]


class ApiKeys:
    """The keys that open a server. None at all: it is open."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = []
        for key in keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
                raise InputError(f"an API key needs {MIN_KEY_LENGTH} characters or more, ASCII without spaces")
            self._digests.append(_digest(key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: str | None) -> bool:
        """Whether an Authorization header has one of the keys. The time taken does not depend on which, or how much fits."""
        if not self._digests:
            return True
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and kind.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
