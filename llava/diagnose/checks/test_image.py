"""The image that checks look at: drawn, so that it needs no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def drawing(*, inverted: bool = False) -> Image.Image:
    """An image with something in it: coloured shapes on white, or its negative."""
    from PIL import Image, ImageChops, ImageDraw

    image = Image.new("RGB", (320, 240), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((20, 20, 150, 150), fill="red")
    pen.rectangle((180, 60, 300, 200), fill="blue")
    pen.polygon([(60, 230), (120, 160), (170, 230)], fill="green")
    return ImageChops.invert(image) if inverted else image
