"""The plot of overhead.py: requests per second and time to first token against concurrency, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.plots import Panel, draw_panels

NAMES = {"bare": "bare engine", "whole": "HTTP, whole answers", "streamed": "HTTP, streamed"}


def plot(levels: Mapping[Any, Mapping[str, Any]], what: str) -> str:
    """Levels without images; each has an equal step on the axis, as they double or more."""
    shown = [level for level in levels if not level.with_image]
    marks = [str(level.concurrency) for level in shown]
    rates = {name: [levels[level][way].per_s for level in shown] for way, name in NAMES.items()}
    firsts = {NAMES[way]: [1000 * levels[level][way].first_s for level in shown] for way in ("bare", "streamed")}
    names = list(NAMES.values())
    return draw_panels(
        [
            Panel("requests per second", "requests at once", marks, rates, names),
            Panel("median time to the first token, ms", "requests at once", marks, firsts, names),
        ],
        what,
    )
