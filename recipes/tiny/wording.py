"""How things in a scene are named, and what the whole scene is in one sentence.

In: Scene, Thing (scenes.py). Out: words. Questions are made in questions.py and relations.py.
"""

from __future__ import annotations

from collections import Counter

from scenes import Scene, Thing
from talk import with_article
from wordings import capital

DIGITS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


IRREGULAR = {
    "person": "people",
    "child": "children",
    "man": "men",
    "woman": "women",
    "mouse": "mice",
    "knife": "knives",
}
UNCHANGED = ("deer", "sheep", "fish")


def plural(noun: str) -> str:
    """Of the last word: "red cross" -> "red crosses"."""
    *before, last = noun.split(" ")
    if last not in UNCHANGED:
        last = IRREGULAR.get(last) or last + ("es" if last.endswith(("s", "ch", "sh")) else "s")
    return " ".join([*before, last])


def there_are(one: str, many: str, number: int) -> str:
    if number == 0:
        return f"there are no {many}"
    return f"there is one {one}" if number == 1 else f"there are {DIGITS[number]} {many}"


def short_name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def unique(scene: Scene, thing: Thing, key: str) -> bool:
    """Whether the value of one field ("shape", "colour") belongs to this thing only."""
    return sum(getattr(other, key) == getattr(thing, key) for other in scene.things) == 1


def name_of(scene: Scene, thing: Thing, using: str) -> str | None:
    """ "the star", "the red object", or with "any" whichever fits this thing alone; None where nothing does."""
    if using in ("shape", "any") and unique(scene, thing, "shape"):
        return f"the {thing.shape}" if using == "shape" or len(scene.things) < 3 else f"the {short_name(thing)}"
    if using in ("colour", "any") and unique(scene, thing, "colour"):
        return f"the {thing.colour} {'object' if using == 'colour' else thing.shape}"
    pairs = Counter((t.colour, t.shape) for t in scene.things)
    if using == "any" and pairs[(thing.colour, thing.shape)] == 1:
        return f"the {short_name(thing)}"
    return None


def names_of(scene: Scene) -> list[tuple[Thing, str]]:
    """The things that have a name of their own, with it."""
    return [(thing, name) for thing in scene.things if (name := name_of(scene, thing, "any"))]


def place_phrase(place: str) -> str:
    """ "top left" -> "at the top left"; "left" -> "on the left"; "centre" -> "in the centre"."""
    preposition = {"left": "on", "right": "on", "centre": "in"}.get(place, "at")
    return f"{preposition} the {place}"


def describe(scene: Scene, *, count_first: bool = False) -> str:
    """The whole scene, things from top to bottom and left to right."""
    parts = []
    for thing in sorted(scene.things, key=lambda t: (round(t.y * 3), t.x)):
        where = f" {place_phrase(thing.place)}" if thing.place else ""
        parts.append(f"{with_article(f'{thing.size or str()} {short_name(thing)}'.strip())}{where}")
    text = join(parts)
    if scene.sign:
        text += f', and the {"number" if scene.sign.is_number else "word"} "{scene.sign.text}"'
    if scene.background:
        text += f", on a {scene.background} background"
    if count_first:
        number = len(scene.things)
        return f"{capital(DIGITS[number])} {'object' if number == 1 else 'objects'}: {text}."
    return f"The picture shows {text}."


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
