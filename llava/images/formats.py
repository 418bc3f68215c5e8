"""The image formats that are decoded, and what an image costs as its header says.

In: the first bytes of a file, or all of them. Out: an `ImageHeader`: format, size, and the memory and time that decoding may
take; or an `InputError`. Nothing is decoded here, and Pillow is not imported: a process that only reads headers runs no decoder
over untrusted bytes. Decoding is in decode.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llava.errors import InputError
from llava.images.download import ImageLimits

BYTES_PER_PIXEL = 4  # of a decoded image, as Pillow keeps RGB
BASE_SECONDS = 2.0  # of processor time for any image
SECONDS_PER_MEGAPIXEL = 0.15  # several times what the slowest ordinary file takes
MAX_SEGMENTS = 4096  # of a header that is searched
MAX_BLOCKS = 65_536  # of a GIF, of at most 255 bytes each
SMALLEST_TILE = 1024 * 1024  # a TIFF's tile of so many pixels is allowed however small the image is
TILE_FACTOR = 4  # and one of so many times the image's pixels

Size = tuple[int, int]
# Returns the size, and the bytes that decoding takes besides; None: the header does not tell.
HeaderReader = Callable[[bytes], "tuple[Size, int] | None"]


class ImageFormat(NamedTuple):
    """A format that is decoded. `bytes_per_pixel` is the memory at the peak, the result included, as measured."""

    name: str  # Pillow's
    what: str  # for messages
    start: re.Pattern[bytes]
    read: HeaderReader
    bytes_per_pixel: int
    package: str = ""  # reads it where Pillow does not
    module: str = ""
    register: str = ""  # a function of the module to call; else its import suffices


class RefusedFormat(NamedTuple):
    """A format that is known and not decoded."""

    what: str
    start: re.Pattern[bytes]
    is_picture: bool = True  # not a document that may show anything
    remedy: str = "which is not decoded here; save it as PNG or JPEG"


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about its image before anything is decoded."""

    format: ImageFormat
    width: int
    height: int
    decode_bytes: int  # memory at the peak, the result included

    @property
    def num_pixels(self) -> int:
        return self.width * self.height

    @property
    def decode_seconds(self) -> float:
        """The processor time that decoding may take."""
        return BASE_SECONDS + SECONDS_PER_MEGAPIXEL * self.num_pixels / 1e6


def read_header(data: bytes, name: str, limits: ImageLimits) -> ImageHeader:
    """Return what a file says about its image. `name` is for messages.

    Raises:
        InputError: the file is no image of a format that is decoded, or its image is larger than the limits allow.
    """
    if not data:
        raise InputError(f"{name} is empty.")
    kind = next((item for item in FORMATS if item.start.match(data)), None)
    if kind is None:
        raise InputError(_unknown(data, name))
    try:
        found = kind.read(data)
    except _TileError:
        raise InputError(f"{name} is a broken image: its tiles are far larger than the whole image.") from None
    except (struct.error, LookupError, ValueError):
        raise InputError(f"{name} is a broken image: its header is cut off or malformed.") from None
    if found is None:  # only in formats whose size is not at a fixed place: the most that is allowed is reserved
        side = int(limits.max_pixels**0.5)
        return ImageHeader(kind, side, side, kind.bytes_per_pixel * side * side)
    (width, height), more = found
    if width * height > limits.max_pixels:
        raise too_many_pixels(name, width, height, limits)
    if not (width and height):
        raise InputError(f"{name} has {width}x{height} pixels; there is nothing to see.")
    return ImageHeader(kind, width, height, kind.bytes_per_pixel * width * height + more)


def too_many_pixels(name: str, width: int, height: int, limits: ImageLimits) -> InputError:
    return InputError(
        f"{name} has {width}x{height} pixels, more than the {limits.max_pixels:,} allowed; make it smaller first."
    )


