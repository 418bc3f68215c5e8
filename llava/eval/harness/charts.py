"""Draw a report's charts as inline SVG and HTML: a radar plot of tasks, bars of categories.

In: figures. Out: markup without links to other files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#2563eb", "#f59e0b", "#10b981", "#a855f7")
SIZE, RADIUS = 400, 140
MARGIN = 90  # on both sides, for the names of the axes
RINGS = (0.25, 0.5, 0.75, 1.0)


def radar(axes: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """Draw a polygon for each series over the axes; values are from 0 to 1, None where a series has no value."""
    middle, box = SIZE / 2, f"{-MARGIN} 0 {SIZE + 2 * MARGIN} {SIZE}"
    corners = [_corner(number, len(axes), 1.0) for number in range(len(axes))]
    parts = [f'<svg viewBox="{box}" role="img" aria-label="scores of all tasks" class="radar">']
    for ring in RINGS:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_corner(n, len(axes), ring) for n in range(len(axes))))
        parts.append(f'<polygon points="{points}" class="ring"/>')
    for (x, y), name in zip(corners, axes, strict=True):
        parts.append(f'<line x1="{middle}" y1="{middle}" x2="{x:.1f}" y2="{y:.1f}" class="spoke"/>')
        label_x, label_y = middle + (x - middle) * 1.14, middle + (y - middle) * 1.14
        anchor = "middle" if abs(label_x - middle) < 12 else "start" if label_x > middle else "end"
        parts.append(f'<text x="{label_x:.1f}" y="{label_y + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    for number, (name, values) in reversed(list(enumerate(series.items()))):
        colour = COLOURS[number % len(COLOURS)]
        known = [(n, value) for n, value in enumerate(values) if value is not None]
        points = " ".join("{:.1f},{:.1f}".format(*_corner(n, len(axes), value)) for n, value in known)
        fill = f'fill="{colour}" fill-opacity="0.14"' if number == 0 else 'fill="none" stroke-dasharray="4 3"'
        parts.append(
            f'<polygon points="{points}" {fill} stroke="{colour}" stroke-width="2"><title>{escape(name)}</title></polygon>'
        )
        for n, value in known:
            x, y = _corner(n, len(axes), value)
            label = escape(f"{name}, {axes[n]}: {value:.1%}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{label}</title></circle>')
    return "".join([*parts, "</svg>", legend(list(series))])


def _corner(number: int, count: int, share: float) -> tuple[float, float]:
    angle = 2 * math.pi * number / count - math.pi / 2
    return SIZE / 2 + RADIUS * share * math.cos(angle), SIZE / 2 + RADIUS * share * math.sin(angle)


def legend(names: Sequence[str]) -> str:
    keys = (
        f'<li><span style="background:{COLOURS[n % len(COLOURS)]}"></span>{escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'


def bars(values: Mapping[str, float], *, highest: float, unit: str = "") -> str:
    """Draw a horizontal bar for each value."""
    rows = []
    for name, value in values.items():
        width = 100 * max(0.0, min(1.0, value / highest)) if highest else 0.0
        rows.append(
            f'<div class="bar"><span class="name" title="{escape(name)}">{escape(name)}</span>'
            f'<span class="track"><span class="fill" style="width:{width:.2f}%"></span></span>'
            f'<span class="value">{value:.2f}{escape(unit)}</span></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'
