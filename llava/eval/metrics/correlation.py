"""Compute rank and linear correlation, for Q-Bench's image quality scores.

In: two lists of numbers. Out: Spearman's and Pearson's coefficients, or None where a list is constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

QBENCH_TEMPERATURE = 100  # by which the official script divides logits before its softmax


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    mean_first, mean_second = math.fsum(first) / len(first), math.fsum(second) / len(second)
    a = [value - mean_first for value in first]
    b = [value - mean_second for value in second]
    norm = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    return pearson(ranks(first), ranks(second))


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 1; equal values have the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = (start + end) / 2 + 1
        start = end + 1
    return found


def qbench_quality(logit_good: float, logit_poor: float) -> float:
    """Return the quality of an image: the probability of "good" against "poor"."""
    return 1 / (1 + math.exp((logit_poor - logit_good) / QBENCH_TEMPERATURE))
