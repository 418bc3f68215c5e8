"""Decode an image that formats.py has let pass.

In: the bytes of a file and their `ImageHeader`, or an opened Pillow image. Out: a Pillow image, RGB; every failure is an
`InputError` of one sentence. This runs in the process of a program for its own user, and for untrusted images in processes
of its own (decoder_pool.py). Pillow is imported when it is needed.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from llava.errors import InputError
from llava.images.formats import BYTES_PER_PIXEL, ImageFormat, ImageHeader

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Reserve = Callable[[int], None]
"""Called with a number of bytes before they are allocated, and with a negative one when they are free again; may raise."""


class ImageDecoder(Protocol):
    """Decodes a file to RGB; `name` is for messages, `upright` turns the image as its EXIF orientation says."""

    def __call__(
        self, data: bytes, header: ImageHeader, name: str, *, upright: bool, reserve: Reserve
    ) -> Image.Image: ...


def decode_here(data: bytes, header: ImageHeader, name: str, *, upright: bool, reserve: Reserve) -> Image.Image:
    """Decode in this process."""
    with reserved(reserve, header.decode_bytes, BYTES_PER_PIXEL * header.num_pixels):
        return decode(data, header, name, upright=upright)


@contextmanager
def reserved(reserve: Reserve, num_bytes: int, num_kept: int) -> Iterator[None]:
    """Reserve what decoding may take, the result included; at the block's end only what is kept stays reserved."""
    reserve(num_bytes)
    kept = 0
    try:
        yield
        kept = num_kept
    finally:
        reserve(kept - num_bytes)


def decode(data: bytes, header: ImageHeader, name: str, *, upright: bool) -> Image.Image:
    """Decode the first frame of a file.

    Raises:
        InputError: it is broken, or larger than its header says; there is no decoder, or not the memory for it.
    """
    with told(name, size=f", which has {header.width}x{header.height} pixels"):
        image = open_image(data, header, name)
        if image.width * image.height > header.num_pixels:
            raise InputError(f"{name} is a broken image: it is larger than its header says.")
        return to_upright_rgb(image, upright=upright)


def convert_opened(image: Image.Image, name: str, *, upright: bool) -> Image.Image:
    """Return RGB of an image that the caller has opened."""
    with told(name, size=f", which has {image.width}x{image.height} pixels"):
        return to_upright_rgb(image, upright=upright)


def to_upright_rgb(image: Image.Image, *, upright: bool) -> Image.Image:
    image.load()
    if upright and image.getexif().get(0x0112, 1) != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def open_image(data: bytes, header: ImageHeader, name: str) -> Image.Image:
    """Open with the one decoder that the first bytes call for."""
    from PIL import Image

    kind = header.format
    _import_decoder(kind)
    if kind.name not in Image.OPEN:
        raise InputError(
            f"{name} is {kind.what}, which cannot be read here; install a decoder (pip install {kind.package}), or save it as "
            "JPEG or PNG."
        )
    try:
        return Image.open(io.BytesIO(data), formats=[kind.name])
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} is a broken image: its header is malformed.") from None


def _import_decoder(kind: ImageFormat) -> None:
    """Import Pillow's reader of a format, or where Pillow has none and its package is installed, that one."""
    from PIL import Image

    if kind.name not in Image.OPEN:
        with suppress(ImportError):
            importlib.import_module(f"PIL.{kind.name.title().replace('Webp', 'WebP')}ImagePlugin")
    if kind.name not in Image.OPEN and kind.module:
        with suppress(ImportError):
            getattr(importlib.import_module(kind.module), kind.register, lambda: None)()


@contextmanager
def told(name: str, what: str = "image", size: str = "") -> Iterator[None]:
    """Turn every error of a decoder into a sentence, and suppress Pillow's warnings.

    They are about sizes, for which our own limit holds, and about faults that it can read past. Warning filters belong to the
    whole process, and threads that run this together may leave this one behind; so it covers Pillow's modules only.
    `what` is what `name` should be, and `size` are words about it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except InputError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(f"there is not enough memory to decode {name}{size}; make it smaller first.") from error
    except GeneratorExit:
        raise
    except Exception as error:  # Pillow's and FFmpeg's readers raise errors of many types at broken data
        detail = " ".join(str(getattr(error, "strerror", None) or error).split())[:120] or type(error).__name__
        raise InputError(f"{name} is a broken {what}: {detail.rstrip('.')}.") from error


class OutOfMemoryError(InputError):
    """Decoding an image took more memory than there is, or than it may take."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB as Pillow does: transparency is dropped, not blended with a background.

    Only grey values of more than 8 bits differ: they are scaled, where Pillow would clip nearly all of the image to white.
    """
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        import numpy as np

        return _from_deep_grey(np.asarray(image))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's advice to do this
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"an image of mode {image.mode} cannot be shown as RGB: {error}; convert it first.") from error


def _from_deep_grey(values: np.ndarray) -> Image.Image:
    """Convert greys of 16 or 32 bits to 8-bit RGB, the brightest of their depth to white.

    Integers are of the fewest bits among 8, 10, 12, 14 and 16 that hold the highest one, since files of 10 to 14 bits, as
    cameras and scanners make them, do not say so. Floats are shares of 1 where none is higher, else values of 8 bits.
    """
    import numpy as np
    from PIL import Image

    low, high = values.min(), values.max()
    is_float = values.dtype.kind == "f"
    highest = 255 if is_float else 65535
    if not (low >= 0 and high <= highest):  # not (...): a NaN is outside too
        raise InputError(
            f"an image has grey values from {low:g} to {high:g}, outside 0 to {highest}; convert it to 8 bits first."
        )
    if is_float:
        scaled = (values * 255).round() if high <= 1 else values
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    return Image.fromarray((values.astype(np.uint32) >> bits - 8).astype(np.uint8)).convert("RGB")
