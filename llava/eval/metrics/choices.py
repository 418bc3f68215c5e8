"""Parse answers to multiple choice questions, and MMMU's open answers.

In: an answer and the options. Out: a letter or None, or whether an open answer is right. Every benchmark has a rule of its
own, since they differ in what they accept.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJ"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SCIENCE_QA = re.compile(r"The answer is ([A-Z]).")


def science_qa_letter(text: str, letters: Sequence[str]) -> str | None:
    """Apply ScienceQA's rule: a bare letter, a letter before ". ", or the letter of the only "The answer is X."."""
    if text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    return stated_letter(text)


def stated_letter(text: str) -> str | None:
    """Return the letter of "The answer is X.", where an answer says that exactly once."""
    found = _SCIENCE_QA.findall(text)
    return found[0] if len(found) == 1 else None


def find_letter(text: str, options: Sequence[str]) -> str | None:
    """Apply MMBench's rule: the one letter alone near the end of an answer, else the one option whose text it contains."""
    letters = LETTERS[: len(options)]
    words = text.translate(_PUNCTUATION).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1:
        letter = found[0]
        is_article = "A" in words and len(words) > 3  # "A dog is on the left" says nothing about option A
        if not is_article and words.index(letter) > len(words) - 5:
            return letter
    pairs = zip(letters, options, strict=True)
    holding = [letter for letter, option in pairs if option and option.lower() in text.lower()]
    return holding[0] if len(holding) == 1 else None


# --- MMMU -----------------------------------------------------------------------------------------------------------


def mmmu_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Apply MMMU's rule: "(A)", else " A ", else in long answers an option's text; the last occurrence wins."""
    for character in ",.!?;:'":
        text = text.strip(character)
    text = f" {text} "
    places = {letter: text.rfind(f"({letter})") for letter in options}
    if max(places.values(), default=-1) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in options}
    if max(places.values(), default=-1) < 0 and len(text.split()) > 5:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
    best = max(places, key=lambda letter: places[letter], default=None)
    return best if best is not None and places[best] >= 0 else None


class Guesser:
    """Draws random letters in the order of MMMU's script, for answers that name no choice."""

    def __init__(self) -> None:
        self._random = random.Random(42)
        self.num_guesses = 0

    def guess(self, letters: Sequence[str]) -> str:
        self.num_guesses += 1
        return self._random.choice(list(letters))


_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def mmmu_open_right(text: str, answer: str | Sequence[str]) -> bool:
    """Apply MMMU's rule for open answers: a reference occurs in a conclusion, or equals a number in it."""
    references = [answer] if isinstance(answer, str) else answer
    wanted = [value for reference in references for value in _comparable(reference)]
    words = [value for value in wanted if isinstance(value, str)]
    for value in mmmu_open_values(text):
        if value in wanted if isinstance(value, float) else any(word in value for word in words):
            return True
    return False


def mmmu_open_values(text: str) -> list[str | float]:
    """Return what is compared of an open answer: its conclusions, and the numbers in them."""
    conclusions = _conclusions(text)
    numbers = [number for conclusion in conclusions for pattern in _NUMBERS for number in pattern.findall(conclusion)]
    return [value for found in [*conclusions, *numbers] for value in _comparable(found)]


def _conclusions(text: str) -> list[str]:
    """Return the shortest tail after a word such as "is" in each line, or the whole text where there is none."""
    text = text.strip().strip(".").lower()
    # The official pattern also splits at sentences that begin with a capital; the text is in small letters by then.
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        tails = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        tail = ""
        for candidate in tails:  # a later one replaces an empty or a longer one
            if not tail or len(candidate) < len(tail):
                tail = candidate
        if tail and tail not in _TRIVIAL:
            found.append(tail)
    return found or [text]


def _comparable(text: str) -> list[str | float]:
    """Return a number rounded to two places, or text in lower case; a single character only next to a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
