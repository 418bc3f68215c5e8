"""Open an image.

In: a path, bytes, an http(s) or data: URL, or a Pillow image. Out: a Pillow image, RGB; every failure is an `InputError`
of one sentence. Input is untrusted: sizes are checked before anything is decoded, only common formats are tried, and
downloads (download.py) are limited in size, time and addresses. Pixels for a model are made in mm_utils.py. Pillow
is imported when it is needed.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llava.errors import InputError
from llava.images.download import DEFAULT_LIMITS, ImageLimits, fetch, public_name, too_large

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Formats tried, the usual ones first: the rest need all of Pillow's plugins. Other formats of Pillow are left out: some
# start programs (EPS), some accept almost any bytes (TGA).
USUAL_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
OTHER_FORMATS = ("WEBP", "TIFF", "AVIF", "JPEG2000", "ICO", "QOI", "DIB", "HEIF", "JXL")


class AddedFormat(NamedTuple):
    """A format that Pillow reads with another package, or in some of its builds only."""

    name: str
    what: str  # for messages
    start: re.Pattern[bytes]
    package: str
    module: str
    register: str = ""  # a function of the module to call; else its import suffices


ADDED_FORMATS = (
    AddedFormat(
        "AVIF",
        "an AVIF image",
        re.compile(rb".{4}ftyp(?:avi[fs]|m[is]f1.{4}(?:.{4}){0,6}?avif)", re.DOTALL),
        "pillow-avif-plugin",
        "pillow_avif",
    ),
    AddedFormat(
        "HEIF",
        "a HEIC photograph",
        re.compile(rb".{4}ftyp(?:he[iv][cmsx]|m[is]f1)", re.DOTALL),
        "pillow-heif",
        "pillow_heif",
        "register_heif_opener",
    ),
    AddedFormat("JXL", "a JPEG XL image", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "pillow-jxl-plugin", "pillow_jxl"),
)
_IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*|P[1-7Ff]\s+[\d#]|\0\0\x01\0|qoif|"
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")


def load_image(
    source: str | Path | bytes | Image.Image,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    upright: bool = True,
    reserve: Callable[[int], None] = lambda num_pixels: None,
) -> Image.Image:
    """Open an image as Pillow RGB; of several frames, the first.

    Args:
        source: a path, bytes, an http(s) or data: URL, or a Pillow image.
        upright: turn a photograph as its EXIF orientation says, as every viewer does. The original LLaVA did not;
            switch it off to repeat its numbers exactly.
        reserve: called with the number of pixels before memory is allocated for them; may raise.

    Raises:
        InputError: there is no such image, it is broken, or it exceeds a limit.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _decoded(source, "the image given", limits, upright, reserve)
    data, name = _read(source, limits)
    return _decoded(_opened(data, name), name, limits, upright, reserve)


