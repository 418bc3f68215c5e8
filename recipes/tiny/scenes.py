"""Drawn scenes: what is in them, and the image.

In: a random generator and what kind of scene is wanted. Out: Scene (one to six things, a background, perhaps a word), its
image, and the box of each thing.
Places are fractions of the side, (0, 0) at the top left. Things overlap little or not at all, sizes have names only where they
are clearly small or clearly large, and places stay off the borders between regions, so that questions (questions.py) have one
right answer. Held-out scenes are drawn by another hand (shapes.py) and another rasterizer (raster.py).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import finish
import lettering
import numpy as np
import palette
import raster
import shapes
from finish import PLAIN, Finish
from lettering import Lettering
from palette import RGB
from PIL import Image
from shapes import SHAPES

MAX_THINGS = 6
# Half of a thing's width. What is between small and large has no name.
SMALL, MIDDLE, LARGE, HUGE = (0.06, 0.105), (0.115, 0.155), (0.165, 0.225), (0.225, 0.42)
LARGEST = (HUGE[1], 0.26, 0.215, 0.2, 0.165, 0.145)  # for so many things of one size, from one to six
# Centres of things: thirds of the side with gaps between, so that "left" and "centre" never touch.
BANDS = ((0.10, 0.30), (0.42, 0.58), (0.70, 0.90))
BACKGROUNDS = ("white", "black", "grey", "yellow", "blue", "green", "pink")
FILLS = ("solid", "solid", "solid", "solid", "gradient", "striped", "outline", "bordered")
TURNS = {
    "square": 10,
    "diamond": 6,
    "cross": 12,
    "star": 36,
    "hexagon": 30,
    "crescent": 180,
    "triangle": 20,
    "heart": 20,
}
NEVER_HOLLOW = ("ring", "crescent", "cross")  # as an outline it would be, or look like, another shape


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
    border: RGB | None  # of another colour than the thing
    fill: str = "solid"
    shade: RGB = (0, 0, 0)  # the other colour of a gradient or of stripes: another shade of the same name
    variant: float = 0.5  # its proportions, in 0..1
    stretch: float = 1.0
    keystone: float = 0.0
    wobble: float = 0.0

    @property
    def size(self) -> str | None:
        """ "small" or "large"; None between the two."""
        return "small" if self.radius <= SMALL[1] else "large" if self.radius >= LARGE[0] else None

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
    renderer: str = "pillow"
    fine: int = 3  # how finely edges are drawn
    finish: Finish = PLAIN
    hand: str = "train"

    def contours(self, thing: Thing) -> list[np.ndarray]:
        """Outlines as fractions of the side."""
        return shapes.place(
            shapes.outline(thing.shape, thing.variant, self.hand),
            x=thing.x, y=thing.y, radius=thing.radius, angle=thing.angle, stretch=thing.stretch, keystone=thing.keystone,
            wobble=thing.wobble,
        )  # fmt: skip

    def box(self, thing: Thing) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 as fractions of the side."""
        points = np.concatenate(self.contours(thing))
        left, top, right, bottom = *points.min(0), *points.max(0)
        return max(0.0, float(left)), max(0.0, float(top)), min(1.0, float(right)), min(1.0, float(bottom))


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
    kind = rng.choices(("single", "few", "alike", "many"), (0.12, 0.40, 0.28, 0.20))[0]
    num_things = {"single": 1, "few": rng.randint(2, 4), "alike": rng.randint(2, 6), "many": rng.randint(4, 6)}[kind]
    names = rng.sample(SHAPES, len(SHAPES) if kind in ("few", "many") else rng.choice((1, 1, 2)))
    if kind in ("few", "many") and rng.random() < 0.3:
        names = names[:3]
    background, background_rgb = draw_background(rng)
    usable = [c for c in palette.NAMES if c != background and palette.stands_out(c, background_rgb)]
    colours = rng.sample(usable, min(len(usable), {"alike": rng.choice((1, 2, 2)), "many": 4}.get(kind, 6)))
    sign, top, bottom = place_sign(rng, fonts, background_rgb, held=held) if with_sign else (None, 0.0, 1.0)
    overlap = not with_sign and num_things > 1 and rng.random() < 0.1
    spots = draw_spots(rng, num_things, top, bottom, all_small=with_sign, overlap=overlap)
    fill = rng.choice(FILLS) if rng.random() < 0.6 else None  # of all things, or of each its own
    things: list[Thing] = []
    for spot in spots:
        touching = {t.colour for t in things if math.hypot(t.x - spot.x, t.y - spot.y) < 1.1 * (t.radius + spot.radius)}
        free = [c for c in colours if c not in touching] or [c for c in usable if c not in touching]
        look = fill or rng.choice(FILLS)
        if overlap and look == "outline":
            look = "solid"
        things.append(draw_thing(rng, rng.choice(names), rng.choice(free), spot, look, background_rgb, held=held))
    renderer = rng.choice(tuple(raster.RENDERERS["held" if held else "train"]))
    texture = rng.choice(palette.HELD_TEXTURES if held else palette.TEXTURES)
    return Scene(
        tuple(things), background, background_rgb, texture, sign, rng.randrange(2**31), renderer,
        rng.choice((1, 2, 3, 3)) if not held else rng.choice((3, 5)), finish.draw_finish(rng, held=held),
        "held" if held else "train",
    )  # fmt: skip


