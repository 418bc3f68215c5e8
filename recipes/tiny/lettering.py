"""Short words and numbers, and the images that show them.

In: a random generator, a folder of typefaces (fonts.py), a split. Out: Lettering (all that is drawn) and its image.
Sentences about them are in questions.py; a word inside a drawn scene is placed by scenes.py and drawn from here.
Two things are held out of training: the typefaces of the "held" folder, and one text in ten (`is_held_out`).
"""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import finish
import numpy as np
import palette
from finish import PLAIN, Finish
from palette import RGB
from PIL import Image, ImageDraw, ImageFont

WORDS = tuple(Path(__file__).with_name("words.txt").read_text().split())
# Letters whose capital is the same drawing, only larger: a text of these alone would have two right readings.
CASELESS = set("cosvwxzCOSVWXZkKpPuU")
MAX_LETTERS = 7
OVERSAMPLE = 2


@dataclass(frozen=True)
class Lettering:
    """A text as it is drawn. Lengths are fractions of the image's side."""

    text: str
    colour: str
    rgb: RGB
    background_rgb: RGB
    font: str
    width: float
    x: float
    y: float
    angle: float
    plate_rgb: RGB | None
    texture: str
    seed: int
    height: float = 0.55  # at most
    shadow_rgb: RGB | None = None
    finish: Finish = PLAIN

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


def is_held_out(text: str) -> bool:
    """One text in ten of three letters or more, chosen by its spelling in lower case: never drawn for training."""
    return len(text) > 2 and zlib.crc32(text.lower().encode()) % 10 == 0


def draw_text(rng: random.Random, *, held: bool) -> str:
    """A word, an invented word or a number. Held-out texts and training texts never meet."""
    while True:
        kind = rng.random()
        if kind < 0.38:
            text = rng.choice(WORDS)
        elif kind < 0.72:
            text = invented_word(rng)
        else:
            text = str(rng.randrange(10 ** rng.choice((1, 2, 3, 3, 4, 4))))
        if len(text) > MAX_LETTERS or (len(text) > 2 and is_held_out(text) != held):
            continue
        if not text.isdigit():
            text = rng.choice((str.lower, str.lower, str.upper, str.capitalize))(text)
            if set(text) <= CASELESS or len(text) < 2:
                continue
        elif held and len(text) < 3 and rng.random() < 0.8:
            continue
        return text


def invented_word(rng: random.Random) -> str:
    onsets = "b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr pl pr sh sl sm sn sp st sw th tr".split()  # noqa: SIM905
    codas = "b d f g k l m n p r s t v x z ck ft ll lt mp nd ng nk nt rd rk rm rn rt sh sk ss st th ct".split()  # noqa: SIM905
    vowels = "a e i o u a e i o u ai ea ee oa oo ou y".split()  # noqa: SIM905
    word = ""
    for _ in range(rng.choice((1, 1, 2, 2, 2, 3))):
        word += (rng.choice(onsets) if rng.random() < 0.85 else "") + rng.choice(vowels)
        word += rng.choice(codas) if rng.random() < 0.45 else ""
    return word[: rng.randint(3, MAX_LETTERS)]


@functools.cache
def typefaces(folder: Path | None, split: str) -> tuple[str, ...]:
    """Files of one split; without a folder, Pillow's own face alone (enough for a trial run, not for the real one)."""
    if folder is None:
        return ("",)
    files = tuple(str(p) for p in sorted((folder / split).glob("*.[ot]tf")))
    if not files:
        raise ValueError(f"no typefaces in {folder / split}; make them with recipes/tiny/fonts.py")
    return files


