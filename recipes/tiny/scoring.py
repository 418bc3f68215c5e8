"""Judge answers and add them up.

In: rows of the suite and the model's answers. Out: Verdict per row, a report as plain data (tables, faults, yes/no
figures). One-word answers to LLaVA's own request ("Answer the question using a single word or phrase.") must be the
expected word. To a request in other words, a right sentence is right as well, and whether the answer was short, as
asked, is a measure of its own (`requests`). Sentences are right when they are the expected sentence or state the same
fact, read out of them by the table FACTS; `exact` counts the first kind alone. Only differences of case, of the last
full stop and between spellings ("color", "colour"; "three", "3") are forgiven, and for text read from an image not
even those.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from boxes import overlap, read_box
from palette import NAMES
from photos import KINDS
from rows import Row
from shapes import SHAPES
from wording import DIGITS, plural
from wordings import SHORT_SUFFIX

ADMISSIONS = ("i cannot tell", "the picture does not show", "i do not know")
SPELLINGS = {"color": "colour", "center": "centre", "gray": "grey", "plane": "airplane", "automobile": "car"}
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS)} | {"none": "0", "zero": "0"}
PLACES = ("top left", "top right", "bottom left", "bottom right", "top", "bottom", "left", "right", "centre")
SINGULAR = {plural(shape): shape for shape in SHAPES}
LONGEST = 5  # words of a short answer
LEAST_OVERLAP = 0.5  # of a right box and one that counts as right
READ = ("read", "read_part")  # the answer is text from the image: its case counts
Fact = Callable[[str], Hashable]


@dataclass(frozen=True)
class Verdict:
    row: Row
    said: str
    right: bool
    exact: bool
    any_case: bool  # right if capitals do not count
    refused: bool  # said that the image does not tell
    denied: bool  # said that there is no such thing
    overlap: float = 0.0  # of boxes


def judge(row: Row, said: str) -> Verdict:
    said = said.strip()
    exact, any_case = compare(row, said)
    right, shared = exact, 0.0
    if not exact and row.form == "word" and row.long and not row.question.endswith(SHORT_SUFFIX):
        spoken = judge(replace(row, form="sentence", answer=row.long), said)
        right, any_case = spoken.right, any_case or spoken.any_case
    if row.category == "box":
        shared = overlap(read_box(row.answer), read_box(said))
        right = any_case = shared >= LEAST_OVERLAP
    elif row.category.startswith("two "):
        right = any_case = right or both_right(row, said)
    elif not exact and row.form != "word":
        fact = fact_of(row.category)
        if fact is not None and (expected := fact(row.answer)) is not None:
            right = fact(said) == expected
            any_case = any_case or casefolded(fact(said)) == casefolded(expected)
    elif row.category == "unknown":
        right = exact or admits(said)
    lower = said.lower()
    denied = lower.startswith(("there is no", "there are no", "no text"))
    return Verdict(row, said, right, exact, any_case or right, admits(said), denied, round(shared, 4))


def both_right(row: Row, said: str) -> bool:
    """Two questions in one: two short answers with a comma between, or two sentences, each right for its own."""
    between = r",\s+" if row.form == "word" else r"(?<=[.!?])\s+"
    wanted, found = (re.split(between, text.strip(), maxsplit=1) for text in (row.answer, said))
    kinds = row.category.split(" ")[1:]
    if len(wanted) != 2 or len(found) != 2:
        return False
    return all(
        judge(replace(row, category=kind, answer=answer), part).right
        for kind, answer, part in zip(kinds, wanted, found, strict=True)
    )


def compare(row: Row, said: str) -> tuple[bool, bool]:
    """Equal as it must be, and equal but for capitals."""
    if row.category in READ and row.form == "word":
        bare = said.rstrip(".").strip("\"'")
        return bare == row.answer, bare.lower() == row.answer.lower()
    same = normalise(said) == normalise(row.answer)
    return (same and (row.category not in READ or quoted(said) == quoted(row.answer))), same


def normalise(text: str) -> str:
    words = re.sub(r"\s+", " ", text.strip().rstrip(".")).lower().split(" ")
    plain = [SPELLINGS.get(word, word) for word in words]
    return NUMBERS.get(plain[0], plain[0]) if len(plain) == 1 else " ".join(plain)


def admits(said: str) -> bool:
    return said.lower().startswith(ADMISSIONS)


def casefolded(fact: Hashable) -> Hashable:
    return fact.lower() if isinstance(fact, str) else fact


# --- what a sentence states -----------------------------------------------------------------------------------------


def tokens(text: str) -> list[str]:
    """Lower-case words, plural shapes made singular, text in quotes left out."""
    words = re.findall(r"[a-z0-9]+", re.sub(r'"[^"]*"', " ", text).lower())
    return [SINGULAR.get(word, SPELLINGS.get(word, word)) for word in words]


def last_of(known: Sequence[str]) -> Fact:
    """The last word of a list: what stands after "is"."""
    return lambda text: next((word for word in reversed(tokens(text)) if word in known), None)


def first_of(known: Sequence[str]) -> Fact:
    return lambda text: next((word for word in tokens(text) if word in known), None)


def all_of(known: Sequence[str]) -> Fact:
    """Every word of a list, in any order."""
    return lambda text: tuple(sorted({word for word in tokens(text) if word in known})) or None


def pair_of(text: str) -> Hashable:
    """A colour and a shape."""
    return last_of(NAMES)(text), last_of(SHAPES)(text)


def quoted(text: str) -> str | None:
    found = re.findall(r'"([^"]*)"', text)
    return found[-1] if found else None


def first_word(text: str) -> str | None:
    return next(iter(tokens(text)), None)


def number_in(text: str) -> str | None:
    values = [NUMBERS.get(word, word if word.isdigit() else None) for word in tokens(text)]
    return next((value for value in values if value is not None), None)


def yes_no_or_number(text: str) -> str | None:
    word = first_word(text)
    return word if word in ("yes", "no") else number_in(text)


def place_in(text: str) -> str | None:
    phrase = " ".join(tokens(text))
    return next((place for place in PLACES if phrase.endswith(f" the {place}")), None)


def position_facts(text: str) -> Hashable:
    words = tokens(text)
    place = place_in(text)
    named = tuple(sorted(word for word in words if word in NAMES or word in SHAPES))
    return (place, named) if place else None


def photo_kind(text: str) -> str | None:
    kinds = {word for word in tokens(text) if word in KINDS}
    return kinds.pop() if len(kinds) == 1 else None


def admission(text: str) -> str | None:
    return "unknown" if admits(text) else None


def described(text: str) -> Hashable:
    """All that a description states, in any order."""
    things = tuple(sorted(things_in(text).elements()))
    background = re.search(r"on an? (\w+) background", text.lower())
    found = (things, quoted(text), background and background[1], photo_kind(text), text_colour(text))
    return found if any(found) else None


def things_in(text: str) -> Counter[tuple[str, str, str, str]]:
    """(size, colour, shape, place) of each thing that a description names."""
    place = r"(?:at|on|in) the ((?:(?:top|bottom) )?(?:left|right)|top|bottom|centre|center)"
    pattern = rf"\b(?:(small|large) )?({'|'.join(NAMES)}) ({'|'.join(SHAPES)})(?: {place})?"
    found = re.findall(pattern, re.sub(r'"[^"]*"', '""', text).lower())
    return Counter((size, colour, shape, SPELLINGS.get(where, where)) for size, colour, shape, where in found)


def text_colour(text: str) -> str | None:
    found = re.search(r"\bin (\w+) letters", text.lower())
    return found[1] if found else None


FACTS: dict[str, Fact] = {
    "colour": last_of(NAMES), "text_colour": last_of(NAMES), "background": last_of(NAMES),
    "shape": last_of(SHAPES), "size": last_of(("small", "large")), "position": position_facts,
    "count": number_in, "read": quoted, "photo": photo_kind, "describe": described, "unknown": admission,
    "text_kind": last_of(("word", "number")), "kind": last_of(("photograph", "drawing")),
    "photo_group": last_of(("animal", "vehicle")), "photo_fact": yes_no_or_number, "photo_count": number_in,
    "chart_count": number_in, "chart_most": last_of(NAMES), "chart_kind": last_of(("bar", "pie")), "region": pair_of,
    "list_shapes": all_of(SHAPES), "list_colours": all_of(NAMES),
    "pair_which": first_of(("first", "second")), "pair_more": first_of(("first", "second")),
}  # fmt: skip


def fact_of(category: str) -> Fact | None:
    return first_word if category.startswith("yesno_") else FACTS.get(category)


# --- tables ---------------------------------------------------------------------------------------------------------


def summarise(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The report: groups, forms and tags, yes/no figures, refusals, facts in descriptions, three faults of each group."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.row.group, []).append(verdict)
    yes_no = {name: yes_no_figures(found) for name, found in groups.items() if name.startswith(("yesno_", "pope_"))}
    if yes_no:
        yes_no["all"] = yes_no_figures([v for name in yes_no for v in groups[name]])
    return {
        "groups": {name: figures(found) for name, found in groups.items()},
        "yes_no": yes_no,
        "false_refusals": share([v.refused for v in verdicts if v.row.category not in ("unknown", "talk")]),
        "false_denials": share([v.denied for v in verdicts if deniable(v.row)]),
        "descriptions": description_figures(groups.get("describe_scene", [])),
        "requests": request_figures(verdicts),
        "mean_overlap": share([v.overlap for v in groups.get("box", [])]),
        "wrong": {name: [example(v) for v in found if not v.right][:3] for name, found in groups.items()},
    }


def request_figures(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Short answers to requests for one, in LLaVA's words and in others."""
    asked = [v for v in verdicts if v.row.form == "word" and not v.row.category.startswith("two ")]
    own = [len(v.said.split()) <= LONGEST for v in asked if v.row.question.endswith(SHORT_SUFFIX)]
    other = [len(v.said.split()) <= LONGEST for v in asked if not v.row.question.endswith(SHORT_SUFFIX)]
    return {"published": share(own), "other": share(other)}


