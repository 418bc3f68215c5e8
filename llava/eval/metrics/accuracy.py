"""Percentage of right answers, in all and by category.

In: verdicts from 0 to 1, and their categories. Out: figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava.eval.types import ratio


def percent(verdicts: Sequence[float]) -> float:
    """Return the mean in percent, and 0 for no verdicts."""
    return ratio(sum(verdicts), len(verdicts)) * 100


def by_category(pairs: Iterable[tuple[str, float]]) -> dict[str, dict[str, float | int]]:
    """Return accuracy and size of every category, in the order of first appearance; pairs without a category are ignored."""
    groups: dict[str, list[float]] = {}
    for name, verdict in pairs:
        if name:
            groups.setdefault(name, []).append(verdict)
    return {name: {"accuracy": percent(found), "questions": len(found)} for name, found in groups.items()}
