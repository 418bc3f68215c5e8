"""What is said about any image: question-and-answer pairs, how they join into a conversation, and general talk.

In: facts found elsewhere (questions.py for scenes and words, photos.py for photographs). Out: QA, turns of a conversation.
A QA has a full answer and a short one; which is given depends on whether the question ends with SHORT_SUFFIX.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."


# How often a kind of question is drawn; 1 where nothing is said.
WEIGHTS = {
    "count": 2.5, "yesno_count": 1.3, "relation": 2.5, "yesno_relation": 1.5, "size_relation": 1.5, "position": 1.5,
    "read": 4.0, "yesno_read": 2.0, "photo": 3.0, "yesno_photo": 3.0, "kind": 0.3, "unknown": 0.5, "absent": 0.7,
    "describe": 0.8, "background": 0.6, "yesno_same": 0.5, "text_kind": 0.5, "yesno_text": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class QA:
    """One question with its answers. `about` names what "it" means afterwards; `follow` is the pair to use then."""

    question: str
    answer: str
    short: str | None
    category: str
    about: str | None = None
    follow: tuple[str, str] | None = None


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str
    category: str
    short: bool


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def spell(rng: random.Random, question: str) -> str:
    """Both spellings of "colour" are asked."""
    return question.replace("colour", "color").replace("centre", "center") if rng.random() < 0.5 else question


def converse(
    rng: random.Random, pool: Sequence[QA], num_turns: int, weights: Mapping[str, float] = WEIGHTS
) -> list[Turn]:
    """Pick questions, turn some into follow-ups with "it", and ask for short answers in some conversations."""
    chosen = spread(rng, pool, num_turns, weights)
    short_share = rng.choice((0.0, 0.0, 0.5, 1.0))
    turns: list[Turn] = []
    about: str | None = None
    for qa in chosen:
        question, answer = qa.question, qa.answer
        if qa.follow and about is not None and qa.about == about and rng.random() < 0.75:
            question, answer = qa.follow
            if rng.random() < 0.3:
                question = "And " + question[0].lower() + question[1:]
        short = qa.short is not None and rng.random() < short_share
        if short:
            question, answer = question + SHORT_SUFFIX, qa.short or ""
        turns.append(Turn(spell(rng, question), answer, qa.category, short))
        about = qa.about
    return turns


def spread(rng: random.Random, pool: Sequence[QA], num_turns: int, weights: Mapping[str, float]) -> list[QA]:
    """Draw over categories first, so that the rare ones are seen; now and then stay with the same thing."""
    by_category: dict[str, list[QA]] = {}
    for qa in pool:
        by_category.setdefault(qa.category, []).append(qa)
    chosen: list[QA] = []
    while len(chosen) < min(num_turns, len(pool)) and by_category:
        about = chosen[-1].about if chosen else None
        same = [qa for qa in pool if about and qa.about == about and qa.follow and qa not in chosen]
        if same and rng.random() < 0.45:
            chosen.append(rng.choice(same))
            continue
        category = rng.choices(list(by_category), [weights.get(c, 1.0) for c in by_category])[0]
        rest = [qa for qa in by_category[category] if qa not in chosen]
        if not rest:
            del by_category[category]
            continue
        chosen.append(rng.choice(rest))
    return chosen


# --- what an image cannot tell -------------------------------------------------------------------------------------

UNKNOWN_TOPICS: dict[str, tuple[str, ...]] = {
    "who made it": ("Who drew this?", "Who made this picture?", "Who is the artist?", "Who painted this?",
        "Who created this image?"),
    "when it was made": ("When was this made?", "What year is this from?", "How old is this picture?",
        "On what day was this made?"),
    "where it was made": ("Where was this made?", "Which country is this from?", "In which city was this made?"),
    "what it costs": ("How much does this cost?", "What is the price of this picture?", "How much is it worth?"),
    "what will happen next": ("What will happen next?", "What happens after this?", "What will it look like tomorrow?"),
    "what happened before": ("What happened before this?", "What was here yesterday?"),
    "why it was made": ("Why was this made?", "What is the purpose of this picture?", "What was the artist thinking?"),
    "anyone's name": ("What is the name of the person?", "What is the owner's name?", "Who does this belong to?",
        "What is his name?", "What is her name?"),
    "how it sounds": ("What sound can be heard here?", "What music is playing?", "How does it sound?"),
    "how it smells or tastes": ("What does it smell like?", "How does it taste?"),
    "how heavy it is": ("How heavy is it?", "What does it weigh?", "How many kilograms is this?"),
    "what is outside the picture": ("What is outside the picture?", "What is on the other side of it?",
        "What is behind the camera?"),
    "how long it took": ("How long did this take?", "How many hours did it take to make this?"),
    "anyone's telephone number or address": ("What is the telephone number of the owner?", "What is the address?"),
    "what it feels": ("What is it thinking?", "Is it happy?", "What is its favourite food?"),
    "how warm it is": ("What is the temperature?", "How warm is it there?"),
}  # fmt: skip
HELD_UNKNOWN = {
    "Who painted this?", "How old is this picture?", "In which city was this made?", "How much is it worth?",
    "What happens after this?", "Who does this belong to?", "What music is playing?", "What does it weigh?",
    "What is behind the camera?", "How many hours did it take to make this?",
}  # fmt: skip
UNKNOWN_ANSWERS = (
    "I cannot tell {topic} from the picture.",
    "The picture does not show {topic}.",
    "I do not know: {topic} cannot be seen in the picture.",
)
UNKNOWN_SHORT = "I cannot tell"


def unknown_questions(rng: random.Random, *, held: bool = False, things: Sequence[str] = ()) -> list[QA]:
    """Questions whose honest answer is that the image does not say. `things` are names seen in it ("the red star")."""
    pairs = []
    for topic, questions in UNKNOWN_TOPICS.items():
        pairs += [(topic, question) for question in questions if (question in HELD_UNKNOWN) == held]
    for thing in things:
        pairs.append((f"what is behind {thing}", f"What is behind {thing}?"))
        pairs.append((f"who made {thing}", f"Who made {thing}?"))
        pairs.append((f"what {thing} weighs", f"How heavy is {thing}?"))
        pairs.append((f"what {thing} costs", f"How much does {thing} cost?"))
    return [QA(q, rng.choice(UNKNOWN_ANSWERS).format(topic=topic), UNKNOWN_SHORT, "unknown") for topic, q in pairs]


# --- talk without an image -----------------------------------------------------------------------------------------

WHAT_I_DO = (
    "I can answer questions about a picture: the colours, shapes, sizes, places and number of drawn things, "
    "a short word or number written in it, and what a small photograph shows."
)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning", "Good evening!"),
        "Hello! How can I help you with a picture?"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am a small vision assistant, trained on drawings, short words and photographs."),
    (("What can you do?", "What can I ask you?", "How can you help me?", "Help", "What do you know?"), WHAT_I_DO),
    (("How are you?", "How do you do?", "How is it going?"), "I am well, thank you. Which picture shall we look at?"),
    (("Thank you", "Thanks!", "Thank you very much.", "Great, thanks"), "You are welcome."),
    (("Goodbye", "Bye", "See you later!", "Good night"), "Goodbye!"),
    (("Are you a human?", "Are you a person?", "Are you real?"), "No, I am a small computer program."),
    (("Are you ready?", "Can you see pictures?", "Can you look at a picture?"), "Yes, please show me a picture."),
    (("Tell me a joke.", "Tell me a story.", "Write a poem.", "Sing a song."),
        "I am too small for that, but I can tell you what is in a picture."),
    (("What is the weather today?", "What time is it?", "What day is it?", "Who is the president?",
        "What is the news?"), "I do not know that. I only know what I see in a picture."),
    (("Which colours do you know?", "What colours can you name?"),
        "I know red, orange, yellow, green, blue, purple, pink, brown, black, white and grey."),
    (("Which shapes do you know?", "What shapes can you name?"),
        "I know circles, squares, triangles, stars, hearts, diamonds, crosses, hexagons, rings and crescents."),
    (("Which photographs do you know?", "What can you see in photographs?"),
        "I know airplanes, cars, birds, cats, deer, dogs, frogs, horses, ships and trucks."),
    (("How many corners does a square have?", "How many sides does a square have?"), "A square has four."),
    (("How many corners does a triangle have?", "How many sides does a triangle have?"), "A triangle has three."),
    (("How many sides does a hexagon have?", "How many corners does a hexagon have?"), "A hexagon has six."),
    (("How many corners does a circle have?",), "A circle has none."),
    (("How many legs does a cat have?", "How many legs does a dog have?", "How many legs does a horse have?"),
        "It has four legs."),
    (("How many legs does a bird have?",), "A bird has two legs."),
    (("What colour is the sky?",), "The sky is often blue."),
    (("What colour is grass?",), "Grass is green."),
    (("What is in the picture?", "What do you see?", "Describe the picture.", "What colour is it?",
        "What does it say?", "How many are there?"), "I see no picture. Please show me one."),
    (("Yes", "No", "Ok", "Okay", "Good"), "Good. What would you like to know about the picture?"),
)  # fmt: skip


def small_talk(rng: random.Random) -> list[QA]:
    """A few lines of talk without any image."""
    picked = rng.sample(SMALL_TALK, rng.randint(1, 3))
    return [QA(casual(rng, rng.choice(questions)), answer, None, "talk") for questions, answer in picked]


def casual(rng: random.Random, question: str) -> str:
    """As people type it: sometimes all in lower case, sometimes without the mark at the end."""
    if rng.random() < 0.2:
        question = question.lower()
    return question.rstrip("?.!") if rng.random() < 0.15 else question


def loosen(rng: random.Random, qas: Sequence[QA]) -> list[QA]:
    """The same questions, one in eight as casually typed."""
    return [replace(qa, question=casual(rng, qa.question)) if rng.random() < 0.12 else qa for qa in qas]