def looks_like_image(data: bytes) -> bool:
    """Whether bytes begin like an image, of a format that can be read or that an error would name."""
    return any(item.start.match(data) for item in FORMATS) or any(
        item.is_picture and item.start.match(data) for item in REFUSED_FORMATS
    )


def _unknown(data: bytes, name: str) -> str:
    refused = next((item for item in REFUSED_FORMATS if item.start.match(data)), None)
    if refused is not None:
        return f"{name} is {refused.what}, {refused.remedy}."
    known = ", ".join(item.name for item in FORMATS)
    return f"{name} is not an image in a known format ({known})."


# Headers


class _TileError(Exception):
    """A tile that takes far more memory than its image."""


def _read_png(data: bytes) -> tuple[Size, int]:
    if data[12:16] != b"IHDR":
        raise ValueError
    return struct.unpack_from(">II", data, 16), 0


def _read_bmp(data: bytes) -> tuple[Size, int]:
    width, height = struct.unpack_from("<HH" if data[14] == 12 else "<ii", data, 18)
    return (abs(width), abs(height)), 0


def _read_gif(data: bytes) -> tuple[Size, int]:
    """Return the size of the screen, or of the first frame where that sticks out of it."""
    width, height = struct.unpack_from("<HH", data, 6)
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    is_extension = False
    for _ in range(MAX_BLOCKS):
        kind = data[place]
        if is_extension:
            is_extension, place = kind > 0, place + 1 + kind
        elif kind == 0x2C:
            left, top, across, down = struct.unpack_from("<HHHH", data, place + 1)
            return (max(width, left + across), max(height, top + down)), 0
        else:
            is_extension = kind == 0x21  # any other byte is passed over, as readers do
            place += 2 if is_extension else 1
    return (width, height), 0


def _read_webp(data: bytes) -> tuple[Size, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return (1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")), 0
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)), 0
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return (width & 0x3FFF, height & 0x3FFF), 0
    raise ValueError


_MARKER = re.compile(rb"\xff+[^\xff]", re.DOTALL)


def _read_jpeg(data: bytes) -> tuple[Size, int]:
    """Return the size; a progressive image keeps all of its coefficients besides."""
    place = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None:
            break
        place = found.end() - 1
        marker = data[place]
        if marker in (0xD9, 0xDA):  # the end, or the pixels
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, num_components = struct.unpack_from(">HHB", data, place + 4)
            if num_components > 4:
                raise ValueError
            return (width, height), 2 * num_components * width * height if marker & 3 == 2 else 0
        stands_alone = marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8
        place += 1 if stands_alone else 1 + struct.unpack_from(">H", data, place + 1)[0]
    raise ValueError


