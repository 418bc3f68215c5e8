"""Questions in words that training does not know: some left out, some put in, some exchanged.

In: a wording with its slots ("What colour is {name}?"). Out: the same question, less clean. Only words that carry no meaning
are left out or exchanged (LIGHT), and none that is put in changes the answer: they are of common.txt, of the list of words
that images show (spelt letter by letter, as unknown words are), or invented. Whoever was trained so relies on the words
that it knows, whatever stands between them.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import lettering
import palette
from shapes import SHAPES

HERE = Path(__file__).parent
LIGHT = frozenset(
    "a an the in of on to at is are was do does did has have been there here this that it's what's please me you i can could "
    "would will say tell see know picture image photo drawing exactly really actually so and then be like want need for us "
    "find look give kindly just now with as from".split()
)  # fmt: skip
# Words of words.txt that would change what is asked.
HEAVY = frozenset(
    "above below left top bottom centre center middle near far large small big tiny little long short tall high low first third "
    "two three four five six seven eight nine ten zero one number count sum same half pair twin shape form figure shade tone "
    "square cross diamond text letter word digit sign title page paper print read write drawing picture photo place spot corner "
    "side edge border frame light heavy warm cold hot fast slow old new young open shut wood glass metal silver gold "
    "box bar pie chart table dog cat deer frog horse ship truck car bird plane animal name owner price under over inner outer "
    "upper east west north south right back front dark bright size scale no not none never both all more less".split()
) | {*palette.NAMES, *SHAPES}  # fmt: skip


def change(rng: random.Random, wording: str) -> str:
    """One wording, changed in one or two places."""
    words = wording.split(" ")
    for _ in range(rng.choice((1, 1, 2))):
        light = [place for place, word in enumerate(words) if word.strip(".,:;?!").lower() in LIGHT]
        kind = rng.random()
        if kind < 0.3 and light and len(words) > 3:
            del words[rng.choice(light)]
        elif kind < 0.55 and light:
            words[rng.choice(light)] = other_word(rng)
        else:
            place = rng.randint(0, len(words))
            words[place:place] = [other_word(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    return " ".join(words)


def other_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(common_words())
    return lettering.invented_word(rng) if kind < 0.8 else rng.choice(shown_words())


@functools.cache
def common_words() -> tuple[str, ...]:
    """Frequent words that say nothing about an image."""
    return tuple((HERE / "common.txt").read_text(encoding="utf-8").split())


@functools.cache
def shown_words() -> tuple[str, ...]:
    return tuple(word for word in lettering.WORDS if word not in HEAVY)
