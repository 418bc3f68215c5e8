"""Named colours and backgrounds.

In: a random generator. Out: colours with their names, colours that stand out from others, painted backgrounds.
A name covers a few small boxes of colours, among them those that image programs and web pages give that name; the boxes of
different names keep apart, so that a name is never in doubt.
"""

from __future__ import annotations

import colorsys
import functools
import random

import numpy as np
from PIL import Image

RGB = tuple[int, int, int]
Range = tuple[float, float]

# name -> boxes of (hue degrees, saturation, value), each a range; the first is drawn most
COLOURS: dict[str, tuple[tuple[Range, Range, Range], ...]] = {
    "red": (((-8, 8), (0.82, 1.0), (0.76, 1.0)), ((346, 353), (0.86, 0.95), (0.82, 0.92))),
    "orange": (((24, 39.5), (0.88, 1.0), (0.94, 1.0)),),
    "yellow": (((50, 61), (0.75, 1.0), (0.92, 1.0)),),
    "green": (((98, 148), (0.6, 1.0), (0.4, 0.82)), ((110, 130), (0.8, 1.0), (0.82, 1.0)),
        ((112, 128), (0.36, 0.55), (0.85, 0.95))),
    "blue": (((212, 241), (0.72, 1.0), (0.68, 1.0)), ((198, 214), (0.45, 0.75), (0.88, 1.0)),
        ((236, 241), (0.9, 1.0), (0.45, 0.6))),
    "purple": (((268, 301), (0.6, 1.0), (0.45, 0.72)), ((268, 280), (0.6, 0.85), (0.75, 0.9))),
    "pink": (((322, 352), (0.24, 0.58), (0.95, 1.0)), ((324, 334), (0.58, 0.92), (0.96, 1.0))),
    "brown": (((18, 30), (0.62, 0.9), (0.33, 0.58)), ((0, 5), (0.7, 0.78), (0.56, 0.66)),
        ((17, 22), (0.68, 0.76), (0.58, 0.64))),
    "black": (((0, 360), (0.0, 0.3), (0.0, 0.1)),),
    "white": (((0, 360), (0.0, 0.03), (0.97, 1.0)),),
    "grey": (((0, 360), (0.0, 0.05), (0.42, 0.66)), ((0, 360), (0.0, 0.03), (0.66, 0.78))),
}  # fmt: skip
NAMES = tuple(COLOURS)
LEAST = 40  # a colour this different from its surroundings stands out
TEXTURES = ("plain", "plain", "gradient", "noise", "stripes", "grid", "specks", "blots", "scratches", "checks", "waves")
HELD_TEXTURES = ("plain", "paper", "dots", "vignette")


def draw_colour(rng: random.Random, name: str | None = None, *, apart_from: RGB | None = None) -> tuple[str, RGB]:
    """A shade of a name; one that stands out from a colour, if there is one."""
    name = name or rng.choice(NAMES)
    rgb = (0, 0, 0)
    for _ in range(12):
        boxes = COLOURS[name]
        box = boxes[0] if rng.random() < 0.6 else rng.choice(boxes)
        rgb = to_rgb(*(rng.uniform(*bounds) for bounds in box))
        if apart_from is None or difference(rgb, apart_from) > LEAST:
            break
    return name, rgb


def stands_out(name: str, background: RGB) -> bool:
    """Whether half of its shades, or more, differ clearly from the background."""
    return sum(difference(shade, background) > LEAST for shade in shades(name)) >= 3


@functools.cache
def shades(name: str) -> tuple[RGB, ...]:
    return tuple(draw_colour(random.Random(number), name)[1] for number in range(6))


def to_rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def difference(a: RGB, b: RGB) -> float:
    """How far apart two colours look, weighted like brightness; black and white are 255 apart."""
    return (0.35 * (a[0] - b[0]) ** 2 + 0.45 * (a[1] - b[1]) ** 2 + 0.2 * (a[2] - b[2]) ** 2) ** 0.5


def brightness(rgb: RGB) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def draw_contrast(rng: random.Random, rgb: RGB, *, least: float = 90) -> RGB:
    """Any colour that is clearly lighter or darker than `rgb`."""
    while True:
        value = rng.choice((0.0, 1.0)) if rng.random() < 0.25 else rng.uniform(0.1, 1.0)
        other = to_rgb(rng.uniform(0, 360), rng.random() ** 2, value)
        if abs(brightness(other) - brightness(rgb)) > least:
            return other


def paint_background(rgb: RGB, texture: str, side: int, *, seed: int) -> np.ndarray:
    """(side, side, 3) float: about one colour, plain or with a texture that never differs from it by more than 14,
    a few lines and dots of clutter by more than 30."""
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = rgb
    if texture == "plain":
        return canvas
    return np.clip(canvas + delta(texture, side, np.random.default_rng(seed))[:, :, None], 0, 255)


def delta(texture: str, side: int, noise: np.random.Generator) -> np.ndarray:
    """(side, side): how much lighter or darker each pixel is."""
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    angle = noise.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None, :]
    flat = np.zeros((side, side), np.float32)
    sign = noise.choice((-1.0, 1.0))
    if texture == "gradient":
        return slope * noise.uniform(4, 14)
    if texture == "stripes":
        return np.sin(slope * noise.uniform(8, 40)) * noise.uniform(3, 10)
    if texture == "noise":
        small = noise.normal(0, noise.uniform(2, 7), (side // 2 + 1, side // 2 + 1)).astype(np.float32)
        return np.clip(np.repeat(np.repeat(small, 2, 0), 2, 1)[:side, :side], -14, 14)
    if texture == "grid":
        step = int(noise.integers(max(4, side // 14), side // 4))
        flat[noise.integers(step) :: step] = 1
        flat[:, noise.integers(step) :: step] = 1
        return flat * sign * noise.uniform(8, 30)
    if texture == "specks":
        flat[noise.random((side, side)) < noise.uniform(0.002, 0.02)] = sign * noise.uniform(15, 30)
        return flat
    if texture == "blots":
        coarse = noise.normal(0, 1, (5, 5)).astype(np.float32)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        return np.clip(np.asarray(image) * 7, -14, 14)
    if texture == "scratches":
        for _ in range(int(noise.integers(2, 7))):
            start, end = noise.uniform(0, side, 2), noise.uniform(0, side, 2)
            count = 2 * side
            points = (start + np.linspace(0, 1, count)[:, None] * (end - start)).astype(int)
            flat[points[:, 0], points[:, 1]] = sign * noise.uniform(10, 30)
        return flat
    if texture == "checks":
        step = int(noise.integers(max(4, side // 16), side // 3))
        rows = np.arange(side) // step
        return ((rows[:, None] + rows[None, :]) % 2).astype(np.float32) * sign * noise.uniform(5, 14)
    if texture == "waves":
        bend = np.sin(ramp[None, :] * noise.uniform(4, 12)) * noise.uniform(0.02, 0.1)
        return np.sin((ramp[:, None] + bend) * noise.uniform(10, 40)) * noise.uniform(3, 10)
    if texture == "paper":
        fine = noise.normal(0, 2.0, (side, side)).astype(np.float32)
        return np.clip(fine + np.roll(fine, 1, 0) + np.roll(fine, 1, 1) + slope * 4, -14, 14)
    if texture == "dots":
        step = max(5, side // 12)
        flat[step // 2 :: step, step // 2 :: step] = sign * 26
        return flat
    if texture == "vignette":
        return -12 * (ramp[:, None] ** 2 + ramp[None, :] ** 2) / 2
    raise ValueError(f"unknown texture {texture!r}")