def _read_tiff(data: bytes) -> tuple[Size, int]:
    """Return the size of the first image; a tile is decoded as a whole, whatever part of the image it covers."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"+\0", b"\0+"):  # BigTIFF
        start, number, entry, inline, place = "Q", "Q", 20, 12, 8
    else:
        start, number, entry, inline, place = "I", "H", 12, 8, 4
    place = struct.unpack_from(order + start, data, place)[0]
    count = struct.unpack_from(order + number, data, place)[0]
    if count > MAX_SEGMENTS:
        raise ValueError
    place += struct.calcsize(number)
    values: dict[int, int] = {}
    for first in range(place, place + count * entry, entry):
        tag, kind = struct.unpack_from(order + "HH", data, first)
        letter = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag in (256, 257, 322, 323) and letter is not None:
            value = struct.unpack_from(order + letter, data, first + inline)[0]
            values[tag] = max(values.get(tag, 0), value)  # readers differ in which of two they take
    size = values[256], values[257]
    num_tile_pixels = values.get(322, 0) * values.get(323, 0)
    if num_tile_pixels > max(SMALLEST_TILE, TILE_FACTOR * size[0] * size[1]):
        raise _TileError
    return size, BYTES_TIFF * num_tile_pixels


def _read_boxes(data: bytes) -> tuple[Size, int] | None:
    """Return the largest size that AVIF or HEIF names for one of its images, which may be tiles or thumbnails."""
    sizes, place = [], 0
    for _ in range(MAX_SEGMENTS):
        place = data.find(b"ispe", place) + 4
        if place < 4 or place + 12 > len(data):
            break
        sizes.append(struct.unpack_from(">II", data, place + 4))
    return (max(sizes, key=lambda size: size[0] * size[1]), 0) if sizes else None


def _starts(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


# Bytes for a pixel at the peak: what the decoder allocates, the image, the same as RGB, and three to hand it over. WebP and
# AVIF decode into buffers of their own, which are copied twice.
BYTES_TIFF = 20
FORMATS = (
    ImageFormat("JPEG", "a JPEG image", _starts(rb"\xff\xd8\xff"), _read_jpeg, 12),
    ImageFormat("PNG", "a PNG image", _starts(rb"\x89PNG\r\n\x1a\n"), _read_png, 16),
    ImageFormat("GIF", "a GIF image", _starts(rb"GIF8[79]a"), _read_gif, 16),
    ImageFormat("BMP", "a BMP image", _starts(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"), _read_bmp, 16),
    ImageFormat("WEBP", "a WebP image", _starts(rb"RIFF.{4}WEBP"), _read_webp, 20),
    ImageFormat("TIFF", "a TIFF image", _starts(rb"II[*+]\0|MM\0[*+]"), _read_tiff, BYTES_TIFF),
    ImageFormat(
        "AVIF",
        "an AVIF image",
        _starts(rb".{4}ftyp(?:avi[fs]|m[is]f1.{4}(?:.{4}){0,6}?avif)"),
        _read_boxes,
        32,
        "pillow-avif-plugin",
        "pillow_avif",
    ),
    ImageFormat(
        "HEIF",
        "a HEIC photograph",
        _starts(rb".{4}ftyp(?:he[iv][cmsx]|m[is]f1)"),
        _read_boxes,
        32,
        "pillow-heif",
        "pillow_heif",
        "register_heif_opener",
    ),
)
# Their decoders hold the interpreter for minutes, are written in Python, start programs, or take memory that no header tells.
REFUSED_FORMATS = (
    RefusedFormat("a JPEG 2000 image", _starts(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    RefusedFormat("a JPEG XL image", _starts(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    RefusedFormat("an icon file (ICO)", _starts(rb"\0\0[\x01\x02]\0[^\0]\0")),
    RefusedFormat("a QOI image", _starts(rb"qoif")),
    RefusedFormat("a PBM, PGM, PPM, PAM or PFM image", _starts(rb"P[1-7Ff]\s+[\d#W-]")),
    RefusedFormat("a Photoshop document", _starts(rb"8BPS\0\x01")),
    RefusedFormat("a DDS texture", _starts(rb"DDS \x7c\0\0\0")),
    RefusedFormat("an Apple icon file (ICNS)", _starts(rb"icns\0")),
    RefusedFormat("a FITS image", _starts(rb"SIMPLE  =")),
    RefusedFormat("a PostScript file", _starts(rb"%!PS|\xc5\xd0\xd3\xc6"), is_picture=False),
    RefusedFormat("a PDF document", _starts(rb"%PDF-"), is_picture=False),
    RefusedFormat(
        "an SVG drawing", _starts(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,400}?|<!--.{0,400}?)?<svg[\s>]"), is_picture=False
    ),
    *(
        RefusedFormat(f"a video ({what})", _starts(start), is_picture=False, remedy="not an image; give it as a video")
        for what, start in (
            ("MP4 or QuickTime", rb".{4}ftyp(?:isom|mp4[12]|qt  |M4V |iso[2-6]|avc1)"),
            ("WebM or Matroska", rb"\x1a\x45\xdf\xa3"),
            ("AVI", rb"RIFF.{4}AVI "),
        )
    ),
)
