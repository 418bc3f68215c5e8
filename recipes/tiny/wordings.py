"""How people ask: hundreds of wordings for each kind of question, from a small grammar, in splits that never meet.

In: wordings.txt and wordings_unknown.txt (grammars), wordings_held.txt (written by hand), noise.py. Out: questions, asked by
Asker.

    "plain"    the first line of a kind, for tests and whoever wants one wording
    "train"    all that the grammars make, less what the two held-out splits say
    "grammar"  one wording in eight of the grammars, chosen by its spelling (`is_held_out`)
    "hand"     those of wordings_held.txt

Wordings are compared as `normal` writes them: without case, punctuation and courtesies, with one spelling of "colour", one word
for "picture" and one for "object", so that a held-out wording differs from every trained one by more than these.
"""

from __future__ import annotations

import functools
import random
import re
import string
import zlib
from collections.abc import Iterator
from pathlib import Path

import noise

HERE = Path(__file__).parent
GRAMMARS = ("wordings.txt", "wordings_unknown.txt")
BY_HAND = "wordings_held.txt"
SPLITS = ("plain", "train", "grammar", "hand")
MOST = 240  # wordings taken from one line
ONE_IN = 8
# Requests that are part of a published prompt are said in every split.
SHORT_SUFFIX = "Answer the question using a single word or phrase."
YES_NO_SUFFIX = "Answer yes or no."
PUBLISHED = (SHORT_SUFFIX, YES_NO_SUFFIX)

Lines = tuple[tuple[str, ...], ...]  # of one kind: the wordings of each line


@functools.cache
def read_sections(name: str) -> dict[str, tuple[str, ...]]:
    """Lines of each kind, with the sets of words ("<pic>") written out."""
    words: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for raw in (HERE / name).read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("== "):
            lines = sections.setdefault(line[3:], [])
        elif found := re.fullmatch(r"<(\w+)> (.*)", line):
            if not sections:
                words[found[1]] = fill_sets(found[2], words)
            else:
                lines.append(fill_sets(line, words))
        else:
            lines.append(fill_sets(line, words))
    return {kind: tuple(found) for kind, found in sections.items()}


def fill_sets(line: str, words: dict[str, str]) -> str:
    return re.sub(r"<(\w+)>", lambda found: f"({words[found[1]]})", line)


def expand(line: str) -> list[str]:
    """Every wording of a line, or MOST of them, drawn evenly."""
    tree, end = parse(line, 0)
    assert end == len(line), f"a bracket too many in {line!r}"
    if size(tree) <= MOST:
        found = list(spell_all(tree))
    else:
        rng = random.Random(line)
        found = [spell_one(tree, rng) for _ in range(MOST)]
    return sorted({re.sub(r"\s+([?.,!:]|$)", r"\1", re.sub(r"\s+", " ", text)).strip() for text in found})


Tree = list["str | list[Tree]"]  # type: ignore[misc]


def parse(line: str, at: int) -> tuple[Tree, int]:
    """Text and choices up to the end of the line, or of the choice that `at` is in."""
    tree: Tree = []
    while at < len(line) and line[at] not in "|)":
        if line[at] == "(":
            choices, ended = [], at
            while line[ended] != ")":
                choice, ended = parse(line, ended + 1)
                choices.append(choice)
            tree.append(choices)
            at = ended + 1
        else:
            stop = next((i for i in range(at, len(line)) if line[i] in "(|)"), len(line))
            tree.append(line[at:stop])
            at = stop
    return tree, at


def size(tree: Tree) -> int:
    total = 1
    for part in tree:
        if not isinstance(part, str):
            total *= sum(size(choice) for choice in part)
    return total


def spell_all(tree: Tree) -> Iterator[str]:
    if not tree:
        yield ""
        return
    heads = [tree[0]] if isinstance(tree[0], str) else [text for choice in tree[0] for text in spell_all(choice)]
    for tail in spell_all(tree[1:]):
        for head in heads:
            yield head + tail


def spell_one(tree: Tree, rng: random.Random) -> str:
    return "".join(part if isinstance(part, str) else spell_one(rng.choice(part), rng) for part in tree)


def normal(wording: str) -> str:
    """What makes two wordings the same."""
    words = re.findall(r"[a-z0-9_{}]+", wording.lower().replace("'s", " is"))
    return " ".join(SAME.get(word, word) for word in words if word not in COURTESIES)


SAME = {"color": "colour", "coloured": "colour", "colored": "colour", "center": "centre"}
SAME |= dict.fromkeys(("image", "photo", "photograph", "drawing", "pic"), "picture")
SAME |= dict.fromkeys(("thing", "shape", "item", "figure"), "object")
SAME |= dict.fromkeys(("things", "shapes", "items", "figures"), "objects")
COURTESIES = {"please", "hi", "hello", "thanks"}


def is_trained(wording: str) -> bool:
    """Whether training may say it: it belongs to neither of the held-out splits."""
    words = normal(wording)
    return words not in by_hand() and not is_held_out(words)


def is_of_the_grammar(wording: str) -> bool:
    """Whether it belongs to the split "grammar"."""
    words = normal(wording)
    return words not in by_hand() and is_held_out(words)


def is_held_out(words: str) -> bool:
    """By the spelling (of `normal`); plain forms and published requests are trained whatever theirs says."""
    return zlib.crc32(words.encode()) % ONE_IN == 0 and words not in plain_forms()


@functools.cache
def plain_forms() -> frozenset[str]:
    firsts = [expand(lines[0])[0] for name in GRAMMARS for lines in read_sections(name).values()]
    return frozenset(map(normal, [*firsts, *PUBLISHED]))


