"""Percent right, in all and by category: what most tasks report.

In: verdicts from 0 to 1, and the categories they count for. Out: figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava.eval.types import ratio


def percent(verdicts: Sequence[float]) -> float:
    """The mean in percent; 0 of nothing."""
    return ratio(sum(verdicts), len(verdicts)) * 100


def by_category(pairs: Iterable[tuple[str, float]]) -> dict[str, dict[str, float | int]]:
    """Accuracy and size of every category, in the order of first appearance; the unnamed one is left out."""
    groups: dict[str, list[float]] = {}
    for name, verdict in pairs:
        if name:
            groups.setdefault(name, []).append(verdict)
    return {name: {"accuracy": percent(found), "questions": len(found)} for name, found in groups.items()}
