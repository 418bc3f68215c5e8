"""Parse a judge's scores of pairs of answers, and summarise them: the second answer's relative to the first's.

In: the judge's replies, or rows of a review file. Out: score pairs and, for each category, relative and absolute scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.types import JsonRow

NO_SCORE = (-1.0, -1.0)  # what the original writes when a reply has no pair of numbers in its first line


def parse_score(review: str) -> list[float]:
    """Return the pair of numbers in a reply's first line, or those of NO_SCORE."""
    parts = review.split("\n", 1)[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return list(NO_SCORE)
    try:
        return [float(parts[0]), float(parts[1])]
    except ValueError:
        return list(NO_SCORE)


def relative_scores(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean scores of both, and their ratio in percent, which is 0 where the first mean is."""
    means = [sum(pair[place] for pair in pairs) / len(pairs) for place in (0, 1)]
    relative = means[1] / means[0] * 100 if means[0] else 0.0
    return {"relative": relative, "first": means[0] * 10, "second": means[1] * 10, "reviews": len(pairs)}


def summary_line(pairs: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return relative and both absolute scores as the original prints them: means rounded to 3 places first, then to 1."""
    first, second = (round(sum(pair[place] for pair in pairs) / len(pairs), 3) for place in (0, 1))
    relative = round(second / first * 100, 1) if first else 0.0
    return relative, round(first * 10, 1), round(second * 10, 1)


def pair_of(row: JsonRow) -> tuple[float, float]:
    """Return a row's scores, under either of the names that the original's review files use."""
    pair = row.get("tuple", row.get("score"))
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return NO_SCORE
    return float(pair[0]), float(pair[1])


def by_category(rows: Sequence[JsonRow]) -> dict[str, list[tuple[float, float]]]:
    """Group score pairs by category and under "all", in alphabetical order."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name in (*([row["category"]] if "category" in row else []), "all"):
            groups.setdefault(name, []).append(pair_of(row))
    return dict(sorted(groups.items()))
