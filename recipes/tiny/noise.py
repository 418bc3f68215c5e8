"""Questions in words that training does not know: some left out, some put in, some exchanged.

In: a wording with its slots ("What colour is {name}?"). Out: the same question, less clean. Only words that carry no meaning
are left out or exchanged (words_light.txt), and none that is put in changes the answer: they are of common.txt, of the list
of words that images show (spelt letter by letter, as unknown words are), or invented. Whoever was trained so relies on the
words that it knows, whatever stands between them.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import lettering
import palette
from shapes import SHAPES

HERE = Path(__file__).parent
LIGHT = frozenset((HERE / "words_light.txt").read_text(encoding="utf-8").split())
# Words of words.txt that would change what is asked.
HEAVY = frozenset((HERE / "words_heavy.txt").read_text(encoding="utf-8").split()) | {*palette.NAMES, *SHAPES}


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
