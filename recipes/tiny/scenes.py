"""Drawn scenes: what is in them, and the image.

In: a random generator and what kind of scene is wanted. Out: Scene (one to six things, a background, perhaps a word), and
its image.
Places are fractions of the side, (0, 0) at the top left. Things keep clear of each other, sizes are clearly small or
clearly large, and places stay off the borders between regions, so that questions (questions.py) have one right answer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import lettering
import palette
from lettering import Lettering
from palette import RGB
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "hexagon", "ring", "crescent")
MAX_THINGS = 6
OVERSAMPLE = 3
SMALL, LARGE = (0.082, 0.105), (0.165, 0.225)
# Centres of things: thirds of the side with gaps between, so that "left" and "centre" never touch.
BANDS = ((0.10, 0.30), (0.42, 0.58), (0.70, 0.90))
BACKGROUNDS = ("white", "black", "grey", "yellow", "blue", "green", "pink")


@dataclass(frozen=True)
class Thing:
    """One drawn thing; `radius` is half its width."""

    shape: str
    colour: str
    rgb: RGB
    x: float
    y: float
    radius: float
    angle: float
    outline: RGB | None

    @property
    def size(self) -> str:
        return "small" if self.radius < (SMALL[1] + LARGE[0]) / 2 else "large"

    @property
    def place(self) -> str | None:
        """Which ninth of the image, in words; None near a border between two."""
        return place_name(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str | None  # a colour's name, or None for an unnamed colour
    background_rgb: RGB
    texture: str
    sign: Lettering | None
    seed: int


def band(value: float) -> int | None:
    """0, 1, 2 for left, middle, right (top, middle, bottom); None where it could be two of them."""
    inside = [i for i, (low, high) in enumerate(((0.0, 0.335), (0.385, 0.615), (0.665, 1.0))) if low <= value <= high]
    return inside[0] if inside else None


def place_name(x: float, y: float) -> str | None:
    column, row = band(x), band(y)
    if column is None or row is None:
        return None
    name = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip()
    return name or "centre"


def draw_scene(rng: random.Random, fonts: Path | None = None, *, held: bool = False, with_sign: bool = False) -> Scene:
    """A scene of a random kind: one thing, a few different things, or many alike things to count."""
    kind = rng.choices(("single", "few", "alike", "many"), (0.12, 0.42, 0.28, 0.18))[0]
    num_things = {"single": 1, "few": rng.randint(2, 4), "alike": rng.randint(2, 6), "many": rng.randint(4, 6)}[kind]
    shapes = rng.sample(SHAPES, len(SHAPES) if kind in ("few", "many") else rng.choice((1, 1, 2)))
    if kind in ("few", "many") and rng.random() < 0.3:
        shapes = shapes[:3]
    background, background_rgb = draw_background(rng)
    usable = [c for c in palette.NAMES if stands_out(c, background, background_rgb)]
    colours = rng.sample(usable, min(len(usable), {"alike": rng.choice((1, 2, 2)), "many": 4}.get(kind, 6)))
    sign, top, bottom = place_sign(rng, fonts, background_rgb, held=held) if with_sign else (None, 0.0, 1.0)
    spots = draw_spots(rng, num_things, top, bottom, all_small=with_sign)
    things = tuple(draw_thing(rng, rng.choice(shapes), rng.choice(colours), spot) for spot in spots)
    texture = rng.choice(("plain", "plain", "gradient", "noise", "stripes"))
    return Scene(things, background, background_rgb, texture, sign, rng.randrange(2**31))


def draw_background(rng: random.Random) -> tuple[str | None, RGB]:
    if rng.random() < 0.6:
        name = rng.choices(BACKGROUNDS, (6, 2, 2, 1, 1, 1, 1))[0]
        return palette.draw_colour(rng, name)
    return None, palette.to_rgb(
        rng.uniform(0, 360), rng.uniform(0.02, 0.25), rng.choice((rng.uniform(0.8, 1), rng.uniform(0.1, 0.25)))
    )


def stands_out(colour: str, background: str | None, background_rgb: RGB) -> bool:
    """Every shade of the colour differs clearly from the background."""
    if colour == background:
        return False
    shades = [palette.draw_colour(random.Random(i), colour)[1] for i in range(4)]
    return min(palette.difference(shade, background_rgb) for shade in shades) > 52


@dataclass(frozen=True)
class Spot:
    x: float
    y: float
    radius: float


def draw_spots(rng: random.Random, count: int, top: float, bottom: float, *, all_small: bool) -> list[Spot]:
    """Places for `count` things that do not touch. Crowded scenes have small things only, or one large."""
    while True:
        on_bands = rng.random() < 0.75
        num_large = 0 if all_small else (rng.randint(0, count) if count <= 3 else rng.choice((0, 0, 1, 1, 2)))
        sizes = [rng.uniform(*LARGE) if i < num_large else rng.uniform(*SMALL) for i in range(count)]
        spots: list[Spot] = []
        for radius in sizes:
            for _ in range(40):
                x, y = (rng.uniform(*rng.choice(BANDS)) if on_bands else rng.random() for _ in range(2))
                x = min(max(x, radius + 0.015), 1 - radius - 0.015)
                y = min(max(y, top + radius + 0.015), bottom - radius - 0.015)
                spot = Spot(x, y, radius)
                if all(math.hypot(x - s.x, y - s.y) > 1.12 * (radius + s.radius) + 0.02 for s in spots):
                    spots.append(spot)
                    break
            else:
                break
        if len(spots) == count:
            rng.shuffle(spots)
            return spots


def draw_thing(rng: random.Random, shape: str, colour: str, spot: Spot) -> Thing:
    rgb = palette.draw_colour(rng, colour)[1]
    angle = rng.choice((0.0, 1.0)) * rng.uniform(-10, 10)
    outline = (0, 0, 0) if rng.random() < 0.12 and palette.brightness(rgb) > 90 else None
    return Thing(shape, colour, rgb, spot.x, spot.y, spot.radius, angle, outline)


def place_sign(
    rng: random.Random, fonts: Path | None, background_rgb: RGB, *, held: bool
) -> tuple[Lettering, float, float]:
    """A word along the top or the bottom, and the strip that is left for things."""
    text = lettering.draw_text(rng, held=held)
    while True:
        colour, rgb = palette.draw_colour(rng)
        if abs(palette.brightness(rgb) - palette.brightness(background_rgb)) > 90:
            break
    low, high = lettering.width_range(len(text))
    at_top = rng.random() < 0.5
    sign = Lettering(
        text=text,
        colour=colour,
        rgb=rgb,
        background_rgb=background_rgb,
        font=rng.choice(lettering.typefaces(fonts, "held" if held else "train")),
        width=min(rng.uniform(low, high), low + 0.12),
        x=0.5 + rng.uniform(-0.05, 0.05),
        y=0.15 if at_top else 0.85,
        angle=0.0,
        plate_rgb=None,
        texture="plain",
        seed=0,
        height=0.22,
    )
    return (sign, 0.3, 1.0) if at_top else (sign, 0.0, 0.7)


def render_scene(scene: Scene, side: int) -> Image.Image:
    big = side * OVERSAMPLE
    canvas = palette.paint_background(scene.background_rgb, scene.texture, big, seed=scene.seed)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_shape(canvas, draw, thing, big)
    if scene.sign:
        lettering.place_text(canvas, scene.sign)
    return canvas.reduce(OVERSAMPLE)


def draw_shape(canvas: Image.Image, draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    """Round shapes by ellipses, the others as polygons; all fill a circle of the thing's radius."""
    cx, cy, radius = thing.x * side, thing.y * side, thing.radius * side
    box = (cx - radius, cy - radius, cx + radius, cy + radius)
    width = max(2, round(0.012 * side))
    if thing.shape == "circle":
        draw.ellipse(box, fill=thing.rgb, outline=thing.outline, width=width)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=thing.rgb, width=round(0.34 * radius))
    elif thing.shape == "crescent":
        mask = Image.new("L", (round(2 * radius),) * 2)
        pen = ImageDraw.Draw(mask)
        pen.ellipse((0, 0, 2 * radius, 2 * radius), fill=255)
        shift = 0.62 * radius
        pen.ellipse((shift, -0.08 * radius, 2 * radius + shift, 1.92 * radius), fill=0)
        canvas.paste(thing.rgb, (round(cx - radius), round(cy - radius)), mask.rotate(thing.angle))
    else:
        points = outline_points(thing.shape, math.radians(thing.angle))
        polygon = [(cx + radius * px, cy + radius * py) for px, py in points]
        draw.polygon(polygon, fill=thing.rgb)
        if thing.outline:
            draw.line([*polygon, polygon[0]], fill=thing.outline, width=width, joint="curve")


def outline_points(shape: str, turn: float) -> list[tuple[float, float]]:
    """Corners in a unit circle, turned; y grows downwards."""
    if shape == "star":
        points = [polar(1.0 if k % 2 == 0 else 0.42, math.pi * k / 5) for k in range(10)]
    elif shape == "heart":
        steps = [2 * math.pi * k / 40 for k in range(40)]
        wave = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in steps
        ]
        points = [(x / 17, -(y + 2.5) / 17) for x, y in wave]
    elif shape == "cross":
        w = 0.3
        points = [
            (-w, -1),
            (w, -1),
            (w, -w),
            (1, -w),
            (1, w),
            (w, w),
            (w, 1),
            (-w, 1),
            (-w, w),
            (-1, w),
            (-1, -w),
            (-w, -w),
        ]
    else:
        points = POLYGONS[shape]
    c, s = math.cos(turn), math.sin(turn)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def polar(radius: float, angle: float) -> tuple[float, float]:
    """Clockwise from straight up."""
    return radius * math.sin(angle), -radius * math.cos(angle)


POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],
    "hexagon": [polar(1.0, math.pi * k / 3 + math.pi / 6) for k in range(6)],
}
