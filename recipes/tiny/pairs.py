"""Two images in one question: about the first or the second, and about both.

In: two samples (samples.py) and an Asker. Out: QA (talk.py). The images go to the model in their order, before the question.
"""

from __future__ import annotations

from dataclasses import dataclass

from talk import QA, with_article, yes_no
from wordings import Asker, capital, insert

NTH = (("first", "one"), ("second", "two"))
# Kinds of question that ask about one image as well beside another.
ASKED_OF_ONE = ("colour", "shape", "count", "read", "photo", "yesno_exists", "yesno_photo", "position", "background", "kind",
    "text_colour", "chart_most", "chart_count", "size")  # fmt: skip


@dataclass(frozen=True)
class Side:
    """What pair questions need to know of one of the two images."""

    questions: list[QA]
    num_things: int | None  # in a drawn scene
    things: frozenset[str]  # what it shows ("red star", "star", "cat")


def pair_questions(first: Side, second: Side, ask: Asker) -> list[QA]:
    found = []
    for number, side in enumerate((first, second)):
        asked = [qa for qa in side.questions if qa.category in ASKED_OF_ONE]
        for qa in ask.rng.sample(asked, min(6, len(asked))):
            found.append(of_one(qa, number, ask))
    found += which_questions(first, second, ask)
    if first.num_things is not None and second.num_things is not None:
        found += count_questions(first.num_things, second.num_things, ask)
    return found


def of_one(qa: QA, number: int, ask: Asker) -> QA:
    nth, digit = NTH[number]
    shown = digit if ask.split == "plain" or ask.rng.random() < 0.5 else str(number + 1)
    asked = insert(ask.rng, "nth", ask.split, qa.question, nth=nth, digit=shown)
    return QA(asked, qa.answer, qa.short, qa.category)


def which_questions(first: Side, second: Side, ask: Asker) -> list[QA]:
    """Which shows a cat? Do both show a circle? One yes and one no, where there is something for it."""
    rng, found = ask.rng, []
    for own, other, nth in ((first, second, "first"), (second, first, "second")):
        if only := sorted(own.things - other.things):
            what = rng.choice(only)
            a = with_article(what)
            found.append(QA(ask("pair_which", a=a), f"The {nth} picture shows {a}.", capital(nth), "pair_which"))
    shared, some = sorted(first.things & second.things), sorted(first.things ^ second.things)
    for things, right in ((shared, True), (some, False)):
        if things and shared:
            a = with_article(rng.choice(things))
            yes = f"both pictures show {a}"
            found.append(yes_no(ask("pair_both", a=a), right, yes, f"only one of them shows {a}", "yesno_pair"))
    return found


def count_questions(first: int, second: int, ask: Asker) -> list[QA]:
    found = []
    if first != second:
        nth = "first" if first > second else "second"
        found.append(QA(ask("pair_more"), f"The {nth} picture has more objects.", capital(nth), "pair_more"))
    if first == second or ask.rng.random() < 0.25:
        fact = "both have the same number" if first == second else "they have different numbers of objects"
        found.append(yes_no(ask("pair_same_count"), first == second, fact, fact, "yesno_pair"))
    return found
