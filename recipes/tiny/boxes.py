"""Questions about boxes, in LLaVA's form: [x1, y1, x2, y2], fractions of the padded square image with two decimals.

In: Scene and an Asker (wordings.py). Out: QA (talk.py), and the overlap of two boxes.
"""

from __future__ import annotations

import re

from scenes import Scene
from talk import QA, with_article
from wording import name_of, short_name
from wordings import Asker, capital

Box = tuple[float, float, float, float]


def box_questions(scene: Scene, ask: Asker) -> list[QA]:
    """Where is it? Give its box. And, for one thing: what is in this box?"""
    found = []
    named = [(thing, name) for thing in scene.things if (name := name_of(scene, thing, "any"))]
    for thing, name in ask.rng.sample(named, min(2, len(named))):
        box = spell_box(scene.box(thing))
        found.append(QA(ask("box", name=name), f"{box}", None, "box", name, (ask("box_it"), box)))
    if named:
        thing, name = ask.rng.choice(named)
        full = short_name(thing)
        box = spell_box(scene.box(thing))
        found.append(QA(ask("region", box=box), f"It is {with_article(full)}.", capital(full), "region", name))
    return found


def spell_box(box: Box) -> str:
    return f"[{', '.join(f'{value:.2f}' for value in box)}]"


def read_box(text: str) -> Box | None:
    """The first four numbers in brackets."""
    found = re.search(r"\[\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*\]", text)
    if found is None:
        return None
    try:
        x1, y1, x2, y2 = map(float, found.groups())
    except ValueError:
        return None
    return x1, y1, x2, y2


def overlap(a: Box | None, b: Box | None) -> float:
    """Intersection over union; 0 where one is missing or empty."""
    if a is None or b is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = sum(max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (a, b))
    return width * height / (area - width * height)
