"""The plot of benchmarks/serve_overhead.py as SVG: requests per second and first token against concurrency, side by side.

In: median rates by level and way. Out: markup. Standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from plot_loss import COLOURS, NUM_MARKS, round_up

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 48, 44
NAMES = {"bare": "bare engine", "whole": "HTTP, whole answers", "streamed": "HTTP, streamed"}


def plot(levels: Mapping[Any, Mapping[str, Any]], what: str) -> str:
    """Levels without pictures; each has an equal step on the axis, as they double or more."""
    shown = [level for level in levels if not level.with_picture]
    marks = [str(level.concurrency) for level in shown]
    rates = {way: [levels[level][way].per_s for level in shown] for way in NAMES}
    firsts = {way: [1000 * levels[level][way].first_s for level in shown] for way in ("bare", "streamed")}
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" width="{2 * WIDTH}" '
            f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#57606a">',
            f"<title>{escape(what)}</title>",
            f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *panel("requests per second", marks, rates, 0),
            *panel("median time to the first token, ms", marks, firsts, WIDTH),
            "</svg>",
            "",
        ]
    )


def panel(title: str, marks: Sequence[str], series: Mapping[str, Sequence[float]], shift: int) -> list[str]:
    top = round_up(max(value for values in series.values() for value in values))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(marks) - 1)

    def place(number: int, value: float) -> tuple[float, float]:
        return shift + LEFT + number * step, HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    right = shift + WIDTH - RIGHT
    parts = [f'<text x="{shift + LEFT}" y="20" font-weight="bold">{escape(title)}</text>']
    for mark in range(NUM_MARKS + 1):
        x, y = place(0, top * mark / NUM_MARKS)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#d0d7de" stroke-width="0.7"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{top * mark / NUM_MARKS:g}</text>')
    for number, mark in enumerate(marks):
        x, y = place(number, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{mark}</text>')
    middle = shift + (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">requests at once</text>')
    for number, (way, values) in enumerate(series.items()):
        colour = COLOURS[list(NAMES).index(way)]
        points = [place(place_number, value) for place_number, value in enumerate(values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{shift + LEFT + 10}" y="{TOP + 6 + 16 * number}" fill="{colour}">{NAMES[way]}</text>')
    return parts