def deniable(row: Row) -> bool:
    """Questions about something that is there, where "there is no ..." would be wrong."""
    denial = row.answer.lower().startswith(("there is no", "there are no")) or row.answer == "0"
    return row.category not in ("absent", "unknown", "talk") and not row.category.startswith("yesno_") and not denial


def share(found: Sequence[float]) -> dict[str, float]:
    return {"n": len(found), "share": round(sum(found) / max(1, len(found)), 4)}


def figures(found: Sequence[Verdict]) -> dict[str, Any]:
    result: dict[str, Any] = {"n": len(found), "right": accuracy(found)}
    result["exact"] = round(sum(v.exact for v in found) / len(found), 4)
    result["any_case"] = round(sum(v.any_case for v in found) / len(found), 4)
    for name, key in (("forms", lambda v: v.row.form), ("tags", lambda v: v.row.tag)):
        values = sorted({key(v) for v in found})
        if len(values) > 1:
            result[name] = {value: accuracy([v for v in found if key(v) == value]) for value in values}
    by_wording = {
        name: [v for v in found if v.row.wording == name] for name in sorted({v.row.wording for v in found} - {""})
    }
    result["wordings"] = {name: {"n": len(part), "right": accuracy(part)} for name, part in by_wording.items()}
    return result


def accuracy(found: Sequence[Verdict]) -> float:
    return round(sum(v.right for v in found) / max(1, len(found)), 4)