def draw_background(rng: random.Random) -> tuple[str | None, RGB]:
    if rng.random() < 0.7:
        name = rng.choices(BACKGROUNDS, (9, 2, 2, 1, 1, 1, 1))[0]
        return name, (255, 255, 255) if name == "white" and rng.random() < 0.5 else palette.draw_colour(rng, name)[1]
    return None, palette.to_rgb(
        rng.uniform(0, 360), rng.uniform(0.02, 0.25), rng.choice((rng.uniform(0.8, 1), rng.uniform(0.1, 0.25)))
    )


@dataclass(frozen=True)
class Spot:
    x: float
    y: float
    radius: float


def draw_spots(
    rng: random.Random, count: int, top: float, bottom: float, *, all_small: bool, overlap: bool = False
) -> list[Spot]:
    """Places for `count` things: anywhere, in a row, in a column or on a grid. With `overlap` they may cover a little of
    each other."""
    while True:
        sizes = draw_sizes(rng, count, all_small=all_small)
        if not all_small and not overlap and count > 1 and rng.random() < 0.2:
            spots = line_up(rng, sizes)
        else:
            spots = scatter(rng, sizes, top, bottom, reach=0.82 if overlap else 1.06)
        if len(spots) == count:
            rng.shuffle(spots)
            return spots


def draw_sizes(rng: random.Random, count: int, *, all_small: bool) -> list[float]:
    """Half widths: all about the same, or mixed. Crowded scenes have few large things."""
    if all_small:
        return [rng.uniform(0.075, SMALL[1]) for _ in range(count)]
    if rng.random() < 0.35:
        radius = rng.uniform(SMALL[0], LARGEST[count - 1])
        return [radius * rng.uniform(0.95, 1.05) for _ in range(count)]
    num_large = rng.randint(0, count) if count <= 3 else rng.choice((0, 0, 1, 1, 2))
    rest = [rng.uniform(*(MIDDLE if rng.random() < 0.25 else SMALL)) for _ in range(count - num_large)]
    return [rng.uniform(*LARGE) for _ in range(num_large)] + rest


def scatter(rng: random.Random, sizes: list[float], top: float, bottom: float, *, reach: float) -> list[Spot]:
    on_bands = rng.random() < 0.7
    spots: list[Spot] = []
    for radius in sorted(sizes, reverse=True):
        for _ in range(40):
            x, y = (rng.uniform(*rng.choice(BANDS)) if on_bands else rng.random() for _ in range(2))
            x = min(max(x, radius + 0.015), 1 - radius - 0.015)
            y = min(max(y, top + radius + 0.015), bottom - radius - 0.015)
            spot = Spot(x, y, radius)
            if all(math.hypot(x - s.x, y - s.y) > reach * (radius + s.radius) + 0.015 * (reach > 1) for s in spots):
                spots.append(spot)
                break
        else:
            break
    return spots


