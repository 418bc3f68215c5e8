"""Images for tests: small ones, and files that claim more than they hold."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.images.io import load_image

HERE = ImageLimits(allow_private_hosts=True, timeout_s=60)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


PNG = encoded(gradient())


def fails(source: object, *parts: str, limits: ImageLimits = HERE) -> str:
    with pytest.raises(InputError) as caught:
        load_image(source, limits=limits)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def png_of(width: int, height: int) -> bytes:
    """A tiny file that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
