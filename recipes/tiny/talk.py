"""What is said about any image: question-and-answer pairs, how they join into a conversation, and general talk.

In: facts found elsewhere (questions.py for scenes, reading.py for words, photos.py for photographs), an Asker. Out:
QA, turns of a conversation. A QA has a full answer and a short one; which is given depends on the request after the
question (wordings.request).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import wordings
from wordings import Asker

SHORT_SUFFIX = "\n" + wordings.SHORT_SUFFIX

# How often a kind of question is drawn; 1 where nothing is said.
WEIGHTS = {
    "count": 2.5, "yesno_count": 1.3, "relation": 2.5, "yesno_relation": 1.5, "size_relation": 1.5, "position": 1.5,
    "read": 4.0, "yesno_read": 2.0, "photo": 3.0, "yesno_photo": 3.0, "kind": 0.3, "unknown": 0.8, "absent": 0.7,
    "describe": 0.8, "background": 0.6, "yesno_same": 0.5, "text_kind": 0.5, "yesno_any_text": 0.7, "box": 2.0, "region": 0.7,
    "list_shapes": 0.5, "list_colours": 0.5, "yesno_exists": 2.0, "photo_count": 0.3,
}  # fmt: skip
NO_REQUEST = (
    "box",
    "region",
    "describe",
    "talk",
)  # kinds of question with one form of answer, whose question ends as it is
TWO_IN_ONE = 0.08  # share of turns


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


def yes_no(question: str, right: bool, yes: str, no: str, category: str, about: str | None = None) -> QA:
    return QA(question, f"Yes, {yes}." if right else f"No, {no}.", "Yes" if right else "No", category, about)


def converse(ask: Asker, pool: Sequence[QA], num_turns: int, weights: Mapping[str, float] = WEIGHTS) -> list[Turn]:
    """Pick questions, turn some into follow-ups with "it", join some in pairs, ask for short answers in some conversations."""
    rng = ask.rng
    chosen = spread(rng, pool, num_turns, weights)
    short_share = rng.choice((0.0, 0.0, 0.5, 1.0))
    turns: list[Turn] = []
    about: str | None = None
    while chosen:
        qa = chosen.pop(0)
        if qa.follow and about is not None and qa.about == about and rng.random() < 0.75:
            question, answer = qa.follow
            if rng.random() < 0.3 and not question.lower().startswith("and "):
                question = "And " + question[0].lower() + question[1:]
            qa = replace(qa, question=question, answer=answer)
        about = qa.about
        if chosen and joinable(qa) and joinable(chosen[0]) and ask.split != "plain" and rng.random() < TWO_IN_ONE:
            qa = join_questions(ask, qa, chosen.pop(0))
        turns.append(put(ask, qa, short=rng.random() < short_share))
    return turns


def put(ask: Asker, qa: QA, *, short: bool) -> Turn:
    """The question as it is typed, with a request for a short answer or none."""
    short = short and qa.short is not None and qa.category not in NO_REQUEST
    question = wordings.dress(ask.rng, ask.split, qa.question)
    if qa.category not in NO_REQUEST:
        yes_no = qa.short in ("Yes", "No")
        question += wordings.request(ask.rng, ask.split, "word" if short else "sentence", yes_no=yes_no)
    return Turn(question, (qa.short or "") if short else qa.answer, qa.category, short)


def joinable(qa: QA) -> bool:
    apart = (*NO_REQUEST, "unknown", "absent", "list_shapes", "list_colours")
    return qa.short is not None and qa.category not in apart and not qa.question.endswith('"')


def join_questions(ask: Asker, first: QA, second: QA) -> QA:
    """Two questions in one, answered one after the other. Its category names both."""
    question = wordings.join_two(ask.rng, ask.split, first.question, second.question)
    short = f"{first.short}, {second.short}"
    return QA(
        question, f"{first.answer} {second.answer}", short, f"two {first.category} {second.category}", second.about
    )


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

UNKNOWN_TOPICS = tuple(wordings.read_sections(wordings.GRAMMARS[1]))  # in the words of the answers
SOMETHING_ELSE = "something else"  # topics that only the held-out suite asks about
UNKNOWN_ANSWERS = (
    "I cannot tell {topic} from the picture.",
    "The picture does not show {topic}.",
    "I do not know: {topic} cannot be seen in the picture.",
)
UNKNOWN_SHORT = "I cannot tell"


def unknown_questions(ask: Asker, number: int, *, things: Sequence[tuple[str, str]] = ()) -> list[QA]:
    """Questions whose honest answer is that the image does not say; `things` are (name, colour) of things in it."""
    topics = [*UNKNOWN_TOPICS, SOMETHING_ELSE] if ask.split == "hand" else UNKNOWN_TOPICS
    found = []
    for topic in ask.rng.sample(topics, number):
        name, colour = ask.rng.choice(things) if things and ask.rng.random() < 0.5 else (None, None)
        slots = {"name": name, "colour": colour} if name and colour else {}
        said = "that" if topic == SOMETHING_ELSE else topic
        answer = ask.rng.choice(UNKNOWN_ANSWERS).format(topic=said)
        found.append(QA(ask(topic, **slots), answer, UNKNOWN_SHORT, "unknown"))
    return found


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
    return [QA(rng.choice(questions), answer, None, "talk") for questions, answer in picked]
