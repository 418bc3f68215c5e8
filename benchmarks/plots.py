"""Plots of the benchmarks as SVG: panels side by side, each with lines over equally spaced marks.

In: titles, marks of the axis, and for each line a value at each mark. Out: markup. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from llava.train.run_folder.loss_plot import COLOURS, NUM_MARKS, round_up

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 48, 44


@dataclass(frozen=True)
class Panel:
    """`lines` by name; a name has the same colour in all panels, that of its place in `names` (by default its own)."""

    title: str
    axis: str
    marks: Sequence[str]
    lines: Mapping[str, Sequence[float]]
    names: Sequence[str] = ()


def draw_panels(panels: Sequence[Panel], what: str) -> str:
    width = len(panels) * WIDTH
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
            f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#57606a">',
            f"<title>{escape(what)}</title>",
            f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
            *(part for number, panel in enumerate(panels) for part in svg_parts(panel, number * WIDTH)),
            "</svg>",
            "",
        ]
    )


def svg_parts(panel: Panel, shift: int) -> list[str]:
    top = round_up(max(value for values in panel.lines.values() for value in values))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(panel.marks) - 1)

    def point(number: int, value: float) -> tuple[float, float]:
        return shift + LEFT + number * step, HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    right = shift + WIDTH - RIGHT
    parts = [f'<text x="{shift + LEFT}" y="20" font-weight="bold">{escape(panel.title)}</text>']
    for mark in range(NUM_MARKS + 1):
        x, y = point(0, top * mark / NUM_MARKS)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#d0d7de" stroke-width="0.7"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{top * mark / NUM_MARKS:g}</text>')
    for number, word in enumerate(panel.marks):
        x, y = point(number, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{escape(word)}</text>')
    middle = shift + (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.axis)}</text>')
    names = list(panel.names or panel.lines)
    for number, (name, values) in enumerate(panel.lines.items()):
        colour = COLOURS[names.index(name)]
        points = [point(mark_number, value) for mark_number, value in enumerate(values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        if len(panel.lines) > 1:
            parts.append(
                f'<text x="{shift + LEFT + 10}" y="{TOP + 6 + 16 * number}" fill="{colour}">{escape(name)}</text>'
            )
    return parts