def _read(source: str | Path | bytes, limits: ImageLimits) -> tuple[bytes, str]:
    """Read a source: its bytes, and its name for messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = "the image given as bytes"
        if memoryview(source).nbytes > limits.max_bytes:
            raise too_large(name, memoryview(source).nbytes, limits)
        return bytes(source), name
    if isinstance(source, Path):
        return _read_file(source, limits), repr(str(source))
    if not isinstance(source, str):
        raise InputError(f"an image is a path, a URL, bytes or a Pillow image, not {type(source).__name__}.")
    scheme = _SCHEME.match(source)
    kind = scheme[1].lower() if scheme else ""
    if kind in ("http", "https"):
        return fetch(source, limits), repr(public_name(source))
    if kind == "data":
        return _read_data_url(source, limits), "the image in the data: URL"
    if "://" in source and kind:
        raise InputError(f"an image cannot be read from a {kind}:// address; use a path, http(s):// or data:.")
    return _read_file(Path(source), limits), repr(_short(source))


def _read_file(path: Path, limits: ImageLimits) -> bytes:
    name = repr(_short(str(path)))
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder, not an image; name a file in it.")
        if path.exists() and not path.is_file():
            raise InputError(f"{name} is not an ordinary file.")
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no image file {name}.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the image file {name} cannot be read: {reason}.") from error
    if len(data) > limits.max_bytes:
        raise too_large(name, path.stat().st_size, limits)
    return data


def _read_data_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise InputError("the data: URL has no comma, after which its content would begin.")
    if header.lower().replace(" ", "").endswith(";base64"):
        return decode_base64(
            urllib.parse.unquote_to_bytes(body) if "%" in body else body, "the image in the data: URL", limits
        )
    if len(body) > 3 * limits.max_bytes:  # three characters for a byte at most
        raise too_large("the image in the data: URL", len(body) // 3, limits)
    return urllib.parse.unquote_to_bytes(body)


def decode_base64(text: str | bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Decode base64 of either alphabet; line breaks and missing padding are accepted, any other fault is an error."""
    size = len(text) * 3 // 4
    if size > limits.max_bytes + 1024:
        raise too_large(name, size, limits)
    try:
        plain = text.encode("ascii") if isinstance(text, str) else bytes(text)
        plain = b"".join(plain.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InputError(f"{name} is not valid base64.") from None


def _opened(data: bytes, name: str) -> Image.Image:
    """Open an image and read no more than its header."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise InputError(f"{name} is empty.")
    added = next((item for item in ADDED_FORMATS if item.start.match(data)), None)
    for formats, import_plugins in ((USUAL_FORMATS, Image.preinit), (OTHER_FORMATS, partial(_import_plugins, added))):
        import_plugins()
        try:
            with _quiet_pillow():
                return Image.open(io.BytesIO(data), formats=[item for item in formats if item in Image.OPEN])
        except UnidentifiedImageError:
            continue
        except Image.DecompressionBombError as error:  # Pillow's own limit; its message names the number of pixels
            number = re.search(r"\d+", str(error))
            pixels = f"{int(number[0]):,}" if number else "too many"
            raise InputError(
                f"{name} has {pixels} pixels, more than can be decoded safely; make it smaller first."
            ) from None
        except Exception as error:  # Pillow's readers raise errors of many types at a broken header
            raise _broken(name, error) from error
    if added is not None:
        raise InputError(
            f"{name} is {added.what}, which cannot be read here; install a decoder (pip install {added.package}), or save it "
            "as JPEG or PNG."
        )
    known = ", ".join(USUAL_FORMATS + OTHER_FORMATS[:3])
    raise InputError(f"{name} is not an image in a known format ({known}, ...).")


def _import_plugins(added: AddedFormat | None) -> None:
    """Import all of Pillow's plugins, and where Pillow lacks the format and its package is installed, that one."""
    from PIL import Image

    Image.init()
    if added is not None and added.name not in Image.OPEN:
        with suppress(ImportError):
            plugin = importlib.import_module(added.module)
            getattr(plugin, added.register, lambda: None)()


def looks_like_image(data: bytes) -> bool:
    """Whether bytes begin like an image, of a format that can be read or that an error would name."""
    return bool(_IMAGE_START.match(data)) or any(item.start.match(data) for item in ADDED_FORMATS)


def _decoded(
    image: Image.Image, name: str, limits: ImageLimits, upright: bool, reserve: Callable[[int], None]
) -> Image.Image:
    """Decode an opened image to RGB."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise InputError(
            f"{name} has {width}x{height} pixels, more than the {limits.max_pixels:,} allowed; make it smaller first."
        )
    if not (width and height):
        raise InputError(f"{name} has {width}x{height} pixels; there is nothing to see.")
    reserve(width * height)
    try:
        with _quiet_pillow():
            image.load()
            if upright and image.getexif().get(0x0112, 1) != 1:
                from PIL import ImageOps

                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
    except InputError:
        raise
    except Exception as error:  # and at broken data
        raise _broken(name, error) from error


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings: about sizes, for which our own limit holds, and about faults that it can read past.

    Warning filters belong to the whole process, and threads that run this together may leave this one behind; so it
    covers Pillow's modules only.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB as Pillow does: transparency is dropped, not blended with a background.

    Only grey values of more than 8 bits differ: 16 bits lose their low 8, where Pillow would clip nearly all of the image
    to white; floats must lie in 0 to 255.
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
    """Convert greys of 16 or 32 bits to 8-bit RGB; 32-bit values that all lie in 0 to 255 are taken as they are."""
    import numpy as np
    from PIL import Image

    low, high = values.min(), values.max()
    highest = 255 if values.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= highest):  # not (...): a NaN is outside too
        raise InputError(
            f"an image has grey values from {low:g} to {high:g}, outside 0 to {highest}; convert it to 8 bits first."
        )
    shift = 0 if values.dtype.itemsize == 4 and high <= 255 else 8
    return Image.fromarray((values.astype(np.uint32) >> shift).astype(np.uint8)).convert("RGB")


def _broken(name: str, error: Exception) -> InputError:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return InputError(f"{name} is a broken image: {detail.rstrip('.')}.")


def _short(name: str) -> str:
    return name if len(name) <= 200 else name[:100] + "..." + name[-60:]
