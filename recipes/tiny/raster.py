"""Rasterizers: how much of each pixel a figure covers. Each has its own arithmetic and its own look of edges.

In: contours in pixels, filled by the even-odd rule. Out: Cover (a part of the image and values in 0..1).
"pillow" and "distance" draw for training; "scanline" only for the held-out suite (RENDERERS, by split).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Contours = Sequence[np.ndarray]


@dataclass(frozen=True)
class Cover:
    """values (height, width) in 0..1, the upper left pixel at (left, top)."""

    values: np.ndarray
    left: int
    top: int

    def paint(self, canvas: np.ndarray, colour: np.ndarray) -> None:
        """Lay a colour ((3,), or (height, width, 3) for the same part) over a canvas."""
        height, width = self.values.shape
        part = canvas[self.top : self.top + height, self.left : self.left + width]
        part += self.values[:, :, None] * (colour - part)


def window(contours: Contours, side: int, margin: float) -> tuple[int, int, int, int]:
    points = np.concatenate(list(contours))
    left, top = np.maximum(0, np.floor(points.min(0) - margin)).astype(int)
    right, bottom = np.minimum(side, np.ceil(points.max(0) + margin)).astype(int)
    return int(left), int(top), max(int(left) + 1, int(right)), max(int(top) + 1, int(bottom))


def pillow(contours: Contours, side: int, *, stroke: float = 0.0, fine: int = 3) -> Cover:
    """Pillow's polygons, drawn `fine` times as large and averaged (1: with steps for edges)."""
    left, top, right, bottom = window(contours, side, stroke + 1)
    mask = Image.new("L", ((right - left) * fine, (bottom - top) * fine))
    pen = ImageDraw.Draw(mask)
    for number, contour in enumerate(contours):
        points = [(float(x), float(y)) for x, y in (contour - (left, top)) * fine]
        if stroke:
            pen.line([*points, points[0], points[1]], fill=255, width=max(1, round(stroke * fine)), joint="curve")
        else:
            pen.polygon(points, fill=255 if number == 0 else 0)
    if fine > 1:
        mask = mask.reduce(fine)
    return Cover(np.asarray(mask, np.float32) / 255, left, top)


def distance(contours: Contours, side: int, *, stroke: float = 0.0, fine: int = 2) -> Cover:
    """From each pixel's distance to the outline; `fine` says how soft the edge is."""
    left, top, right, bottom = window(contours, side, stroke + 2)
    x = np.arange(left, right, dtype=np.float32)[None, :, None] + 0.5
    y = np.arange(top, bottom, dtype=np.float32)[:, None, None] + 0.5
    ends = [np.roll(contour, -1, 0) for contour in contours]
    a = np.concatenate(list(contours)).astype(np.float32)
    b = np.concatenate(ends).astype(np.float32)
    (dx, dy), (px, py) = (b - a).T, (x - a[:, 0], y - a[:, 1])
    along = np.clip((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
    far = np.sqrt(((px - along * dx) ** 2 + (py - along * dy) ** 2).min(-1))
    if stroke:
        far = far - stroke / 2
    else:
        crosses = (a[:, 1] > y) != (b[:, 1] > y)
        at = a[:, 0] + (y - a[:, 1]) * dx / np.where(dy == 0, 1e-6, dy)
        inside = (crosses & (x < at)).sum(-1) % 2 == 1
        far = np.where(inside, -far, far)
    soft = (0.5, 1.0, 1.6)[min(fine, 3) - 1]
    return Cover(np.clip(0.5 - far / soft, 0, 1), left, top)


def scanline(contours: Contours, side: int, *, stroke: float = 0.0, fine: int = 5) -> Cover:
    """Exact lengths inside on `fine` lines through each row of pixels; an outline is the figure less a smaller one."""
    if stroke:
        middle = contours[0].mean(0)
        reach = np.abs(contours[0] - middle).max()
        inner = [middle + (contour - middle) * max(0.1, 1 - 1.6 * stroke / reach) for contour in contours]
        contours = [*contours, *inner]
    left, top, right, bottom = window(contours, side, 1)
    lines = top + (np.arange((bottom - top) * fine) + 0.5) / fine
    cells = np.arange(left, right + 1)
    crossings: list[list[float]] = [[] for _ in lines]
    for contour in contours:
        for (ax, ay), (bx, by) in zip(contour, np.roll(contour, -1, 0), strict=True):
            if ay == by:
                continue
            first, last = np.searchsorted(lines, (min(ay, by), max(ay, by)))
            for number in range(first, last):
                crossings[number].append(ax + (lines[number] - ay) * (bx - ax) / (by - ay))
    covered = np.zeros((len(lines), right - left), np.float32)
    for number, found in enumerate(crossings):
        for start, end in zip(*[iter(sorted(found))] * 2, strict=False):
            covered[number] += np.diff(np.clip(cells, start, end))
    return Cover(covered.reshape(bottom - top, fine, -1).mean(1), left, top)


Rasterizer = Callable[..., Cover]
RENDERERS: dict[str, dict[str, Rasterizer]] = {
    "train": {"pillow": pillow, "distance": distance},
    "held": {"scanline": scanline},
}
