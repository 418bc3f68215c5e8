"""Questions about drawn scenes and rendered words, with answers that are right by construction.

In: Scene or Lettering and a random generator. Out: lists of QA (talk.py) and captions.
A question is only made where the scene has clear margins: places off the borders, sizes far apart, names that fit one thing.
Questions that take "it" (follow-ups) carry the wording for that; yes/no questions come as a yes and a no, equally often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import palette
from lettering import Lettering
from relations import relation_questions
from scenes import SHAPES, Scene, Thing
from talk import QA, capital, unknown_questions, with_article
from wording import DIGITS, describe, name_of, names_of, place_phrase, plural, short_name, unique

YesNo = Iterator[QA]


def scene_questions(scene: Scene, rng: random.Random, *, held: bool = False) -> list[QA]:
    """Everything that can be asked about the scene, many more than one conversation needs."""
    questions: list[QA] = []
    for make in MAKERS:
        questions += make(scene, rng)
    questions += rng.sample(unknown_questions(rng, held=held, things=names_of(scene)[:2]), 2)
    if scene.sign:
        questions += lettering_questions(scene.sign, rng, sign=True)
    return questions


def attribute_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """Colour, shape, size and place of each thing that has a name of its own."""
    found = []
    for thing in scene.things:
        place = thing.place if alone_at(scene, thing) else None
        by_shape = name_of(scene, thing, "shape")
        by_colour = name_of(scene, thing, "colour")
        by_any = name_of(scene, thing, "any")
        about = by_any or (place and f"@{place}")
        spot = f"the object {place_phrase(place)}" if place else None
        if name := (by_shape or spot):
            follow = ("What colour is it?", f"It is {thing.colour}.")
            asked = rng.choice(
                (f"What colour is {name}?", f"What is the colour of {name}?", f"Which colour is {name}?")
            )
            found.append(
                QA(asked, f"{capital(name)} is {thing.colour}.", capital(thing.colour), "colour", about, follow)
            )
        if name := (by_colour or spot):
            what = with_article(thing.shape)
            follow = ("What shape is it?", f"It is {what}.")
            asked = rng.choice((f"What shape is {name}?", f"What is the shape of {name}?", f"Which shape is {name}?"))
            found.append(QA(asked, f"{capital(name)} is {what}.", capital(thing.shape), "shape", about, follow))
        if by_any:
            follow = (
                rng.choice(("Is it small or large?", "How big is it?", "What size is it?")),
                f"It is {thing.size}.",
            )
            asked = rng.choice((f"Is {by_any} small or large?", f"How big is {by_any}?", f"What size is {by_any}?"))
            found.append(QA(asked, f"{capital(by_any)} is {thing.size}.", capital(thing.size), "size", about, follow))
        if by_any and thing.place:
            where = place_phrase(thing.place)
            follow = (rng.choice(("Where is it?", "Where is it in the picture?")), f"It is {where}.")
            asked = rng.choice((f"Where is {by_any}?", f"Where in the picture is {by_any}?"))
            found.append(QA(asked, f"{capital(by_any)} is {where}.", capital(thing.place), "position", about, follow))
        if place:
            full = short_name(thing)
            asked = rng.choice((f"What is {place_phrase(place)}?", f"What do you see {place_phrase(place)}?"))
            found.append(
                QA(asked, f"There is {with_article(full)} {place_phrase(place)}.", capital(full), "position", about)
            )
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


def existence_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """Is there a red star? Half yes; a no is mostly a near miss (the colour or the shape is there, not both)."""
    found = []
    pairs = {(t.colour, t.shape) for t in scene.things}
    colours, shapes = sorted({c for c, _ in pairs}), sorted({s for _, s in pairs})
    yes = [(c, s) for c, s in sorted(pairs)]
    near = [(c, s) for c in palette.NAMES for s in SHAPES if (c, s) not in pairs and (c in colours or s in shapes)]
    for what, right in [(rng.choice(yes), True), (rng.choice(near), False)]:
        found.append(is_there(rng, f"{what[0]} {what[1]}", right))
    absent = [s for s in SHAPES if s not in shapes]
    for shape, right in [(rng.choice(shapes), True), (rng.choice(absent), False)]:
        found.append(is_there(rng, shape, right))
    missing = [
        c
        for c in palette.NAMES
        if c not in colours and c != scene.background and (not scene.sign or c != scene.sign.colour)
    ]
    for colour, right in [(rng.choice(colours), True), (rng.choice(missing), False)]:
        found.append(is_there(rng, f"{colour} {rng.choice(('object', 'shape'))}", right))
    return found


def is_there(rng: random.Random, what: str, right: bool) -> QA:
    thing = with_article(what)
    asked = rng.choice(
        (
            f"Is there {thing}?",
            f"Is there {thing} in the picture?",
            f"Do you see {thing}?",
            f"Can you see {thing} in the image?",
        )
    )
    return yes_no(asked, right, f"there is {thing}", f"there is no {what}", "yesno_exists")


def yes_no(question: str, right: bool, yes: str, no: str, category: str, about: str | None = None) -> QA:
    return QA(question, f"Yes, {yes}." if right else f"No, {no}.", "Yes" if right else "No", category, about)


def check_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """Is the star red? Is it large? Is it at the top? One right and one wrong for a thing with a name."""
    found = []
    for thing in rng.sample(scene.things, min(2, len(scene.things))):
        if name := name_of(scene, thing, "shape"):
            for colour in (thing.colour, rng.choice([c for c in palette.NAMES if c != thing.colour])):
                right = colour == thing.colour
                fact = f"{name} is {thing.colour}"
                found.append(
                    with_it(yes_no(f"Is {name} {colour}?", right, fact, fact, "yesno_colour", name), name, thing.colour)
                )
        if name := name_of(scene, thing, "any"):
            for size in ("small", "large"):
                fact = f"{name} is {thing.size}"
                found.append(
                    with_it(
                        yes_no(f"Is {name} {size}?", size == thing.size, fact, fact, "yesno_size", name),
                        name,
                        thing.size,
                    )
                )
        if (name := name_of(scene, thing, "any")) and thing.place:
            words = thing.place.split()
            wrong = [w for w in ("left", "right", "top", "bottom") if w not in words]
            for side in [rng.choice(words), rng.choice(wrong)]:
                fact = f"{name} is {place_phrase(thing.place)}"
                found.append(
                    yes_no(f"Is {name} {place_phrase(side)}?", side in words, fact, fact, "yesno_position", name)
                )
    return found


def with_it(qa: QA, name: str, value: str) -> QA:
    """Add the wording with "it"."""
    answer = f"{qa.short}, it is {value}."
    return QA(qa.question, qa.answer, qa.short, qa.category, qa.about, (qa.question.replace(name, "it"), answer))


def count_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """How many in all, of a colour, of a shape, of both; none at all now and then; and a guess to confirm."""
    total = len(scene.things)
    groups: list[tuple[str, str, int]] = [("object", "objects", total)]
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
    groups = [groups[0], *sorted(rng.sample(groups[1:], min(3, len(groups) - 1)), key=lambda g: -g[2])]
    found = []
    for one, many, number in groups:
        asked = rng.choice(
            (
                f"How many {many} are there?",
                f"How many {many} do you see?",
                f"How many {many} are in the picture?",
                f"Count the {many}.",
            )
        )
        fact = there_are(one, many, number)
        found.append(QA(asked, capital(fact) + ".", str(number), "count"))
        if number:
            wrong = rng.choice([n for n in (number - 1, number + 1, number + 2) if n > 0 and n != number])
            for guess in (number, wrong):
                claim = f"{DIGITS[guess]} {one if guess == 1 else many}"
                asked = f"Are there {claim}?" if guess != 1 else f"Is there exactly one {one}?"
                found.append(yes_no(asked, guess == number, fact, fact, "yesno_count"))
    return found


def there_are(one: str, many: str, number: int) -> str:
    if number == 0:
        return f"there are no {many}"
    return f"there is one {one}" if number == 1 else f"there are {DIGITS[number]} {many}"


def absent_questions(scene: Scene, rng: random.Random) -> list[QA]:
    """Questions that suppose something that is not there."""
    shape = rng.choice([s for s in SHAPES if all(t.shape != s for t in scene.things)])
    answer = f"There is no {shape} in the picture."
    asked = (
        f"What colour is the {shape}?",
        f"Where is the {shape}?",
        f"How big is the {shape}?",
        f"Is the {shape} small or large?",
    )
    found = [QA(rng.choice(asked), answer, f"There is no {shape}", "absent")]
    pairs = {(t.colour, t.shape) for t in scene.things}
    near = [(t.colour, s) for t in scene.things for s in SHAPES if (t.colour, s) not in pairs]
    colour, other = rng.choice(near)
    wrong = f"{colour} {other}"
    found.append(QA(f"Where is the {wrong}?", f"There is no {wrong} in the picture.", f"There is no {wrong}", "absent"))
    if not scene.sign:
        asked_text = rng.choice(
            (
                "What does the text say?",
                "What word is written in the picture?",
                "What does it say?",
                "What does the sign say?",
            )
        )
        found.append(QA(asked_text, "There is no text in the picture.", "There is no text", "absent"))
    return found


def overview_questions(scene: Scene, rng: random.Random) -> list[QA]:
    found = []
    for asked in DESCRIBE:
        found.append(QA(asked, describe(scene), None, "describe"))
    found = rng.sample(found, 2)
    if scene.background:
        asked = rng.choice(
            ("What colour is the background?", "Which colour is behind the objects?", "What is the background colour?")
        )
        found.append(QA(asked, f"The background is {scene.background}.", capital(scene.background), "background"))
    asked = rng.choice(("Is this a photograph or a drawing?", "Is this a drawing or a photograph?"))
    found.append(QA(asked, "This is a drawing.", "Drawing", "kind"))
    if len(scene.things) > 1 and (len({t.colour for t in scene.things}) == 1 or rng.random() < 0.35):
        colours = sorted({t.colour for t in scene.things})
        same = len(colours) == 1
        fact = f"all objects are {colours[0]}" if same else "the objects have different colours"
        found.append(yes_no("Do all objects have the same colour?", same, fact, fact, "yesno_same"))
    return found


DESCRIBE = (
    "Describe this image.",
    "Describe the picture.",
    "What is in the picture?",
    "What do you see?",
    "What does the picture show?",
    "Describe the image in detail.",
    "What is in this image?",
)


def lettering_questions(text: Lettering, rng: random.Random, *, sign: bool = False) -> list[QA]:
    """Reading. `sign` is for a word in a scene."""
    noun = "number" if text.is_number else "word"
    quoted = f'"{text.text}"'
    asks = [
        f"What {noun} is written in the picture?",
        f"What is the {noun} in the picture?",
        f"Which {noun} do you see?",
        f"Read the {noun}.",
        f"What {noun} is this?",
    ]
    general = [
        "What does the text say?",
        "What does the picture say?",
        "What is written here?",
        "Read the text.",
        "What is written in the image?",
        "What text is in the image?",
    ]
    general += ["What does the sign say?"] if sign or text.plate_rgb else ["What does it say?"]
    found = [
        QA(rng.choice(asks), f"The {noun} is {quoted}.", text.text, "read", "text"),
        QA(rng.choice(general), f"It says {quoted}.", text.text, "read", "text", ("What does it say?", f"It says {quoted}.")),
        QA(f"What colour is the {rng.choice((noun, 'text'))}?", f"The {noun} is {text.colour}.", capital(text.colour),
            "text_colour", "text", ("What colour is it?", f"It is {text.colour}.")),
        QA("Is it a word or a number?" if not sign else "Is the text a word or a number?", f"It is a {noun}.",
            capital(noun), "text_kind", "text"),
    ]  # fmt: skip
    right = rng.random() < 0.5
    guess = text.text if right else misread(text.text, rng)
    asked = rng.choice(
        (f'Does it say "{guess}"?', f'Is the {noun} "{guess}"?', f'Is "{guess}" written in the picture?')
    )
    found.append(yes_no(asked, right, f"it says {quoted}", f"it says {quoted}", "yesno_read", "text"))
    first = text.text[0]
    part = "digit" if text.is_number else "letter"
    if len(text.text) > 1:
        found.append(QA(f"What is the first {part}?", f'The first {part} is "{first}".', first, "read_part", "text"))
        count = len(text.text)
        plural_part = f"{part}s"
        found.append(
            QA(
                f"How many {plural_part} does it have?",
                f"It has {DIGITS[count]} {plural_part}.",
                str(count),
                "read_part",
                "text",
            )
        )
    if not sign:
        found += [
            QA(
                rng.choice(DESCRIBE),
                f"The picture shows the {noun} {quoted} in {text.colour} letters.",
                None,
                "describe",
                "text",
            ),
            QA("Is this a photograph or a drawing?", "This is a drawing.", "Drawing", "kind"),
            yes_no("Is there any text in the picture?", True, f"it says {quoted}", "", "yesno_text", "text"),
            rng.choice(absent_in_lettering(rng)),
            *rng.sample(unknown_questions(rng), 1),
        ]
    return found


def absent_in_lettering(rng: random.Random) -> list[QA]:
    shape = rng.choice(SHAPES)
    return [
        QA(f"What colour is the {shape}?", f"There is no {shape} in the picture.", f"There is no {shape}", "absent"),
        yes_no(f"Is there {with_article(shape)}?", False, "", f"there is no {shape}", "yesno_exists"),
        QA(f"How many {plural(shape)} are there?", f"There are no {plural(shape)}.", "0", "count"),
    ]


def misread(text: str, rng: random.Random) -> str:
    """Another text of the same kind, one character off or wholly different."""
    alphabet = "0123456789" if text.isdigit() else "abcdefghijklmnopqrstuvwxyz"
    place = rng.randrange(len(text))
    other = rng.choice([c for c in alphabet if c != text[place].lower()])
    if rng.random() < 0.4:
        return "".join(match_case(rng.choice(alphabet.replace(c.lower(), "")), c) for c in text)
    return text[:place] + match_case(other, text[place]) + text[place + 1 :]


def match_case(letter: str, like: str) -> str:
    return letter.upper() if like.isupper() else letter


def lettering_caption(text: Lettering, rng: random.Random) -> str:
    noun = "number" if text.is_number else "word"
    return rng.choice(
        ('The {n} "{t}" in {c} letters.', 'A picture of the {n} "{t}" in {c}.', 'It says "{t}" in {c}.')
    ).format(n=noun, t=text.text, c=text.colour)


def scene_caption(scene: Scene, rng: random.Random) -> str:
    """What there is; half the time with how many of each."""
    return describe(scene, count_first=rng.random() < 0.5)


MAKERS: tuple[Callable[[Scene, random.Random], list[QA]], ...] = (
    attribute_questions, existence_questions, check_questions, count_questions, relation_questions,
    absent_questions, overview_questions,
)  # fmt: skip

__all__ = ["lettering_caption", "lettering_questions", "scene_caption", "scene_questions", "unique"]
