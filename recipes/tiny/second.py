"""The second round of training: what the first one leaves hard, and short conversations, so that more images are seen.

In: samples as samples.py draws them. Out: harder ones of the same kind, with more questions about them, and their turns.
Reading and counting get most of it; "is there any text?" is asked where there is none; questions that no image answers
come in many more wordings (those of talk.HELD_UNKNOWN stay held out).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import palette
import talk
from samples import Sample
from scenes import SHAPES
from talk import HELD_UNKNOWN, QA, UNKNOWN_ANSWERS, UNKNOWN_SHORT, Turn, with_article

RESHAPED = 0.3  # share of images on wider or higher sheets

WEIGHTS = talk.WEIGHTS | {
    "read": 9.0, "yesno_read": 3.0, "count": 4.0, "yesno_count": 2.0, "relation": 3.0, "unknown": 1.6, "yesno_any_text": 0.8,
    "photo": 4.0, "describe": 1.5,
}  # fmt: skip
TURNS = {"text": (1, 2), "sign": (1, 3), "scene": (2, 4), "photo": (1, 4), "talk": (1, 3)}

# ruff: noqa: E501  (a table reads better with a topic to a line)
MORE_UNKNOWN: dict[str, tuple[str, ...]] = {
    "who made it": ("Who is the painter?", "Who designed this?", "Who took this picture?", "Whose work is this?", "Who is the author?", "What is the artist's name?", "Do you know who made this?", "Which artist made it?"),
    "when it was made": ("When was it drawn?", "What is the date of this picture?", "Is this picture old?", "In which century was this made?", "How many years ago was this made?", "When was this picture taken?", "What time was it made?"),
    "where it was made": ("Where is this?", "What place is this?", "Which town is this from?", "In which country was it made?", "Where does this picture come from?", "What is the name of this place?", "Which city is this?"),
    "what it costs": ("What does it cost?", "Is it expensive?", "How many dollars is this?", "What would it sell for?", "How much money is it?", "Can I buy it?", "What is its value?", "How much did you pay for it?"),
    "what will happen next": ("What comes next?", "What will happen later?", "What happens tomorrow?", "How does it end?", "What will it do next?", "What is going to happen?", "What will come after this?"),
    "what happened before": ("What happened a minute ago?", "What was there before?", "What came before this?", "What did it look like last year?"),
    "why it was made": ("Why is it there?", "Why did somebody draw this?", "What is it for?", "What does the artist want to say?", "What was the reason for this?", "Why does this exist?"),
    "anyone's name": ("Who is this person?", "What is this person called?", "Who owns this?", "Whose is it?", "Who is the owner?", "What is the name of the owner?", "Who does it belong to?"),
    "how it sounds": ("What noise does it make?", "What can I hear?", "Is it loud?", "Which song is this?", "Is there music?", "What song is being played?", "Is it quiet?"),
    "how it smells or tastes": ("Does it smell good?", "Is it sweet?", "What is its taste?", "How does it smell?", "Does it taste good?"),
    "how heavy it is": ("What is its weight?", "Is it heavy?", "How many pounds does it weigh?", "How much does it weigh?", "Is it light or heavy?", "What is the weight of this?"),
    "what is outside the picture": ("What is next to the picture?", "What is outside the frame?", "What is beyond the edge?", "What is behind the picture?", "Who is behind the camera?", "Who is standing outside the picture?"),
    "how long it took": ("How much time did it take?", "How long did it take to draw?", "Was it made quickly?", "How many days did this take?", "How many minutes did it take?", "How much work was this?"),
    "anyone's telephone number or address": ("What is the phone number?", "What is your address?", "Where does the owner live?", "What is the email address of the artist?"),
    "what it feels": ("Is it sad?", "What does it want?", "Does it like music?", "What is its mood?", "Is it afraid?", "What does it dream of?"),
    "how warm it is": ("Is it cold there?", "Is it hot?", "What is the weather like?", "How many degrees is it?", "Is it raining outside?"),
    "what it is made of": ("What is it made of?", "Is it made of wood?", "Which material is this?", "Is it plastic or metal?", "What material is it?"),
    "how old it is": ("How old is it?", "What is its age?", "Is it young or old?", "When is its birthday?"),
    "how fast it is": ("How fast is it?", "What is its speed?", "Is it moving?", "How far can it go?"),
    "how large it is in reality": ("How many metres is it?", "How tall is it in centimetres?", "What is its real size?", "How wide is it in inches?"),
}  # fmt: skip
ANY_TEXT = (
    "Is there any text in the picture?",
    "Is anything written in the picture?",
    "Do you see any text?",
    "Is there text here?",
)


def harder(sample: Sample, rng: random.Random, redraw: Callable[[int], Sample], seed: int) -> Sample:
    """The sample, or where a scene has few things to count, mostly another one; with more questions."""
    attempt = 0
    while sample.kind == "scene" and int(sample.truth) < 3 and rng.random() < 0.6:
        attempt += 1
        sample = redraw(seed + attempt * 1_000_000_000)
    return replace(sample, questions=[*thin_counts(sample.questions, rng), *more_questions(sample, rng)])


def thin_counts(questions: list[QA], rng: random.Random) -> list[QA]:
    """Counts of one and of none are easy and plenty: most of them go."""
    return [qa for qa in questions if qa.category != "count" or qa.short not in ("0", "1") or rng.random() < 0.2]


def more_questions(sample: Sample, rng: random.Random) -> list[QA]:
    if sample.kind == "talk":
        return []
    found = unanswerable(rng, 2)
    written = next((qa for qa in sample.questions if qa.category == "read"), None)
    asked = rng.choice(ANY_TEXT)
    if written is None:
        found.append(QA(asked, "No, there is no text.", "No", "yesno_any_text"))
    else:
        found.append(QA(asked, f'Yes, it says "{written.short}".', "Yes", "yesno_any_text", "text"))
    if sample.kind == "photo":
        what = f"{rng.choice(palette.NAMES)} {rng.choice(SHAPES)}"
        asked = rng.choice((f"Is there {with_article(what)}?", f"Do you see {with_article(what)}?"))
        found.append(QA(asked, f"No, there is no {what}.", "No", "yesno_exists"))
    return found


def unanswerable(rng: random.Random, number: int) -> list[QA]:
    pairs = [(topic, question) for topic, questions in MORE_UNKNOWN.items() for question in questions]
    pairs += [(topic, question) for topic, questions in talk.UNKNOWN_TOPICS.items() for question in questions]
    picked = rng.sample([pair for pair in pairs if pair[1] not in HELD_UNKNOWN], number)
    return [QA(q, rng.choice(UNKNOWN_ANSWERS).format(topic=topic), UNKNOWN_SHORT, "unknown") for topic, q in picked]


def converse(rng: random.Random, sample: Sample) -> list[Turn]:
    """A short conversation, in which a text is nearly always read."""
    turns = talk.converse(rng, sample.questions, rng.randint(*TURNS[sample.kind]), WEIGHTS)
    reading = [qa for qa in sample.questions if qa.category == "read"]
    if reading and not any(turn.category in ("read", "describe") for turn in turns) and rng.random() < 0.9:
        turns[-1] = talk.converse(rng, reading, 1)[0]
    return turns