def line_up(rng: random.Random, sizes: list[float]) -> list[Spot]:
    """In a row, in a column, or on a grid of two rows or columns, at equal distances."""
    count, deep = len(sizes), 1 if len(sizes) < 4 or rng.random() < 0.5 else 2
    long = -(-count // deep)
    radius = min(max(sizes), 0.43 / long)
    across = 0.3 if deep == 2 else rng.uniform(radius + 0.02, 0.98 - radius)
    step = rng.uniform(2.3 * radius, (1 - 2 * radius) / (long - 1)) if long > 1 else 0.0
    start = rng.uniform(radius, max(radius, 1 - radius - step * (long - 1)))
    upright, spots = rng.random() < 0.4, []
    for number in range(count):
        along, side = start + step * (number % long), across + 0.4 * (number // long)
        x, y = (side, along) if upright else (along, side)
        spots.append(Spot(x, y, min(radius, sizes[number])))
    return spots if all(s.radius < min(s.x, s.y, 1 - s.x, 1 - s.y) + 0.01 for s in spots) else []


def draw_thing(
    rng: random.Random, shape: str, colour: str, spot: Spot, fill: str, background: RGB, *, held: bool
) -> Thing:
    rgb = palette.draw_colour(rng, colour, apart_from=background)[1]
    turn = TURNS.get(shape, 0)
    angle = 0.0 if rng.random() < 0.5 else rng.uniform(-turn, turn)
    if shape == "triangle" and rng.random() < 0.12:
        angle += 180
    if fill == "outline" and (shape in NEVER_HOLLOW or (shape == "circle" and spot.radius < 0.08)):
        fill = "solid"
    border = None
    if fill == "bordered" and palette.brightness(rgb) > 90:
        border = (0, 0, 0) if rng.random() < 0.8 else palette.to_rgb(0, 0, 0.25)
    shade = palette.draw_colour(rng, colour, apart_from=background)[1]
    if palette.difference(rgb, shade) > 60:
        shade = rgb
    stretch, keystone = rng.choice((1.0, rng.uniform(0.92, 1.08))), rng.choice((0.0, 0.0, rng.uniform(-0.1, 0.1)))
    variant, wobble = rng.random(), 0.0
    if held:
        keystone = 0.0
    elif rng.random() < 0.3:
        wobble = rng.uniform(0.01, 0.035)
    return Thing(
        shape, colour, rgb, spot.x, spot.y, spot.radius, angle, border, fill, shade, variant, stretch, keystone, wobble
    )


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
    """The image: background, things one after another, the word on top; then what happens to images on their way."""
    canvas = palette.paint_background(scene.background_rgb, scene.texture, side, seed=scene.seed)
    cover = next(found[scene.renderer] for found in raster.RENDERERS.values() if scene.renderer in found)
    for thing in scene.things:
        contours = [points * side for points in scene.contours(thing)]
        stroke = max(1.4, 0.12 * thing.radius * side)
        if thing.fill == "outline":
            cover(contours, side, stroke=stroke, fine=scene.fine).paint(canvas, np.asarray(thing.rgb, np.float32))
            continue
        inside = cover(contours, side, fine=scene.fine)
        inside.paint(canvas, fill_colour(thing, inside, side))
        if thing.border:
            edge = cover(contours, side, stroke=max(1.0, 0.6 * stroke), fine=scene.fine)
            edge.paint(canvas, np.asarray(thing.border, np.float32))
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    if scene.sign:
        image = lettering.place_text(image, scene.sign)
    return finish.apply(image, scene.finish)


def fill_colour(thing: Thing, cover: raster.Cover, side: int) -> np.ndarray:
    """One colour, or a field of two shades."""
    rgb, shade = np.asarray(thing.rgb, np.float32), np.asarray(thing.shade, np.float32)
    if thing.fill not in ("gradient", "striped"):
        return rgb
    height, width = cover.values.shape
    turn = 2 * math.pi * thing.variant
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    along = (math.cos(turn) * (x - width / 2) + math.sin(turn) * (y - height / 2)) / (thing.radius * side)
    share = np.clip(0.5 + 0.5 * along, 0, 1) if thing.fill == "gradient" else (np.sin(along * 7) > 0).astype(np.float32)
    return rgb + share[:, :, None] * (shade - rgb)
