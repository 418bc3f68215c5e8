"""The second round of training: what the first one leaves hard, and short conversations, so that more images are seen.

In: samples as samples.py draws them. Out: harder ones of the same kind, and their turns.
Reading and counting get most of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import talk
from samples import Sample
from talk import QA, Turn
from wordings import Asker

RESHAPED = 0.3  # share of images on wider or higher sheets

WEIGHTS = talk.WEIGHTS | {
    "read": 9.0, "yesno_read": 4.0, "count": 4.5, "yesno_count": 2.0, "relation": 3.0, "unknown": 2.2, "yesno_any_text": 0.8,
    "photo": 4.0, "describe": 1.2, "box": 3.0, "position": 2.0,
}  # fmt: skip
TURNS = {
    "text": (1, 2),
    "sign": (1, 3),
    "scene": (2, 4),
    "photo": (1, 4),
    "talk": (1, 3),
    "chart": (2, 4),
    "pair": (2, 4),
}


def harder(sample: Sample, rng: random.Random, redraw: Callable[[int], Sample], seed: int) -> Sample:
    """The sample, or where a scene has few things to count, mostly another one; with few easy counts."""
    attempt = 0
    while sample.kind == "scene" and int(sample.truth) < 3 and rng.random() < 0.6:
        attempt += 1
        sample = redraw(seed + attempt * 1_000_000_000)
    return replace(sample, questions=thin_counts(sample.questions, rng))


def thin_counts(questions: list[QA], rng: random.Random) -> list[QA]:
    """Counts of one and of none are easy and plenty: most of them go."""
    return [qa for qa in questions if qa.category != "count" or qa.short not in ("0", "1") or rng.random() < 0.2]


def converse(ask: Asker, sample: Sample) -> list[Turn]:
    """A short conversation, in which a text is nearly always read."""
    rng = ask.rng
    turns = talk.converse(ask, sample.questions, rng.randint(*TURNS[sample.kind]), WEIGHTS)
    asked = [qa for qa in sample.questions if qa.category == "read"]
    told = any("read" in turn.category.split() or turn.category == "describe" for turn in turns)
    if sample.kind != "pair" and asked and rng.random() < 0.9 and not told:
        turns[-1] = talk.converse(ask, asked, 1)[0]
    return turns
