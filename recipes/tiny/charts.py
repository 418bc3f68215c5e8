"""Simple charts: bars and pies in named colours, with questions about them.

In: a random generator and an Asker. Out: Chart (all that is drawn), its image, QA (talk.py). Held-out charts have
other axes and gaps, and are drawn by the held-out rasterizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import finish
import numpy as np
import palette
import raster
from finish import Finish
from palette import RGB
from PIL import Image
from shapes import arc
from talk import QA, unknown_questions, yes_no
from wording import DIGITS, join
from wordings import Asker, capital

BACKGROUND: RGB = (255, 255, 255)


@dataclass(frozen=True)
class Chart:
    """Values are heights of bars, as fractions of the axis, or shares of the pie."""

    kind: str  # "bar" or "pie"
    colours: tuple[str, ...]
    rgbs: tuple[RGB, ...]
    values: tuple[float, ...]
    held: bool
    grid: bool
    axes: RGB | None
    gap: float  # between bars, of a bar's width
    start: float  # degrees
    finish: Finish

    @property
    def part(self) -> str:
        return "bar" if self.kind == "bar" else "slice"


def draw_chart(rng: random.Random, *, held: bool) -> Chart:
    kind = rng.choice(("bar", "bar", "pie"))
    count = rng.randint(2, 6 if kind == "bar" else 5)
    usable = [name for name in palette.NAMES if name not in ("white",)]
    colours = rng.sample(usable, count)
    rgbs = tuple(palette.draw_colour(rng, name, apart_from=BACKGROUND)[1] for name in colours)
    if kind == "bar":  # heights in steps, so that none are nearly equal
        steps = rng.sample(range(12), count)
        values = tuple(0.12 + 0.07 * step + rng.uniform(-0.008, 0.008) for step in steps)
    else:
        weights = [3 + 2.2 * step for step in rng.sample(range(6), count)]
        values = tuple(weight / sum(weights) for weight in weights)
    axes = (0, 0, 0) if rng.random() < 0.6 else palette.to_rgb(0, 0, rng.uniform(0.3, 0.7))
    return Chart(
        kind, tuple(colours), rgbs, values, held, rng.random() < (0.0 if held else 0.4),
        axes if rng.random() < 0.85 else None, rng.uniform(0.05, 0.15) if held else rng.uniform(0.2, 0.9),
        rng.uniform(0, 360), finish.draw_finish(rng, held=held),
    )  # fmt: skip


def render_chart(chart: Chart, side: int) -> Image.Image:
    canvas = palette.paint_background(BACKGROUND, "plain", side, seed=0)
    cover = raster.scanline if chart.held else raster.pillow
    parts = bars(chart) if chart.kind == "bar" else slices(chart)
    if chart.kind == "bar" and chart.grid:
        for height in (0.25, 0.5, 0.75):
            y = round((0.9 - 0.8 * height) * side)
            canvas[y : y + 1, round(0.1 * side) : round(0.94 * side)] = 215
    for points, rgb in zip(parts, chart.rgbs, strict=True):
        cover([points * side], side).paint(canvas, np.asarray(rgb, np.float32))
    if chart.kind == "bar" and chart.axes is not None:
        width = max(1, side // 80)
        low, left = round(0.9 * side), round(0.1 * side)
        canvas[low : low + width, left : round(0.95 * side)] = chart.axes
        if not chart.held:
            canvas[round(0.06 * side) : low, left : left + width] = chart.axes
    return finish.apply(Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), chart.finish)


def bars(chart: Chart) -> list[np.ndarray]:
    """Rectangles between the axes, as fractions of the side."""
    step = 0.82 / len(chart.values)
    width = step / (1 + chart.gap)
    found = []
    for number, value in enumerate(chart.values):
        left, top = 0.12 + step * number + (step - width) / 2, 0.9 - 0.8 * value
        found.append(np.array([(left, top), (left + width, top), (left + width, 0.9), (left, 0.9)]))
    return found


def slices(chart: Chart) -> list[np.ndarray]:
    found, angle = [], chart.start
    for value in chart.values:
        end = angle + 360 * value
        rim = arc(angle, end, max(3, round(48 * value)))
        last = arc(end, end + 1, 1)
        found.append(np.concatenate([[(0.0, 0.0)], rim, last]) * 0.4 + 0.5)
        angle = end
    return found


def chart_questions(chart: Chart, ask: Asker) -> list[QA]:
    part, rng, count = chart.part, ask.rng, len(chart.values)
    name = f"{chart.kind} chart"
    ranked = sorted(zip(chart.values, chart.colours, strict=True))
    colours = join([f"{'an' if c == 'orange' else 'a'} {c}" for c in chart.colours])
    found = [
        QA(ask("chart_kind"), f"It is a {name}.", capital(name), "chart_kind", "the chart"),
        QA(ask("chart_bars" if part == "bar" else "chart_slices"), f"There are {DIGITS[count]} {part}s.", str(count),
            "chart_count"),
        QA(ask("describe"), f"The picture shows a {name} with {colours} {part}.", None, "describe_chart"),
        *unknown_questions(ask, 1),
    ]  # fmt: skip
    for most, others, colour in (
        (
            "tallest" if part == "bar" else "largest",
            ("highest", "longest") if part == "bar" else ("biggest",),
            ranked[-1][1],
        ),
        ("shortest" if part == "bar" else "smallest", ("lowest",) if part == "bar" else (), ranked[0][1]),
    ):
        word = most if ask.split == "plain" else rng.choice((most, *others))
        asked = ask("chart_most" if part == "bar" else "chart_slice_most", most=word)
        found.append(QA(asked, f"The {colour} {part} is the {most}.", capital(colour), "chart_most"))
    if part == "bar":
        (low, x), (high, y) = rng.sample(ranked, 2)
        for a, b in ((x, y), (y, x)):
            right = (a == x) == (low > high)
            bigger = x if low > high else y
            fact = f"the {bigger} bar is the taller one"
            found.append(yes_no(ask("chart_compare", x=a, y=b), right, fact, fact, "yesno_chart"))
    missing = [c for c in palette.NAMES if c not in chart.colours and c != "white"]
    for colour, right in ((rng.choice(chart.colours), True), (rng.choice(missing), False)):
        what = f"{colour} {part}"
        a = f"{'an' if colour == 'orange' else 'a'} {what}"
        asked = ask("exists", a=a, bare=what, many=f"{what}s")
        found.append(yes_no(asked, right, f"there is {a}", f"there is no {what}", "yesno_chart"))
    return found


def chart_caption(chart: Chart, rng: random.Random) -> str:
    ranked = [colour for _, colour in sorted(zip(chart.values, chart.colours, strict=True))]
    return f"A {chart.kind} chart of {DIGITS[len(ranked)]} {chart.part}s, from small to large: {', '.join(ranked)}."