@functools.cache
def by_hand() -> frozenset[str]:
    return frozenset(normal(w) for lines in read_sections(BY_HAND).values() for w in lines if w not in PUBLISHED)


@functools.cache
def wordings(kind: str, split: str) -> Lines:
    """The wordings of a kind of question in a split, one tuple for each line of the grammar."""
    if split == "hand":
        return tuple((line,) for line in read_sections(BY_HAND).get(kind, ()))
    lines = next((found[kind] for found in map(read_sections, GRAMMARS) if kind in found), ())
    if split == "plain":
        return ((expand(lines[0])[0],),)
    wanted = is_trained if split == "train" else is_of_the_grammar
    found = (tuple(w for w in expand(line) if wanted(w)) for line in lines)
    return tuple(texts for texts in found if texts)


def prepare() -> None:
    """Write out the training wordings of every kind: some seconds, which processes that fork later need not spend."""
    for name in GRAMMARS:
        for kind in read_sections(name):
            wordings(kind, "train")


@functools.cache
def fitting(kind: str, split: str, slots: frozenset[str]) -> Lines:
    """Those that need no other words than there are."""
    lines = (tuple(w for w in line if fields(w) <= slots) for line in wordings(kind, split))
    return tuple(line for line in lines if line)


@functools.cache
def fields(wording: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in string.Formatter().parse(wording) if name)


class Asker:
    """Asks in the wordings of one split. A kind that the held-out splits lack is asked as in training."""

    def __init__(self, rng: random.Random, split: str) -> None:
        assert split in SPLITS, split
        self.rng = rng
        self.split = split

    def __call__(self, kind: str, **slots: str) -> str:
        wording = self.pick(kind, frozenset(slots) | (BARE if "name" in slots else frozenset()))
        if self.split == "train" and self.rng.random() < NOISY:
            changed = noise.change(self.rng, wording)
            wording = changed if is_trained(changed) else wording
        text = wording.format(**{"bare": slots.get("name", "").removeprefix("the "), **slots})
        if self.split == "plain":
            return text
        return spell(self.rng, capital(text), objects=not kind.startswith(AS_THEY_ARE))

    def pick(self, kind: str, slots: frozenset[str]) -> str:
        """Lines are equally likely, so that those with many choices do not crowd out the others."""
        rng = self.rng
        for split in (self.split, "train", "plain"):
            if lines := fitting(kind, split, slots):
                line = lines[0] if split == "train" and rng.random() < 0.08 else rng.choice(lines)
                return rng.choice(line)
        raise KeyError(f"no wording for {kind!r} with {sorted(slots)}")


BARE = frozenset({"bare"})
NOISY = 0.35  # share of training wordings in which words are left out, put in or exchanged
OBJECTS = ("thing", "shape", "item", "figure")
AS_THEY_ARE = (
    "photo",
    "is_photo",
    "animal",
    "polite",
    "nth",
    "two",
    "ask_",
)  # kinds that do not speak of drawn objects themselves


def spell(rng: random.Random, text: str, *, objects: bool) -> str:
    """Both spellings of "colour" and "centre"; other words for "object"."""
    if objects and "object" in text and rng.random() < 0.4:
        text = text.replace("object", rng.choice(OBJECTS))
    if rng.random() < 0.5:
        text = text.replace("colour", "color").replace("Colour", "Color").replace("centre", "center")
        text = text.replace("grey", "gray").replace("Grey", "Gray")
    return text


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    return text if text.startswith(("I ", "I'", "OCR")) else text[:1].lower() + text[1:]


def insert(rng: random.Random, kind: str, split: str, question: str, **slots: str) -> str:
    """A question inside other words ("Please tell me: ...")."""
    return Asker(rng, split)(
        kind, q=small(question), Q=capital(question), q_open=small(question.rstrip("?. ")), **slots
    ).replace("?.", "?")


def join_two(rng: random.Random, split: str, first: str, second: str) -> str:
    return Asker(rng, split)(
        "two", Q1=first, Q2=second, q1=small(first), q2=small(second), q1_open=capital(first.rstrip("?. "))
    )


def request(rng: random.Random, split: str, form: str, *, yes_no: bool = False) -> str:
    """What is put after a question whose answer shall be short or a sentence; mostly LLaVA's own words for the first."""
    if form == "word":
        if rng.random() < 0.5:
            return "\n" + SHORT_SUFFIX
        kind = "ask_yes_no" if yes_no and rng.random() < 0.6 else "ask_short"
    elif rng.random() < 0.08:
        kind = "ask_long"
    else:
        return ""
    return rng.choice("\n   ") + capital(Asker(rng, split)(kind))


def dress(rng: random.Random, split: str, question: str) -> str:
    """As people type: sometimes with courtesies, in lower case, without the mark at the end, with a slip."""
    if split == "plain":
        return question
    if rng.random() < 0.12:
        question = insert(rng, "polite", split, question)
    if split == "train" and rng.random() < 0.12:
        aside = Asker(rng, split)("aside")
        question = f"{question} {aside}" if rng.random() < 0.3 else f"{aside} {question}"
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.12:
        question = question.rstrip("?.! ")
    return slip(rng, question) if rng.random() < 0.07 else question


def slip(rng: random.Random, text: str) -> str:
    """One typing slip in a word of four letters or more: two letters exchanged, one left out or doubled."""
    found = [word for word in re.finditer(r"[A-Za-z]{4,}", text) if text[: word.start()].count('"') % 2 == 0]
    if not found:
        return text
    word = rng.choice(found)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    changed = (text[at + 1] + text[at] + text[at + 2 :], text[at + 1 :], text[at] + text[at:])
    return text[:at] + rng.choice(changed)
