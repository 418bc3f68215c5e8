"""Draw the loss of a training run as an SVG image, from the trainer_state.json that the run left.

In: one or more trainer_state.json files (or the folders that hold them). Out: an image with the loss of every logged step
and, where a run had a validation set, its validation loss as dots. No other library is needed.

    python -m llava.train.run_folder.loss_plot outputs/logos-lora --out loss.svg
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 44  # margins, for the figures along the axes
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700")
NUM_MARKS = 5


@dataclass(frozen=True)
class Curve:
    """What one run logged: (step, loss)."""

    name: str
    training: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]


def read_curve(path: Path) -> Curve:
    file = path / "trainer_state.json" if path.is_dir() else path
    history = json.loads(file.read_text(encoding="utf-8"))["log_history"]

    def points(key: str) -> tuple[tuple[float, float], ...]:
        return tuple((entry["step"], float(entry[key])) for entry in history if key in entry)

    return Curve(file.parent.name, points("loss"), points("eval_loss"))


def draw(curves: Sequence[Curve]) -> str:
    """The image. Axes begin at zero: a loss that fell from 3 to 2 shall not look like one that fell to nothing."""
    points = [point for curve in curves for point in (*curve.training, *curve.validation)]
    last = max(step for step, _ in points)
    top = round_up(max(loss for _, loss in points))

    def place(step: float, loss: float) -> str:
        x = LEFT + step / last * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - loss / top * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#57606a">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for mark in range(NUM_MARKS + 1):
        loss, step = top * mark / NUM_MARKS, last * mark / NUM_MARKS
        (x, y), (x_step, y_step) = place(0, loss).split(","), place(step, 0).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#d0d7de" stroke-width="0.7"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{loss:g}</text>')
        parts.append(f'<text x="{x_step}" y="{float(y_step) + 16:.1f}" text-anchor="middle">{step:.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2:.0f}" transform="rotate(-90 14 {HEIGHT / 2:.0f})">loss</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(place(*point) for point in curve.training)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'
        )
        for point in curve.validation:
            x, y = place(*point).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
        if len(curves) > 1:
            baseline = TOP + 16 * (number + 1)
            parts.append(
                f'<text x="{WIDTH - RIGHT - 4}" y="{baseline}" text-anchor="end" fill="{colour}">{curve.name}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def round_up(value: float) -> float:
    """To a figure with few digits that five equal marks divide well: 2.61 -> 3, 0.72 -> 0.75."""
    scale = 10.0 ** math.floor(math.log10(value))
    return next(step * scale for step in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if step * scale >= value)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m llava.train.run_folder.loss_plot", description="Draw the loss curves of runs as an image."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their trainer_state.json")
    parser.add_argument("--out", type=Path, required=True, help="the .svg to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    curves = [read_curve(path) for path in args.runs]
    empty = [curve.name for curve in curves if not curve.training]
    if empty:
        raise InputError(f"{empty[0]} has logged no loss; train with --logging_steps 1")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(curves), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
