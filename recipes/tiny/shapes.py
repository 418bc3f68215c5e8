"""The outlines of the ten shapes, as contours in a unit circle, drawn by two hands.

In: a shape's name, a number in 0..1 that says which of its proportions, a hand. Out: contours ((N, 2) arrays, y
down), filled by the even-odd rule. "train" and "held" differ in formulas and proportions, so that the suite shows
shapes that training never saw drawn so.
"""

from __future__ import annotations

import functools
import math

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "hexagon", "ring", "crescent")
HANDS = ("train", "held")
STEPS = 16  # proportions are rounded to so many, so that outlines can be kept


def outline(shape: str, variant: float, hand: str) -> tuple[np.ndarray, ...]:
    return kept_outline(shape, round(variant * STEPS) / STEPS, hand)


@functools.cache
def kept_outline(shape: str, variant: float, hand: str) -> tuple[np.ndarray, ...]:
    v, held = variant, hand == "held"
    if shape == "circle":
        return (arc(0, 360, 36 if not held else 48),)
    if shape == "ring":
        return arc(0, 360, 36), arc(0, 360, 36) * (0.553 + 0.074 * v if held else 0.48 + 0.2 * v)
    if shape == "square":
        half = 0.88 if held else 0.8 + 0.12 * v
        return (np.array([(-half, -half), (half, -half), (half, half), (-half, half)]),)
    if shape == "triangle":
        if held:
            return (arc(0, 360, 3),)
        apex, base = (v - 0.5) * 0.5, 0.85 + 0.13 * (v * 7 % 1)
        return (np.array([(apex, -1.0), (base, 0.75), (-base, 0.75)]),)
    if shape == "star":
        inner = 0.45 if held else 0.36 + 0.16 * v
        return (arc(0, 360, 10) * np.where(np.arange(10) % 2 == 0, 1.0, inner)[:, None],)
    if shape == "heart":
        return (round_heart(v) if held else smooth_heart(v),)
    if shape == "diamond":
        wide = 0.617 + 0.149 * v if held else 0.56 + 0.42 * v
        return (np.array([(0.0, -1.0), (wide, 0.0), (0.0, 1.0), (-wide, 0.0)]),)
    if shape == "cross":
        w, r = (0.27 + 0.08 * v, 0.97) if held else (0.2 + 0.17 * v, 1.0)
        corner = [
            (-w, -r),
            (w, -r),
            (w, -w),
            (r, -w),
            (r, w),
            (w, w),
            (w, r),
            (-w, r),
            (-w, w),
            (-r, w),
            (-r, -w),
            (-w, -w),
        ]
        return (np.array(corner),)
    if shape == "hexagon":
        return (arc(30, 390, 6),)
    if shape == "crescent":
        return (held_crescent(v) if held else crescent(0.45 + 0.3 * v, 1.0),)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def arc(start: float, end: float, count: int) -> np.ndarray:
    """`count` points of the unit circle, clockwise from straight up, without the last."""
    angle = np.radians(np.linspace(start, end, count, endpoint=False))
    return np.stack([np.sin(angle), -np.cos(angle)], 1)


def smooth_heart(variant: float) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -(y + 2.5) / 17 * (0.9 + 0.2 * variant)], 1)


def round_heart(variant: float) -> np.ndarray:
    """Two half circles on a triangle."""
    r = 0.5
    left = np.array([(-r, -0.35)]) + r * arc(-100, 90, 14)
    right = left[::-1] * (-1, 1)
    return np.concatenate([left, right, [(0.0, 0.85 + 0.1 * variant)]])


def crescent(shift: float, bite: float) -> np.ndarray:
    """A circle less another of `bite` times its size, `shift` to the right."""
    cross = (1 + shift * shift - bite * bite) / (2 * shift)  # where the two meet
    half = math.degrees(math.acos(max(-1.0, min(1.0, cross))))
    inner_half = math.degrees(math.acos(max(-1.0, min(1.0, (cross - shift) / bite))))
    outer = arc(90 + half, 450 - half, 26)
    inner = arc(90 + inner_half, 450 - inner_half, 20)[::-1] * bite + (shift, 0)
    points = np.concatenate([outer, inner])
    return points + np.array((0.18, 0.0))  # its middle is left of the circle's


def held_crescent(variant: float) -> np.ndarray:
    return crescent(0.5 + 0.12 * variant, 0.85)


def place(
    contours: tuple[np.ndarray, ...],
    *,
    x: float,
    y: float,
    radius: float,
    angle: float,
    stretch: float,
    keystone: float,
    wobble: float = 0.0,
) -> list[np.ndarray]:
    """Turned by `angle` degrees, stretched, narrowed towards the top, and moved to (x, y), all as fractions of the side.

    `wobble` is the unsteadiness of a hand: how far the outline strays, as a share of its size.
    """
    turn = math.radians(angle)
    rotate = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    placed = []
    for contour in contours:
        if wobble:
            contour = shake(contour, wobble, angle)
        points = contour @ rotate * (stretch, 1 / stretch)
        points = points * np.stack([1 + keystone * points[:, 1], np.ones(len(points))], 1)
        placed.append(points * radius + (x, y))
    return placed


def shake(contour: np.ndarray, amount: float, phase: float) -> np.ndarray:
    """The outline in short pieces, moved to and fro by two slow waves along it."""
    after = np.roll(contour, -1, 0)
    parts = [
        start + (end - start) * np.linspace(0, 1, max(1, round(math.dist(start, end) / 0.25)), endpoint=False)[:, None]
        for start, end in zip(contour, after, strict=True)
    ]
    points = np.concatenate(parts)
    along = np.linspace(0, 2 * np.pi, len(points), endpoint=False)
    waves = np.stack([np.sin(3 * along + phase), np.cos(2 * along + 2 * phase) * 0.6 + np.sin(5 * along) * 0.4], 1)
    return points + amount * np.abs(contour).max() * waves
