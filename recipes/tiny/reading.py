"""Questions about rendered words and numbers, alone in an image or beside drawn things.

In: Lettering and an Asker (wordings.py). Out: QA (talk.py) and captions.
"""

from __future__ import annotations

import random

import lettering
from lettering import Lettering
from shapes import SHAPES
from talk import QA, unknown_questions, with_article, yes_no
from wording import DIGITS, plural
from wordings import Asker, capital


def lettering_questions(text: Lettering, ask: Asker, *, sign: bool = False) -> list[QA]:
    """Reading. `sign` is for a word in a scene."""
    noun, part = ("number", "digit") if text.is_number else ("word", "letter")
    quoted, rng = f'"{text.text}"', ask.rng
    says = f"It says {quoted}."
    general = "read_sign" if (sign or text.plate_rgb) and rng.random() < 0.4 else "read"
    found = [
        QA(ask("read_noun", noun=noun), f"The {noun} is {quoted}.", text.text, "read", "text"),
        QA(ask(general), says, text.text, "read", "text", (ask("read"), says)),
        QA(ask("text_colour", noun=noun), f"The {noun} is {text.colour}.", capital(text.colour), "text_colour", "text",
            (ask("colour_it"), f"It is {text.colour}.")),
        QA(ask("text_kind"), f"It is a {noun}.", capital(noun), "text_kind", "text"),
    ]  # fmt: skip
    right = rng.random() < 0.5
    guess = text.text if right else misread(text.text, rng)
    asked = ask("is_text", text=guess, noun=noun)
    found.append(yes_no(asked, right, f"it says {quoted}", f"it says {quoted}", "yesno_read", "text"))
    if len(text.text) > 1:
        first, count = text.text[0], len(text.text)
        found.append(QA(ask("first_letter", part=part, noun=noun), f'The first {part} is "{first}".', first, "read_part",
            "text"))  # fmt: skip
        found.append(QA(ask("num_letters", part=part, noun=noun), f"It has {DIGITS[count]} {part}s.", str(count), "read_part",
            "text"))  # fmt: skip
    if not sign:
        shown = f"The picture shows the {noun} {quoted} in {text.colour} letters."
        found += [
            QA(ask("describe"), shown, None, "describe", "text"),
            QA(ask("kind"), "This is a drawing.", "Drawing", "kind"),
            yes_no(ask("any_text"), True, f"it says {quoted}", "", "yesno_any_text", "text"),
            rng.choice(absent_in_lettering(ask)),
            *unknown_questions(ask, 1),
        ]
    return found


def absent_in_lettering(ask: Asker) -> list[QA]:
    shape = ask.rng.choice(SHAPES)
    a, many = with_article(shape), plural(shape)
    return [
        QA(
            ask("colour", name=f"the {shape}"), f"There is no {shape} in the picture.", f"There is no {shape}", "absent"
        ),
        yes_no(ask("exists", a=a, bare=shape, many=many), False, "", f"there is no {shape}", "yesno_exists"),
        QA(ask("count", many=many), f"There are no {many}.", "0", "count"),
    ]


def misread(text: str, rng: random.Random) -> str:
    """Another text: one character off, one left out, another word, or wholly different."""
    alphabet = "0123456789" if text.isdigit() else "abcdefghijklmnopqrstuvwxyz"
    place = rng.randrange(len(text))
    other = rng.choice([c for c in alphabet if c != text[place].lower()])
    kind = rng.random()
    if kind < 0.25:
        return "".join(match_case(rng.choice(alphabet.replace(c.lower(), "")), c) for c in text)
    if kind < 0.5 and not text.isdigit():
        word = rng.choice([w for w in lettering.WORDS if w.lower() != text.lower()])
        return word.upper() if text.isupper() and len(text) > 1 else capital(word) if text[0].isupper() else word
    if kind < 0.6 and len(text) > 2:
        return text[:place] + text[place + 1 :]
    return text[:place] + match_case(other, text[place]) + text[place + 1 :]


def match_case(letter: str, like: str) -> str:
    return letter.upper() if like.isupper() else letter


def lettering_caption(text: Lettering, rng: random.Random) -> str:
    noun = "number" if text.is_number else "word"
    return rng.choice(
        ('The {n} "{t}" in {c} letters.', 'A picture of the {n} "{t}" in {c}.', 'It says "{t}" in {c}.')
    ).format(n=noun, t=text.text, c=text.colour)
