"""One sample of each kind: a picture, a caption, questions. The only place that knows all kinds.

In: a seed, a kind, the typefaces, the photographs. Out: Sample. Equal seeds give equal samples on every machine.
Arrays for the small CLIP, image folders with LLaVA JSON and the held-out suite are all written from here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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


def reshape(image: Image.Image, rng: random.Random) -> Image.Image:
    """One picture in eight on a wider or higher sheet, as users' pictures are; the rest stay square."""
    if rng.random() < 0.875:
        return image
    width, height = image.size
    extra = round(rng.uniform(0.1, 0.5) * width)
    sheet_size = (width + extra, height) if rng.random() < 0.5 else (width, height + extra)
    corner = image.getpixel((1, 1))
    fill = corner if rng.random() < 0.7 else palette.draw_colour(rng)[1]
    sheet = Image.new("RGB", sheet_size, fill)
    sheet.paste(image, ((sheet_size[0] - width) // 2, (sheet_size[1] - height) // 2))
    return sheet
