"""Rows of a suite, and the collector that fills measures with them.

In: held-out samples (samples.py). Out: Row, Suite, Maker. Which measures there are, and what they ask, is in suite.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from photos import Photos
from PIL import Image
from samples import Sample, Source, draw_sample
from talk import QA, SHORT_SUFFIX, spell

FIRST_SEED = 50_000_000  # apart from every seed of the training data and of the measurements during training
SEEDS_PER_PART = 1_000_000
Paint = Callable[[], Image.Image]


@dataclass(frozen=True)
class Row:
    """One question. `after` names the row whose question, and the model's own answer to it, came just before."""

    id: str
    group: str  # the measure it counts for
    category: str  # how the answer is judged (scoring.py)
    form: str  # "word", "sentence" or "free"
    question: str
    answer: str
    picture: int | None = None
    after: str | None = None
    tag: str = ""  # a finer division of the group


@dataclass(frozen=True)
class Suite:
    rows: list[Row]
    paints: list[Paint]

    def paint(self, *, workers: int = 1) -> list[Image.Image]:
        """All images, in order."""
        if workers < 2:
            return [paint() for paint in self.paints]
        with ProcessPoolExecutor(workers) as pool:
            return [Image.fromarray(pixels) for pixels in pool.map(paint_array, self.paints, chunksize=64)]


def paint_array(paint: Paint) -> np.ndarray:
    return np.asarray(paint())


class Maker:
    """Collects rows and images; ids tell the group and a running number."""

    def __init__(self, fonts: Path | None, photos: Photos | None) -> None:
        self.fonts = fonts
        self.photos = photos
        self.source = Source(fonts, photos, held=True)
        self.rows: list[Row] = []
        self.paints: list[Paint] = []
        self.numbers: dict[str, int] = {}

    def picture(self, paint: Paint | None) -> int | None:
        if paint is None:
            return None
        self.paints.append(paint)
        return len(self.paints) - 1

    def number(self, group: str) -> int:
        return self.numbers.get(group, 0)

    def add(self, group: str, qa: QA, picture: int | None, rng: random.Random, *, form: str = "", tag: str = "") -> Row:
        """Ask for one word or for a sentence, by chance, unless the form is given or there is no short answer."""
        form = form or rng.choice(("word", "sentence"))
        if qa.short is None:
            form = "free"
        question = spell(rng, qa.question) + (SHORT_SUFFIX if form == "word" else "")
        answer = qa.short if form == "word" and qa.short is not None else qa.answer
        return self.put(Row("", group, qa.category, form, question, answer, picture, tag=tag))

    def put(self, row: Row) -> Row:
        number = self.number(row.group)
        self.numbers[row.group] = number + 1
        self.rows.append(replace(row, id=f"{row.group}-{number:04d}"))
        return self.rows[-1]

    def draw(self, part: int, kind: str) -> Iterator[tuple[Sample, random.Random]]:
        """Endless held-out samples of a kind; every part of the suite has its own."""
        for number in count():
            seed = FIRST_SEED + part * SEEDS_PER_PART + number
            yield draw_sample(kind, seed, self.source), random.Random(f"suite-{seed}")

    def fill(
        self, samples: Iterable[tuple[Sample, random.Random]], quotas: dict[str, int], label: Callable[[QA], str | None]
    ) -> None:
        """From each sample one question of every label that still has room; a label is "group" or "group/tag"."""
        room = dict(quotas)
        for sample, rng in samples:
            if not any(room.values()):
                break
            by_label: dict[str, list[QA]] = {}
            for qa in sample.questions:
                if room.get(name := label(qa) or "", 0):
                    by_label.setdefault(name, []).append(qa)
            picture = self.picture(sample.paint) if by_label else None
            for name, found in by_label.items():
                group, _, tag = name.partition("/")
                self.add(group, rng.choice(found), picture, rng, tag=tag)
                room[name] -= 1
