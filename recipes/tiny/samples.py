"""One sample of each kind: its images, a caption, questions. The only place that knows all kinds.

In: a seed, a kind, the typefaces, the photographs. Out: Sample. Equal seeds give equal samples on every machine.
Arrays for the small CLIP, image folders with LLaVA JSON and the held-out suite are all written from here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import charts
import lettering
import palette
import photos
import questions
import reading
import scenes
from pairs import Side, pair_questions
from photos import Photos
from PIL import Image
from scenes import Scene
from talk import QA, small_talk
from wordings import Asker

SIDE = 112
Paint = Callable[[], Image.Image]


@dataclass(frozen=True)
class Source:
    """What samples are drawn from. `held` picks held-out typefaces, texts, shapes, rasterizers and wordings; `plain`, one
    wording for each kind of question."""

    fonts: Path | None
    photos: Photos | None
    held: bool = False
    plain: bool = False

    def asker(self, rng: random.Random) -> Asker:
        return Asker(rng, "plain" if self.plain else rng.choice(("grammar", "hand")) if self.held else "train")


@dataclass(frozen=True)
class Sample:
    kind: str
    paints: tuple[Paint, ...]  # painting is the slow part, and text alone is often enough
    caption: str
    questions: list[QA]
    truth: str  # the word written, the photograph's kind, or the number of things
    wording: str  # the split of wordings.py that asks
    places: tuple[tuple[float, float], ...] = ()  # of the things in a scene, as fractions of its sides

    @property
    def images(self) -> list[Image.Image]:
        return [paint() for paint in self.paints]

    @property
    def scene(self) -> Scene:
        """What is drawn, in a sample of kind "scene" or "sign"."""
        return self.paints[0].args[0]  # type: ignore[attr-defined]


def draw_scene(rng: random.Random, source: Source, side: int, *, with_sign: bool = False) -> Sample:
    scene = scenes.draw_scene(rng, source.fonts, held=source.held, with_sign=with_sign)
    ask = source.asker(rng)
    return Sample(
        "sign" if with_sign else "scene",
        (partial(scenes.render_scene, scene, side),),
        questions.scene_caption(scene, rng),
        questions.scene_questions(scene, ask),
        str(len(scene.things)),
        ask.split,
        tuple((thing.x, thing.y) for thing in scene.things),
    )


def draw_sign(rng: random.Random, source: Source, side: int) -> Sample:
    return draw_scene(rng, source, side, with_sign=True)


def draw_text(rng: random.Random, source: Source, side: int) -> Sample:
    text = lettering.draw_lettering(rng, source.fonts, held=source.held)
    ask = source.asker(rng)
    paints = (partial(lettering.render_lettering, text, side),)
    asked = reading.lettering_questions(text, ask)
    return Sample("text", paints, reading.lettering_caption(text, rng), asked, text.text, ask.split)


def draw_photo(rng: random.Random, source: Source, side: int) -> Sample:
    """Training photographs are varied; held-out ones are shown as they are. Their size is their own, not `side`."""
    assert source.photos is not None, "photographs are drawn only where a data set was given"
    index = rng.randrange(len(source.photos))
    pixels, label = source.photos.pixels[index], int(source.photos.labels[index])
    paint = (
        partial(Image.fromarray, pixels) if source.held else partial(photos.vary, pixels, random.Random(rng.random()))
    )
    ask = source.asker(rng)
    asked = photos.photo_questions(label, ask)
    return Sample("photo", (paint,), photos.photo_caption(label, rng), asked, photos.KINDS[label], ask.split)


def draw_chart(rng: random.Random, source: Source, side: int) -> Sample:
    chart = charts.draw_chart(rng, held=source.held)
    ask = source.asker(rng)
    paints = (partial(charts.render_chart, chart, side),)
    asked = charts.chart_questions(chart, ask)
    return Sample("chart", paints, charts.chart_caption(chart, rng), asked, str(len(chart.values)), ask.split)


def draw_pair(rng: random.Random, source: Source, side: int) -> Sample:
    """Two samples of other kinds, side by side; mostly both are scenes."""
    kinds = ["scene", "scene", "scene", "scene", "text", "chart", *(["photo"] if source.photos is not None else [])]
    both = "scene" if rng.random() < 0.5 else None
    first, second = (DRAW[both or rng.choice(kinds)](rng, source, side) for _ in range(2))
    ask = source.asker(rng)
    asked = pair_questions(side_of(first), side_of(second), ask)
    caption = f"First: {first.caption} Second: {second.caption}"
    return Sample("pair", first.paints + second.paints, caption, asked, first.truth, ask.split)


def side_of(sample: Sample) -> Side:
    if sample.kind == "scene":
        things = sample.scene.things
        names = {thing.shape for thing in things} | {f"{thing.colour} {thing.shape}" for thing in things}
        return Side(sample.questions, len(things), frozenset(names))
    shown = {sample.truth} if sample.kind == "photo" else set()
    return Side(sample.questions, None, frozenset(shown))


def draw_talk(rng: random.Random, source: Source, side: int) -> Sample:
    return Sample("talk", (), "", small_talk(rng), "", source.asker(rng).split)


DRAW: dict[str, Callable[[random.Random, Source, int], Sample]] = {
    "scene": draw_scene,
    "sign": draw_sign,
    "text": draw_text,
    "photo": draw_photo,
    "chart": draw_chart,
    "pair": draw_pair,
    "talk": draw_talk,
}


def draw_sample(kind: str, seed: int, source: Source, *, side: int = SIDE) -> Sample:
    """The sample of this kind and seed; training and held-out seeds never meet."""
    rng = random.Random(f"{'held' if source.held else 'train'}-{kind}-{seed}")
    return DRAW[kind](rng, source, side)


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
