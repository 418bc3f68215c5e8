"""Named colours and backgrounds.

In: a random generator. Out: colours with their names, colours that stand out from others, painted backgrounds.
A name covers a small box of colours; the boxes of different names keep apart, so that a name is never in doubt.
"""

from __future__ import annotations

import colorsys
import random

import numpy as np
from PIL import Image

RGB = tuple[int, int, int]

# name -> (hue degrees, saturation, value), each a range
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.85, 1.0), (0.78, 1.0)),
    "orange": ((24, 33), (0.9, 1.0), (0.95, 1.0)),
    "yellow": ((51, 59), (0.8, 1.0), (0.93, 1.0)),
    "green": ((105, 145), (0.65, 1.0), (0.45, 0.8)),
    "blue": ((212, 236), (0.75, 1.0), (0.7, 1.0)),
    "purple": ((268, 286), (0.6, 0.95), (0.45, 0.75)),
    "pink": ((322, 345), (0.28, 0.55), (0.95, 1.0)),
    "brown": ((18, 30), (0.65, 0.9), (0.33, 0.52)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.1)),
    "white": ((0, 360), (0.0, 0.03), (0.97, 1.0)),
    "grey": ((0, 360), (0.0, 0.05), (0.42, 0.62)),
}
NAMES = tuple(COLOURS)


def draw_colour(rng: random.Random, name: str | None = None) -> tuple[str, RGB]:
    name = name or rng.choice(NAMES)
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLOURS[name])
    return name, to_rgb(hue, saturation, value)


def to_rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def difference(a: RGB, b: RGB) -> float:
    """How far apart two colours look, weighted like brightness; black and white are 255 apart."""
    return sum(w * (x - y) ** 2 for w, x, y in zip((0.35, 0.45, 0.2), a, b, strict=True)) ** 0.5


def brightness(rgb: RGB) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def draw_contrast(rng: random.Random, rgb: RGB, *, least: float = 90) -> RGB:
    """Any colour that is clearly lighter or darker than `rgb`."""
    while True:
        value = rng.choice((0.0, 1.0)) if rng.random() < 0.25 else rng.uniform(0.1, 1.0)
        other = to_rgb(rng.uniform(0, 360), rng.random() ** 2, value)
        if abs(brightness(other) - brightness(rgb)) > least:
            return other


def paint_background(rgb: RGB, texture: str, side: int, *, seed: int) -> Image.Image:
    """A square of about one colour: plain, or with a gradient, noise or faint stripes (never more than +-14)."""
    if texture == "plain":
        return Image.new("RGB", (side, side), rgb)
    noise = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    angle = noise.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None, :]
    if texture == "gradient":
        delta = slope * 10
    elif texture == "stripes":
        delta = np.sin(slope * noise.uniform(8, 40)) * noise.uniform(3, 8)
    else:
        small = noise.normal(0, noise.uniform(2, 7), (side // 2, side // 2)).astype(np.float32)
        delta = np.repeat(np.repeat(small, 2, 0), 2, 1)
    pixels = np.asarray(rgb, dtype=np.float32) + np.clip(delta, -14, 14)[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