@functools.lru_cache(maxsize=4096)
def load_face(font: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(font, size) if font else ImageFont.load_default(size)


def draw_lettering(rng: random.Random, fonts: Path | None, *, held: bool, trained_text: bool = False) -> Lettering:
    """A text alone in an image, at a readable size, anywhere it fits. `trained_text`: held-out are its typeface and its look
    alone."""
    text = draw_text(rng, held=held and not trained_text)
    colour, rgb = palette.draw_colour(rng)
    background = palette.draw_contrast(rng, rgb)
    plate = palette.draw_contrast(rng, rgb) if rng.random() < 0.25 else None
    width = rng.uniform(*width_range(len(text)))
    room_x, room_y = (0.96 - width) / 2, 0.30
    return Lettering(
        text=text,
        colour=colour,
        rgb=rgb,
        background_rgb=background,
        font=rng.choice(typefaces(fonts, "held" if held else "train")),
        width=width,
        x=0.5 + rng.uniform(-room_x, room_x),
        y=0.5 + rng.uniform(-room_y, room_y),
        angle=rng.choice((0.0, 0.0, 1.0)) * rng.uniform(-8, 8),
        plate_rgb=plate,
        texture=rng.choice(palette.HELD_TEXTURES if held else palette.TEXTURES),
        seed=rng.randrange(2**31),
        shadow_rgb=blend(rgb, background) if plate is None and rng.random() < 0.1 else None,
        finish=finish.draw_finish(rng, held=held),
    )


def blend(a: RGB, b: RGB) -> RGB:
    """Nearer to `b`: a shadow that the text still stands out from."""
    red, green, blue = (round(0.3 * x + 0.7 * y) for x, y in zip(a, b, strict=True))
    return red, green, blue


def width_range(num_letters: int) -> tuple[float, float]:
    """How wide a text may be drawn, so that a letter is neither below reading size nor higher than the image."""
    return min(0.86, 0.128 * num_letters + 0.03), min(0.94, 0.26 * num_letters + 0.05)


def render_lettering(lettering: Lettering, side: int) -> Image.Image:
    canvas = palette.paint_background(lettering.background_rgb, lettering.texture, side, seed=lettering.seed)
    image = place_text(Image.fromarray(canvas.astype(np.uint8)), lettering)
    return finish.apply(image, lettering.finish)


def place_text(image: Image.Image, lettering: Lettering) -> Image.Image:
    """The text (and its plate) over a square image: drawn OVERSAMPLE times as large, and averaged."""
    side = image.width * OVERSAMPLE
    mask = text_mask(lettering, round(lettering.width * side), round(lettering.height * side))
    pad = max(2, round(0.03 * side))
    stamp = Image.new("L", (mask.width + 2 * pad, mask.height + 2 * pad))
    stamp.paste(mask, (pad, pad))
    plate = Image.new("L", stamp.size, 255)
    if lettering.angle:
        stamp = stamp.rotate(lettering.angle, Image.Resampling.BICUBIC, expand=True)
        plate = plate.rotate(lettering.angle, Image.Resampling.BICUBIC, expand=True)
    left = min(max(0, round(lettering.x * side - stamp.width / 2)), max(0, side - stamp.width))
    top = min(max(0, round(lettering.y * side - stamp.height / 2)), max(0, side - stamp.height))
    layers = [(lettering.plate_rgb, plate, 0)] if lettering.plate_rgb else []
    if lettering.shadow_rgb:
        layers.append((lettering.shadow_rgb, stamp, max(1, round(0.012 * side))))
    for rgb, cover, shift in [*layers, (lettering.rgb, stamp, 0)]:
        whole = Image.new("L", (side, side))
        whole.paste(cover, (left + shift, top + shift))
        image.paste(rgb, (0, 0), whole.reduce(OVERSAMPLE))
    return image


def text_mask(lettering: Lettering, width: int, max_height: int) -> Image.Image:
    """The text in white on black, `width` pixels wide or `max_height` high, whichever comes first."""
    text, font = lettering.text, lettering.font
    face = load_face(font, 64)
    left, top, right, bottom = face.getbbox(text)
    scale = min(width / max(1, right - left), max_height / max(1, bottom - top))
    size = max(8, int(64 * scale) // 2 * 2)  # even sizes only: keeps the cache of faces small
    face = load_face(font, size)
    left, top, right, bottom = (round(v) for v in face.getbbox(text))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=face)
    return mask