def yes_no_figures(found: Sequence[Verdict]) -> dict[str, float]:
    """Accuracy, share of yes said, precision, recall and F1 of yes; answers that are neither count as no and as wrong."""
    pairs = [(first_word(v.row.answer), first_word(v.said)) for v in found]
    both = sum(pair == ("yes", "yes") for pair in pairs)
    said, true = sum(s == "yes" for _, s in pairs), sum(t == "yes" for t, _ in pairs)
    precision, recall = both / max(1, said), both / max(1, true)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    rows = {"n": len(pairs), "accuracy": sum(s == t for t, s in pairs) / max(1, len(pairs)), "f1": f1}
    rows |= {"precision": precision, "recall": recall, "yes_rate": said / max(1, len(pairs))}
    rows["yes_rate_expected"] = true / max(1, len(pairs))
    return {name: round(value, 4) for name, value in rows.items()}


def description_figures(found: Sequence[Verdict]) -> dict[str, float]:
    """How many of the things named are there, and how many of those there are named; with size and place, and without."""
    result: dict[str, float] = {}
    for name, fields in (("thing", (1, 2)), ("size", (0, 1, 2)), ("place", (1, 2, 3))):
        hit = named = there = 0
        for verdict in found:
            said, true = (
                Counter(tuple(thing[i] for i in fields) for thing in things_in(text).elements())
                for text in (verdict.said, verdict.row.answer)
            )
            hit += (said & true).total()
            named += said.total()
            there += true.total()
        result[f"{name}_precision"] = round(hit / max(1, named), 4)
        result[f"{name}_recall"] = round(hit / max(1, there), 4)
    return result


def example(verdict: Verdict) -> dict[str, str]:
    row = verdict.row
    return {"id": row.id, "question": row.question, "expected": row.answer, "said": verdict.said}
