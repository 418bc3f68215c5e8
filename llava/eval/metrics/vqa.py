"""Score short answers as VQAv2, VizWiz and TextVQA do: normalised text, agreement with ten people, and ANLS.

In: an answer and the reference answers. Out: a score from 0 to 1. The normalisation is EvalAI's with its quirks, since
published scores were computed with them: only the first 32 full stops of an answer are removed, a comma between digits
removes every punctuation character, and "one's" becomes "1 's". `strict=False` turns the first two off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from llava.errors import InputError

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
OFFICIAL_STOPS = 32  # the official code passes a flag where the number of replacements goes, and re.UNICODE is 32
NUM_PEOPLE = 10


def _with_apostrophe(words: str) -> dict[str, str]:
    """Map misspelt contractions to the right spelling: without apostrophes, or with any one of two left out."""
    table = {}
    for word in words.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        table[word.replace("'", "")] = word
        if len(places) == 2:
            for place in places:
                table[word[:place] + word[place + 1 :]] = word
            del table[word.replace("'", "")]
    return table


# The official table of corrections; its own mistakes are the entries at the end.
CONTRACTIONS = {
    **_with_apostrophe(
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't "
        "should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's "
        "there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's "
        "what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't "
        "y'all you'd you'll you're you've "
        "couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
        "something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll"
    ),
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


@lru_cache(maxsize=65536)
def normalise(answer: str, *, strict: bool = True) -> str:
    """Normalise an answer as EvalAI's servers do; `strict=False` without two quirks of their code."""
    return drop_articles(drop_punctuation(split_words(answer).replace("\n", " ").replace("\t", " ").strip(), strict))


def split_words(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def drop_punctuation(text: str, strict: bool = True) -> str:
    """Remove punctuation next to a space, replace other by one; remove full stops unless a digit follows."""
    all_removed = strict and _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for character in PUNCTUATION:
        if character in text:
            is_removed = all_removed or f"{character} " in text or f" {character}" in text
            out = out.replace(character, "" if is_removed else " ")
    return _FULL_STOP.sub("", out, count=OFFICIAL_STOPS if strict else 0)


def drop_articles(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_scores(answers: Sequence[str], *, strict: bool = True) -> dict[str, float]:
    """Score each of ten people's answers: the mean over the people left out of min(1, agreeing others / 3)."""
    if len(answers) != NUM_PEOPLE:
        raise InputError(
            f"this metric takes the answers of {NUM_PEOPLE} people to each question, and got {len(answers)}"
        )
    given = [normalise(answer, strict=strict) for answer in answers]
    return {answer: _vote(answer, given) for answer in dict.fromkeys(given)}


def _vote(answer: str, given: Sequence[str]) -> float:
    """Average over leaving each person out how many of the others agree; in that order, which shows in the last digit."""
    agreeing = given.count(answer)
    return sum(min(1, (agreeing - (text == answer)) / 3) for text in given) / len(given)


def soft_accuracy(answer: str, answers: Sequence[str], *, strict: bool = True) -> float:
    """Return TextVQA's score of one answer."""
    return answer_scores(answers, strict=strict).get(normalise(answer, strict=strict), 0.0)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Return VQAv2's and VizWiz's score of one answer: texts are normalised only where the people disagree."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    given = [text.replace("\n", " ").replace("\t", " ").strip() for text in answers]
    if len(set(given)) > 1:
        given = [drop_articles(drop_punctuation(text)) for text in given]
        answer = drop_articles(drop_punctuation(answer))
    return _vote(answer, given)


def exact_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Return ST-VQA's accuracy: whether anybody gave this answer."""
    return float(normalise(answer) in {normalise(text) for text in answers})


def anls(answer: str, answers: Sequence[str]) -> float:
    """Return the best normalised Levenshtein similarity with any reference; one below 0.5 counts as 0."""
    return max((_similarity(answer.lower().strip(), text.lower().strip()) for text in answers), default=0.0)


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    if not longest:
        return 1.0  # two empty texts; the official code divides by zero
    similarity = 1 - edit_distance(first, second) / longest
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != other))
    return row[-1]


def mean_score(pairs: Sequence[tuple[str, Sequence[str]]], score: Callable[[str, Sequence[str]], float]) -> float:
    return sum(score(answer, answers) for answer, answers in pairs) / len(pairs) if pairs else 0.0
