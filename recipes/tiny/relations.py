"""Questions about two or three things at once: left of, above, between, nearest, larger.

In: Scene and a random generator. Out: QA (talk.py). A relation counts only with a clear margin on one axis.
"""

from __future__ import annotations

import math
import random
from itertools import permutations

from scenes import Scene, Thing
from talk import QA, capital, with_article
from wording import name_of, short_name

MARGIN = 0.14
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` lies, seen from `b`; None unless one axis clearly wins."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > MARGIN and abs(dx) > 1.6 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > MARGIN and abs(dy) > 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def relation_questions(scene: Scene, rng: random.Random) -> list[QA]:
    named = [(thing, name) for thing in scene.things if (name := name_of(scene, thing, "any"))]
    found: list[QA] = []
    for (a, name_a), (b, name_b) in rng.sample(list(permutations(named, 2)), min(4, len(named) * (len(named) - 1))):
        if where := relation(a, b):
            found += pair_questions(rng, name_a, name_b, where)
        found += size_questions(rng, a, b, name_a, name_b)
    for thing, name in rng.sample(named, min(2, len(named))):
        found += single_answer_questions(scene, thing, name)
        found += nearest_questions(scene, thing, name)
    found += extreme_questions(scene)
    found += between_questions(scene, named)
    return found


def pair_questions(rng: random.Random, a: str, b: str, where: str) -> list[QA]:
    fact = f"{a} is {PHRASES[where]} {b}"
    side = "left or to the right of" if where in ("left", "right") else None
    asked = f"Is {a} to the {side} {b}?" if side else f"Is {a} above or below {b}?"
    found = [
        QA(asked, f"{capital(fact)}.", capital(where), "relation", a),
        QA(f"Where is {a} relative to {b}?", f"{capital(fact)}.", capital(PHRASES[where]), "relation", a),
    ]
    right = rng.random() < 0.5
    claim = where if right else OPPOSITE[where]
    answer = f"Yes, {fact}." if right else f"No, {fact}."
    found.append(QA(f"Is {a} {PHRASES[claim]} {b}?", answer, "Yes" if right else "No", "yesno_relation", a))
    return found


def size_questions(rng: random.Random, a: Thing, b: Thing, name_a: str, name_b: str) -> list[QA]:
    ratio = a.radius / b.radius
    if 1 / 1.4 < ratio < 1.4:
        return []
    bigger, smaller = (name_a, name_b) if ratio > 1 else (name_b, name_a)
    fact = f"{bigger} is larger than {smaller}"
    found = [
        QA(f"Which is larger, {name_a} or {name_b}?", f"{capital(fact)}.", capital(bigger), "size_relation", bigger),
        QA(
            f"Which is smaller, {name_a} or {name_b}?",
            f"{capital(smaller)} is smaller than {bigger}.",
            capital(smaller),
            "size_relation",
            smaller,
        ),
    ]
    right = ratio > 1
    found.append(
        QA(
            f"Is {name_a} {rng.choice(('larger', 'bigger'))} than {name_b}?",
            f"{'Yes' if right else 'No'}, {fact}.",
            "Yes" if right else "No",
            "yesno_size",
            name_a,
        )
    )
    return found


def single_answer_questions(scene: Scene, thing: Thing, name: str) -> list[QA]:
    """What is above the star? Only where exactly one thing could be meant, and nothing else is nearly there."""
    found = []
    for where, phrase in PHRASES.items():
        matches = [other for other in scene.things if other is not thing and relation(other, thing) == where]
        unclear = [other for other in scene.things if other is not thing and relation(other, thing) is None]
        if len(matches) == 1 and not unclear:
            full = short_name(matches[0])
            about = name_of(scene, matches[0], "any")
            found.append(
                QA(
                    f"What is {phrase} {name}?",
                    f"{capital(with_article(full))} is {phrase} {name}.",
                    capital(full),
                    "relation",
                    about,
                )
            )
        if not matches and not unclear and len(scene.things) > 1:
            found.append(QA(f"What is {phrase} {name}?", f"There is nothing {phrase} {name}.", "Nothing", "relation"))
    return found[:2]


def nearest_questions(scene: Scene, thing: Thing, name: str) -> list[QA]:
    others = sorted((math.hypot(o.x - thing.x, o.y - thing.y), i) for i, o in enumerate(scene.things) if o is not thing)
    if len(others) < 2 or others[1][0] < 1.4 * others[0][0]:
        return []
    nearest = scene.things[others[0][1]]
    full, about = short_name(nearest), name_of(scene, nearest, "any")
    phrase = f"The {full} is nearest to {name}."
    return [QA(f"Which object is nearest to {name}?", phrase, capital(full), "relation", about)]


def extreme_questions(scene: Scene) -> list[QA]:
    """The largest and the smallest thing, where there is no doubt."""
    ranked = sorted(scene.things, key=lambda t: t.radius)
    found = []
    if len(ranked) > 1 and ranked[-1].radius > 1.4 * ranked[-2].radius:
        found.append(extreme(scene, ranked[-1], "largest"))
    if len(ranked) > 1 and ranked[1].radius > 1.4 * ranked[0].radius:
        found.append(extreme(scene, ranked[0], "smallest"))
    return found


def extreme(scene: Scene, thing: Thing, word: str) -> QA:
    full = short_name(thing)
    answer = f"The {word} object is the {full}."
    return QA(f"What is the {word} object?", answer, capital(full), "size_relation", name_of(scene, thing, "any"))


def between_questions(scene: Scene, named: list[tuple[Thing, str]]) -> list[QA]:
    """Exactly three things in a row: the middle one."""
    if len(scene.things) != 3 or len(named) != 3:
        return []
    for axis in ("x", "y"):
        row = sorted(named, key=lambda pair: getattr(pair[0], axis))
        gaps = [getattr(row[i + 1][0], axis) - getattr(row[i][0], axis) for i in (0, 1)]
        across = [getattr(thing, "y" if axis == "x" else "x") for thing, _ in row]
        if min(gaps) > MARGIN and max(across) - min(across) < 0.22:
            full, (_, a), (_, b) = short_name(row[1][0]), row[0], row[2]
            answer = f"The {full} is between {a} and {b}."
            return [QA(f"What is between {a} and {b}?", answer, capital(full), "relation", row[1][1])]
    return []
