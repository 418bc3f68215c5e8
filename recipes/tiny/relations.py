"""Questions about two or three things at once: left of, above, between, nearest, larger.

In: Scene and an Asker (wordings.py). Out: QA (talk.py). A relation counts only with a clear margin on one axis.
"""

from __future__ import annotations

import math
from itertools import permutations

from scenes import Scene, Thing
from talk import QA, with_article, yes_no
from wording import name_of, names_of, short_name
from wordings import Asker, capital

MARGIN = 0.14
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
ASKED_AS = {
    "left": ("left of", "on the left of", "to the left of"), "right": ("right of", "on the right of", "to the right of"),
    "above": ("above", "over", "on top of"), "below": ("below", "under", "beneath", "underneath"),
}  # fmt: skip
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` lies, seen from `b`; None unless one axis clearly wins."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > MARGIN and abs(dx) > 1.6 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > MARGIN and abs(dy) > 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def relation_questions(scene: Scene, ask: Asker) -> list[QA]:
    named, rng = names_of(scene), ask.rng
    found: list[QA] = []
    for (a, name_a), (b, name_b) in rng.sample(list(permutations(named, 2)), min(4, len(named) * (len(named) - 1))):
        if where := relation(a, b):
            found += pair_questions(ask, name_a, name_b, where)
        found += size_questions(ask, a, b, name_a, name_b)
    for thing, name in rng.sample(named, min(2, len(named))):
        found += single_answer_questions(scene, thing, name, ask)
        found += nearest_questions(scene, thing, name, ask)
    found += extreme_questions(scene, ask)
    found += between_questions(scene, named, ask)
    return found


def pair_questions(ask: Asker, a: str, b: str, where: str) -> list[QA]:
    fact = f"{a} is {PHRASES[where]} {b}"
    two = {"a_name": a, "b_name": b}
    asked = ask("rel_side" if where in ("left", "right") else "rel_height", **two)
    found = [
        QA(asked, f"{capital(fact)}.", capital(where), "relation", a),
        QA(ask("rel_where", **two), f"{capital(fact)}.", capital(PHRASES[where]), "relation", a),
    ]
    right = ask.rng.random() < 0.5
    claim = where if right else OPPOSITE[where]
    found.append(yes_no(ask("is_rel", rel=say(ask, claim), **two), right, fact, fact, "yesno_relation", a))
    return found


def say(ask: Asker, where: str) -> str:
    """The relation in the words of answers, or in others."""
    return PHRASES[where] if ask.split == "plain" or ask.rng.random() < 0.6 else ask.rng.choice(ASKED_AS[where])


def size_questions(ask: Asker, a: Thing, b: Thing, name_a: str, name_b: str) -> list[QA]:
    ratio = a.radius / b.radius
    if 1 / 1.4 < ratio < 1.4:
        return []
    bigger, smaller = (name_a, name_b) if ratio > 1 else (name_b, name_a)
    fact, two = f"{bigger} is larger than {smaller}", {"a_name": name_a, "b_name": name_b}
    turned = f"{capital(smaller)} is smaller than {bigger}."
    return [
        QA(ask("larger", **two), f"{capital(fact)}.", capital(bigger), "size_relation", bigger),
        QA(ask("smaller", **two), turned, capital(smaller), "size_relation", smaller),
        yes_no(ask("is_larger", **two), ratio > 1, fact, fact, "yesno_size", name_a),
    ]


def single_answer_questions(scene: Scene, thing: Thing, name: str, ask: Asker) -> list[QA]:
    """What is above the star? Only where exactly one thing could be meant, and nothing else is nearly there."""
    found = []
    others = [other for other in scene.things if other is not thing]
    for where, phrase in PHRASES.items():
        matches = [other for other in others if relation(other, thing) == where]
        if any(relation(other, thing) is None for other in others):
            continue
        asked = ask("what_rel", rel=say(ask, where), name=name)
        if len(matches) == 1:
            full, about = short_name(matches[0]), name_of(scene, matches[0], "any")
            answer = f"{capital(with_article(full))} is {phrase} {name}."
            found.append(QA(asked, answer, capital(full), "relation", about))
        elif not matches and others:
            found.append(QA(asked, f"There is nothing {phrase} {name}.", "Nothing", "relation"))
    return found[:2]


def nearest_questions(scene: Scene, thing: Thing, name: str, ask: Asker) -> list[QA]:
    others = sorted((math.hypot(o.x - thing.x, o.y - thing.y), i) for i, o in enumerate(scene.things) if o is not thing)
    if len(others) < 2 or others[1][0] < 1.4 * others[0][0]:
        return []
    nearest = scene.things[others[0][1]]
    full, about = short_name(nearest), name_of(scene, nearest, "any")
    return [QA(ask("nearest", name=name), f"The {full} is nearest to {name}.", capital(full), "relation", about)]


def extreme_questions(scene: Scene, ask: Asker) -> list[QA]:
    """The largest and the smallest thing, where there is no doubt."""
    ranked = sorted(scene.things, key=lambda t: t.radius)
    found = []
    if len(ranked) > 1 and ranked[-1].radius > 1.4 * ranked[-2].radius:
        found.append(extreme(scene, ranked[-1], "largest", ask))
    if len(ranked) > 1 and ranked[1].radius > 1.4 * ranked[0].radius:
        found.append(extreme(scene, ranked[0], "smallest", ask))
    return found


def extreme(scene: Scene, thing: Thing, word: str, ask: Asker) -> QA:
    full = short_name(thing)
    asked = ask(
        "extreme", most="biggest" if word == "largest" and ask.split != "plain" and ask.rng.random() < 0.4 else word
    )
    answer = f"The {word} object is the {full}."
    return QA(asked, answer, capital(full), "size_relation", name_of(scene, thing, "any"))


def between_questions(scene: Scene, named: list[tuple[Thing, str]], ask: Asker) -> list[QA]:
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
            return [QA(ask("between", a_name=a, b_name=b), answer, capital(full), "relation", row[1][1])]
    return []
