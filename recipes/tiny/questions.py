"""Questions about drawn scenes, with answers that are right by construction.

In: Scene and an Asker (wordings.py), which puts each question into words. Out: lists of QA (talk.py) and captions.
A question is only made where the scene has clear margins: places off the borders, sizes far apart, names that fit one thing.
Questions that take "it" (follow-ups) carry the wording for that; yes/no questions come as a yes and a no, equally often.
Words and numbers are in reading.py, relations of things in relations.py, boxes in boxes.py.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import palette
from boxes import box_questions
from photos import KINDS
from reading import lettering_questions
from relations import relation_questions
from scenes import Scene, Thing
from shapes import SHAPES
from talk import QA, unknown_questions, with_article, yes_no
from wording import (
    DIGITS,
    describe,
    join,
    name_of,
    names_of,
    place_phrase,
    plural,
    short_name,
    there_are,
)
from wordings import Asker, capital

# Things that no drawn scene shows; the second half is asked for only in the held-out suite.
ELSEWHERE = (
    "person", "tree", "house", "flower", "chair", "table", "bottle", "book", "cup", "sheep", "cow", "bicycle", "train", "bus",
    "boat", "phone", "clock", "window", "door", "lamp", "cake", "banana", "apple", "fish", "elephant", "bear", "child", "man",
    "woman", "hat", "shoe", "ball", "kite", "mouse", "key", "umbrella", "mountain", "cloud", "pizza", "sandwich", *KINDS,
)  # fmt: skip
HELD_ELSEWHERE = (
    "giraffe", "sofa", "laptop", "fork", "spoon", "knife", "motorcycle", "bench", "zebra", "backpack", "skateboard", "carrot",
    "donut", "bed", "toilet", "vase", "bowl", "orange tree", "lion", "bridge",
)  # fmt: skip


def scene_questions(scene: Scene, ask: Asker) -> list[QA]:
    """Everything that can be asked about the scene, many more than one conversation needs."""
    questions: list[QA] = []
    for make in MAKERS:
        questions += make(scene, ask)
    questions += unknown_questions(ask, 2, things=[(name, thing.colour) for thing, name in names_of(scene)])
    if scene.sign:
        questions += lettering_questions(scene.sign, ask, sign=True)
    return questions


def attribute_questions(scene: Scene, ask: Asker) -> list[QA]:
    """Colour, shape, size and place of each thing that has a name of its own."""
    found = []
    for thing in scene.things:
        place = thing.place if alone_at(scene, thing) else None
        by_shape, by_colour = name_of(scene, thing, "shape"), name_of(scene, thing, "colour")
        by_any = name_of(scene, thing, "any")
        about = by_any or (place and f"@{place}")
        spot = f"the object {place_phrase(place)}" if place else None
        what = with_article(thing.shape)
        if name := (by_shape or spot):
            found.append(QA(ask("colour", name=name), f"{capital(name)} is {thing.colour}.", capital(thing.colour), "colour",
                about, (ask("colour_it"), f"It is {thing.colour}.")))  # fmt: skip
        if name := (by_colour or spot):
            found.append(QA(ask("shape", name=name), f"{capital(name)} is {what}.", capital(thing.shape), "shape", about,
                (ask("shape_it"), f"It is {what}.")))  # fmt: skip
        if by_any and thing.size:
            found.append(QA(ask("size", name=by_any), f"{capital(by_any)} is {thing.size}.", capital(thing.size), "size",
                about, (ask("size_it"), f"It is {thing.size}.")))  # fmt: skip
        if by_any and thing.place:
            where = place_phrase(thing.place)
            found.append(QA(ask("where", name=by_any), f"{capital(by_any)} is {where}.", capital(thing.place), "position",
                about, (ask("where_it"), f"It is {where}.")))  # fmt: skip
        if place:
            full, there = short_name(thing), place_phrase(place)
            found.append(QA(ask("what_at", place=there), f"There is {with_article(full)} {there}.", capital(full), "position",
                about))  # fmt: skip
    if len(scene.things) == 1:
        thing = scene.things[0]
        found.append(QA(ask("one_colour"), f"It is {thing.colour}.", capital(thing.colour), "colour"))
        found.append(QA(ask("one_shape"), f"It is {with_article(thing.shape)}.", capital(thing.shape), "shape"))
    return found


def alone_at(scene: Scene, thing: Thing) -> bool:
    """No other thing lies where the words could point to: "on the left" must not also mean the top left."""
    place = thing.place
    if place is None:
        return False
    others = [other.place for other in scene.things if other is not thing]
    if None in others:
        return False
    if " " in place or place == "centre":
        return place not in others
    return all(place not in other.split() for other in others if other)


def existence_questions(scene: Scene, ask: Asker) -> list[QA]:
    """Is there a red star? Half yes; a no is mostly a near miss (the colour or the shape is there, not both)."""
    rng = ask.rng
    pairs = sorted({(t.colour, t.shape) for t in scene.things})
    colours, shapes = sorted({c for c, _ in pairs}), sorted({s for _, s in pairs})
    near = [(c, s) for c in palette.NAMES for s in SHAPES if (c, s) not in pairs and (c in colours or s in shapes)]
    absent = [s for s in SHAPES if s not in shapes]
    elsewhere = HELD_ELSEWHERE if ask.split in ("grammar", "hand") else ELSEWHERE
    wrong = rng.choice(near) if rng.random() < 0.75 else (rng.choice(palette.NAMES), rng.choice(absent))
    found = [
        is_there(ask, " ".join(rng.choice(pairs)), True),
        is_there(ask, " ".join(wrong), False),
        is_there(ask, rng.choice(shapes), True),
        is_there(ask, rng.choice(elsewhere) if rng.random() < 0.4 else rng.choice(absent), False),
    ]
    taken = {*colours, scene.background, scene.sign.colour if scene.sign else None}
    missing = [c for c in palette.NAMES if c not in taken]
    for colour, right in [(rng.choice(colours), True), (rng.choice(missing), False)]:
        fact = f"a {colour} object"
        answer = f"Yes, there is {fact}." if right else f"No, there is no {colour} object."
        question = ask("exists_colour", colour=colour).replace("a orange", "an orange")
        found.append(QA(question, answer.replace("a orange", "an orange"), "Yes" if right else "No", "yesno_exists"))
    return found


def is_there(ask: Asker, what: str, right: bool) -> QA:
    thing = with_article(what)
    asked = ask("exists", a=thing, bare=what, many=plural(what))
    return yes_no(asked, right, f"there is {thing}", f"there is no {what}", "yesno_exists")


def check_questions(scene: Scene, ask: Asker) -> list[QA]:
    """Is the star red? Is it large? Is it at the top? One right and one wrong for a thing with a name."""
    rng, found = ask.rng, []
    for thing in rng.sample(scene.things, min(2, len(scene.things))):
        if name := name_of(scene, thing, "shape"):
            seen = [t.colour for t in scene.things if t.colour != thing.colour]  # likely mistakes
            wrong = rng.choice(seen) if seen and rng.random() < 0.5 else None
            for colour in (thing.colour, wrong or rng.choice([c for c in palette.NAMES if c != thing.colour])):
                follow = (ask("is_colour_it", colour=colour), thing.colour)
                asked = ask("is_colour", name=name, colour=colour)
                found.append(check(asked, colour == thing.colour, name, thing.colour, "yesno_colour", follow))
        name = name_of(scene, thing, "any")
        if name and thing.size:
            for size in ("small", "large"):
                follow = (ask("is_size_it", size=size), thing.size)
                asked = ask("is_size", name=name, size=size)
                found.append(check(asked, size == thing.size, name, thing.size, "yesno_size", follow))
        if name and thing.place:
            words = thing.place.split()
            wrong_sides = [w for w in ("left", "right", "top", "bottom") if w not in words]
            for side in [rng.choice(words), rng.choice(wrong_sides)]:
                asked = ask("is_at", name=name, place=place_phrase(side))
                found.append(check(asked, side in words, name, place_phrase(thing.place), "yesno_position"))
    return found


def check(
    question: str, right: bool, name: str, value: str, category: str, follow: tuple[str, str] | None = None
) -> QA:
    short = "Yes" if right else "No"
    with_it = (follow[0], f"{short}, it is {follow[1]}.") if follow else None
    return QA(question, f"{short}, {name} is {value}.", short, category, name, with_it)


def count_questions(scene: Scene, ask: Asker) -> list[QA]:
    """How many in all, of a colour, of a shape, of both; none at all now and then; and a guess to confirm."""
    rng = ask.rng
    total = len(scene.things)
    groups: list[tuple[str, str, int]] = []
    for shape in sorted({t.shape for t in scene.things}):
        groups.append((shape, plural(shape), sum(t.shape == shape for t in scene.things)))
    for colour in sorted({t.colour for t in scene.things}):
        groups.append((f"{colour} object", f"{colour} objects", sum(t.colour == colour for t in scene.things)))
    for colour, shape in sorted({(t.colour, t.shape) for t in scene.things}):
        number = sum((t.colour, t.shape) == (colour, shape) for t in scene.things)
        groups.append((f"{colour} {shape}", f"{colour} {plural(shape)}", number))
    if rng.random() < 0.4:
        absent = rng.choice([s for s in SHAPES if all(t.shape != s for t in scene.things)])
        groups.append((absent, plural(absent), 0))
    chosen = rng.sample(groups, min(3, len(groups)))
    found = []
    for one, many, number in [("object", "objects", total), *sorted(chosen, key=lambda g: -g[2])]:
        fact = there_are(one, many, number)
        found.append(QA(ask("count", many=many), capital(fact) + ".", str(number), "count"))
        if number:
            wrong = rng.choice([n for n in (number - 1, number + 1, number + 2) if n > 0 and n != number])
            for guess in (number, wrong):
                found.append(yes_no(ask_number(ask, guess, one, many), guess == number, fact, fact, "yesno_count"))
    shapes = Counter(thing.shape for thing in scene.things)
    if len(set(shapes.values())) > 1:
        (less, few), *_, (most, many_of) = sorted(shapes.items(), key=lambda pair: pair[1])
        fact = f"{there_are(most, plural(most), many_of)} and {there_are(less, plural(less), few).split(' ', 2)[2]}"
        x, y = (most, less) if rng.random() < 0.5 else (less, most)
        found.append(yes_no(ask("more_than", x=plural(x), y=plural(y)), x == most, fact, fact, "yesno_count"))
    return found


def ask_number(ask: Asker, guess: int, one: str, many: str) -> str:
    if guess == 1:
        return ask("is_one", one=one, many=many)
    number = DIGITS[guess] if ask.split == "plain" or ask.rng.random() < 0.8 else str(guess)
    return ask("is_count", claim=f"{number} {many}", many=many, number=number)


def absent_questions(scene: Scene, ask: Asker) -> list[QA]:
    """Questions that suppose something that is not there."""
    rng = ask.rng
    shape = rng.choice([s for s in SHAPES if all(t.shape != s for t in scene.things)])
    asked = ask(rng.choice(("colour", "where", "size")), name=f"the {shape}")
    found = [QA(asked, f"There is no {shape} in the picture.", f"There is no {shape}", "absent")]
    pairs = {(t.colour, t.shape) for t in scene.things}
    near = [(t.colour, s) for t in scene.things for s in SHAPES if (t.colour, s) not in pairs]
    wrong = " ".join(rng.choice(near))
    asked = ask(rng.choice(("where", "where", "size", "box")), name=f"the {wrong}")
    found.append(QA(asked, f"There is no {wrong} in the picture.", f"There is no {wrong}", "absent"))
    if not scene.sign:
        asked = ask(rng.choice(("read", "read", "read_sign")))
        found.append(QA(asked, "There is no text in the picture.", "There is no text", "absent"))
    return found


def overview_questions(scene: Scene, ask: Asker) -> list[QA]:
    rng = ask.rng
    found = [QA(ask("describe"), describe(scene), None, "describe") for _ in range(2)]
    if scene.background:
        answer = f"The background is {scene.background}."
        found.append(QA(ask("background"), answer, capital(scene.background), "background"))
    found.append(QA(ask("kind"), "This is a drawing.", "Drawing", "kind"))
    if len(scene.things) > 1:
        colours, shapes = (unlike([getattr(t, key) for t in scene.things]) for key in ("colour", "shape"))
        found.append(QA(ask("list_shapes"), f"I see {join([with_article(s) for s in shapes])}.", capital(", ".join(shapes)),
            "list_shapes"))  # fmt: skip
        found.append(
            QA(ask("list_colours"), f"The objects are {join(colours)}.", capital(", ".join(colours)), "list_colours")
        )
        if len(colours) == 1 or rng.random() < 0.35:
            fact = f"all objects are {colours[0]}" if len(colours) == 1 else "the objects have different colours"
            found.append(yes_no(ask("same_colour"), len(colours) == 1, fact, fact, "yesno_same"))
    return found


def unlike(values: Sequence[str]) -> list[str]:
    """Each value once, in alphabetical order."""
    return sorted(set(values))


def scene_caption(scene: Scene, rng: random.Random) -> str:
    """What there is; half the time with how many of each."""
    return describe(scene, count_first=rng.random() < 0.5)


MAKERS: tuple[Callable[[Scene, Asker], list[QA]], ...] = (
    attribute_questions, existence_questions, check_questions, count_questions, relation_questions, absent_questions,
    overview_questions, box_questions,
)  # fmt: skip
