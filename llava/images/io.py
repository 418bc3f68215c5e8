"""Open an image.

In: a path, bytes, an http(s) or data: URL, or a Pillow image. Out: a Pillow image, RGB; every failure is an `InputError`
of one sentence. Input is untrusted: only the formats of formats.py are decoded, sizes are checked before (decode.py), and
downloads (download.py) are limited in size, time and addresses. Programs decode in their own process, servers in others
(decoder_pool.py). Pixels for a model are made in mm_utils.py. Pillow is imported when it is needed.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llava.errors import InputError
from llava.images.decode import ImageDecoder, Reserve, convert_opened, decode_here
from llava.images.download import DEFAULT_LIMITS, ImageLimits, fetch, public_name, too_large
from llava.images.formats import BYTES_PER_PIXEL, read_header, too_many_pixels

if TYPE_CHECKING:
    from PIL import Image

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")


def load_image(
    source: str | Path | bytes | Image.Image,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    upright: bool = True,
    name: str | None = None,
    decoder: ImageDecoder = decode_here,
    reserve: Reserve = lambda num_bytes: None,
) -> Image.Image:
    """Open an image as Pillow RGB; of several frames, the first.

    Args:
        source: a path, bytes, an http(s) or data: URL, or a Pillow image.
        upright: turn a photograph as its EXIF orientation says, as every viewer does. The original LLaVA did not;
            switch it off to repeat its numbers exactly.
        name: what messages call the image; None: as its source does.
        decoder: decodes the bytes: in this process, or a `DecoderPool` for untrusted bytes.
        reserve: called with the number of bytes that decoding may take, before they are allocated, and with a negative number
            once some are free again; may raise.

    Raises:
        InputError: there is no such image, it is broken, of a format that is not decoded, or it exceeds a limit.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        name = name or "the image given"
        if source.width * source.height > limits.max_pixels:
            raise too_many_pixels(name, source.width, source.height, limits)
        if not (source.width and source.height):
            raise InputError(f"{name} has {source.width}x{source.height} pixels; there is nothing to see.")
        reserve(BYTES_PER_PIXEL * source.width * source.height)
        return convert_opened(source, name, upright=upright)
    data, own_name = _read(source, limits)
    name = name or own_name
    return decoder(data, read_header(data, name, limits), name, upright=upright, reserve=reserve)


@contextmanager
def opened_source(source: str | Path | bytes, limits: ImageLimits) -> Iterator[tuple[BinaryIO, str]]:
    """Open a source as a file that seeks, with its name for messages; one on disk is not read into memory."""
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        name = repr(_short(str(source)))
        with _open_file(Path(source), name, limits) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limits.max_bytes:
                raise too_large(name, size, limits)
            yield file, name
    else:
        data, name = _read(source, limits)
        yield io.BytesIO(data), name


def _is_path(source: str) -> bool:
    scheme = _SCHEME.match(source)
    return not scheme or (scheme[1].lower() not in ("http", "https", "data") and "://" not in source)


def _read(source: str | Path | bytes, limits: ImageLimits) -> tuple[bytes, str]:
    """Read a source: its bytes, and its name for messages."""
    what = limits.what
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"the {what} given as bytes"
        if memoryview(source).nbytes > limits.max_bytes:
            raise too_large(name, memoryview(source).nbytes, limits)
        return bytes(source), name
    if isinstance(source, Path):
        return _read_file(source, limits), repr(str(source))
    if not isinstance(source, str):
        raise InputError(f"{limits.an} is a path, a URL, bytes or {limits.opened}, not {type(source).__name__}.")
    scheme = _SCHEME.match(source)
    kind = scheme[1].lower() if scheme else ""
    if kind in ("http", "https"):
        return fetch(source, limits), repr(public_name(source))
    if kind == "data":
        return _read_data_url(source, limits), f"the {what} in the data: URL"
    if "://" in source and kind:
        raise InputError(f"{limits.an} cannot be read from a {kind}:// address; use a path, http(s):// or data:.")
    return _read_file(Path(source), limits), repr(_short(source))


def _read_file(path: Path, limits: ImageLimits) -> bytes:
    name = repr(_short(str(path)))
    with _open_file(path, name, limits) as file:
        try:
            data = file.read(limits.max_bytes + 1)
        except OSError as error:
            raise _unreadable(name, error, limits) from error
    if len(data) > limits.max_bytes:
        raise too_large(name, path.stat().st_size, limits)
    return data


def _open_file(path: Path, name: str, limits: ImageLimits) -> BinaryIO:
    """Open an ordinary file."""
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder, not {limits.an}; name a file in it.")
        if path.exists() and not path.is_file():
            raise InputError(f"{name} is not an ordinary file.")
        return path.open("rb")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no {limits.what} file {name}.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(name, error, limits) from error


def _unreadable(name: str, error: OSError | ValueError, limits: ImageLimits) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"the {limits.what} file {name} cannot be read: {reason}.")


def _read_data_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, body = url[len("data:") :].partition(",")
    name = f"the {limits.what} in the data: URL"
    if not comma:
        raise InputError("the data: URL has no comma, after which its content would begin.")
    if header.lower().replace(" ", "").endswith(";base64"):
        return decode_base64(urllib.parse.unquote_to_bytes(body) if "%" in body else body, name, limits)
    if len(body) > 3 * limits.max_bytes:  # three characters for a byte at most
        raise too_large(name, len(body) // 3, limits)
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


def _short(name: str) -> str:
    return name if len(name) <= 200 else name[:100] + "..." + name[-60:]
