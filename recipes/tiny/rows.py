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
from samples import Paint, Sample, Source, draw_sample
from talk import QA, put
from wordings import Asker

FIRST_SEED = 50_000_000  # apart from every seed of the training data and of the measurements during training
SEEDS_PER_PART = 1_000_000


@dataclass(frozen=True)
class Row:
    """One question. `after` names the row whose question, and the model's own answer to it, came just before."""

    id: str
    group: str  # the measure it counts for
    category: str  # how the answer is judged (scoring.py)
    form: str  # "word", "sentence" or "free"
    question: str
    answer: str
    images: tuple[int, ...] = ()
    after: str | None = None
    tag: str = ""  # a finer division of the group
    long: str = ""  # the answer in a sentence, where a short one was asked for
    wording: str = ""  # "hand" or "grammar", the splits of wordings.py; "" for a form that everybody uses


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

    def add_images(self, paints: Iterable[Paint]) -> tuple[int, ...]:
        first = len(self.paints)
        self.paints += paints
        return tuple(range(first, len(self.paints)))

    def number(self, group: str) -> int:
        return self.numbers.get(group, 0)

    def add(self, group: str, qa: QA, images: tuple[int, ...], ask: Asker, *, form: str = "", tag: str = "") -> Row:
        """Ask for a short answer or for a sentence, by chance, unless the form is given or there is no short answer."""
        form = form or ask.rng.choice(("word", "sentence"))
        turn = put(ask, qa, short=form == "word")
        form = "word" if turn.short else "free" if qa.short is None else "sentence"
        long = qa.answer if turn.short else ""
        row = Row("", group, qa.category, form, turn.question, turn.answer, images, None, tag, long, ask.split)
        return self.put(row)

    def put(self, row: Row) -> Row:
        number = self.number(row.group)
        self.numbers[row.group] = number + 1
        self.rows.append(replace(row, id=f"{row.group}-{number:04d}"))
        return self.rows[-1]

    def draw(self, part: int, kind: str) -> Iterator[tuple[Sample, Asker]]:
        """Endless held-out samples of a kind, with who asks about them; every part of the suite has its own."""
        for number in count():
            seed = FIRST_SEED + part * SEEDS_PER_PART + number
            sample = draw_sample(kind, seed, self.source)
            yield sample, Asker(random.Random(f"suite-{seed}"), sample.wording)

    def fill(
        self, samples: Iterable[tuple[Sample, Asker]], quotas: dict[str, int], label: Callable[[QA], str | None]
    ) -> None:
        """From each sample one question of every label that still has room; a label is "group" or "group/tag"."""
        room = dict(quotas)
        for sample, ask in samples:
            if not any(room.values()):
                break
            by_label: dict[str, list[QA]] = {}
            for qa in sample.questions:
                if room.get(name := label(qa) or "", 0):
                    by_label.setdefault(name, []).append(qa)
            images = self.add_images(sample.paints) if by_label else ()
            for name, found in by_label.items():
                group, _, tag = name.partition("/")
                self.add(group, ask.rng.choice(found), images, ask, tag=tag)
                room[name] -= 1
