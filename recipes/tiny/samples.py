"""One sample of each kind: an image, a caption, questions. The only place that knows all kinds.

In: a seed, a kind, the typefaces, the photographs. Out: Sample. Equal seeds give equal samples on every machine.
Arrays for the small CLIP, image folders with LLaVA JSON and the held-out suite are all written from here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lettering
import palette
import photos
import questions
import scenes
from photos import Photos
from PIL import Image
from talk import QA, loosen, small_talk

SIDE = 112


@dataclass(frozen=True)
class Source:
    """What samples are drawn from. `held` picks held-out typefaces, texts and phrasings."""

    fonts: Path | None
    photos: Photos | None
    held: bool = False


@dataclass(frozen=True)
class Sample:
    kind: str
    paint: Callable[[], Image.Image] | None  # painting is the slow part, and text alone is often enough
    caption: str
    questions: list[QA]
    truth: str  # the word written, the photograph's kind, or the number of things
    places: tuple[tuple[float, float], ...] = ()  # of the things in a scene, as fractions of its sides

    @property
    def image(self) -> Image.Image | None:
        return self.paint() if self.paint else None


def draw_scene(rng: random.Random, source: Source, side: int, *, with_sign: bool = False) -> Sample:
    scene = scenes.draw_scene(rng, source.fonts, held=source.held, with_sign=with_sign)
    asked = questions.scene_questions(scene, rng, held=source.held)
    kind = "sign" if with_sign else "scene"
    return Sample(
        kind,
        partial(scenes.render_scene, scene, side),
        questions.scene_caption(scene, rng),
        asked,
        str(len(scene.things)),
        tuple((thing.x, thing.y) for thing in scene.things),
    )


def draw_sign(rng: random.Random, source: Source, side: int) -> Sample:
    return draw_scene(rng, source, side, with_sign=True)


def draw_text(rng: random.Random, source: Source, side: int) -> Sample:
    text = lettering.draw_lettering(rng, source.fonts, held=source.held)
    asked = questions.lettering_questions(text, rng)
    paint = partial(lettering.render_lettering, text, side)
    return Sample("text", paint, questions.lettering_caption(text, rng), asked, text.text)


def draw_photo(rng: random.Random, source: Source, side: int) -> Sample:
    """Training photographs are varied; held-out ones are shown as they are. Their size is their own, not `side`."""
    assert source.photos is not None, "photographs are drawn only where a data set was given"
    index = rng.randrange(len(source.photos))
    pixels, label = source.photos.pixels[index], int(source.photos.labels[index])
    paint = (
        partial(Image.fromarray, pixels) if source.held else partial(photos.vary, pixels, random.Random(rng.random()))
    )
    asked = photos.photo_questions(label, rng, held=source.held)
    return Sample("photo", paint, photos.photo_caption(label, rng), asked, photos.KINDS[label])


def draw_talk(rng: random.Random, source: Source, side: int) -> Sample:
    return Sample("talk", None, "", small_talk(rng), "")


DRAW: dict[str, Callable[[random.Random, Source, int], Sample]] = {
    "scene": draw_scene,
    "sign": draw_sign,
    "text": draw_text,
    "photo": draw_photo,
    "talk": draw_talk,
}


def draw_sample(kind: str, seed: int, source: Source, *, side: int = SIDE) -> Sample:
    """The sample of this kind and seed; training and held-out seeds never meet."""
    rng = random.Random(f"{'held' if source.held else 'train'}-{kind}-{seed}")
    sample = DRAW[kind](rng, source, side)
    if not source.held:
        sample = replace(sample, questions=loosen(rng, sample.questions))
    return sample


def reshape(
    image: Image.Image, rng: random.Random, places: Sequence[tuple[float, float]] = (), *, share: float = 0.125
) -> Image.Image:
    """A `share` of images on a wider or higher sheet, as users' images are; the rest stay square.

    An image in which a thing would come to lie in another part ("left", "centre") stays square, too.
    """
    if rng.random() >= share:
        return image
    width, height = image.size
    extra = round(rng.uniform(0.1, 0.5) * width)
    wide, corner_fill = rng.random() < 0.5, rng.random() < 0.7
    fill = image.getpixel((1, 1)) if corner_fill else palette.draw_colour(rng)[1]
    sheet_size = (width + extra, height) if wide else (width, height + extra)
    left, top = (sheet_size[0] - width) // 2, (sheet_size[1] - height) // 2
    for x, y in places:
        moved = ((x * width + left) / sheet_size[0], (y * height + top) / sheet_size[1])
        if scenes.place_name(*moved) != scenes.place_name(x, y):
            return image
    sheet = Image.new("RGB", sheet_size, fill)
    sheet.paste(image, (left, top))
    return sheet
