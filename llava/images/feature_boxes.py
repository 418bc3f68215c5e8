"""The part of an image that each of its tiles and each of its features shows, for pages that draw them.

In: an `ImageLayout` and its `ImagePolicy`. Out: rectangles in the image's own pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from llava.images.layout import Grid, ImageLayout, ImagePolicy, ImageSize, fit_inside


class Box(NamedTuple):
    """A rectangle in an image's own pixels; it may reach beyond the image, where padding lies."""

    left: float
    top: float
    right: float
    bottom: float


def tile_areas(layout: ImageLayout, policy: ImagePolicy, *, crops: bool = True) -> list[Box]:
    """The part of an image that each of its tiles shows.

    `crops` says whether the image processor crops an image that is not square; otherwise it squeezes it.
    """
    width, height = layout.size
    if layout.tile_grid is None:
        return [_tile_area(layout, policy, crops=crops)] * layout.num_tiles
    area, (rows, cols) = _grid_area(layout, policy), layout.tile_grid
    tiles = [_cell(area, row, col, layout.tile_grid) for row in range(rows) for col in range(cols)]
    return [Box(0, 0, width, height), *tiles] if layout.has_overview else tiles


def _tile_area(layout: ImageLayout, policy: ImagePolicy, *, crops: bool) -> Box:
    """What the single tile of an image shows."""
    width, height = layout.size
    if policy.mode == "pad" or layout.is_padded:
        return _padded(layout.size)
    if policy.mode == "crop_split" or (policy.mode == "square" and crops):
        return _middle(layout.size)
    return Box(0, 0, width, height)


def _grid_area(layout: ImageLayout, policy: ImagePolicy) -> Box:
    """What all tiles of the grid show together."""
    assert layout.tile_grid is not None
    if policy.mode == "highres":
        return _padded(layout.size)
    if policy.mode == "crop_split":
        return _middle(layout.size)
    width, height = layout.size
    canvas = ImageSize(layout.tile_grid.cols * policy.tile_size, layout.tile_grid.rows * policy.tile_size)
    fitted, (left, top) = fit_inside(layout.size, canvas)
    across, down = width / fitted.width, height / fitted.height
    return Box(-left * across, -top * down, (canvas.width - left) * across, (canvas.height - top) * down)


def _padded(size: ImageSize) -> Box:
    width, height = size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return Box(-left, -top, side - left, side - top)


def _middle(size: ImageSize) -> Box:
    width, height = size
    side = min(width, height)
    return Box((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)


def feature_boxes(layout: ImageLayout, policy: ImagePolicy, *, crops: bool = True) -> list[Box | None]:
    """The part of an image that each feature shows, in the order of the sequence; None for newlines and class features."""
    areas, side = tile_areas(layout, policy, crops=crops), policy.patches_per_side
    head: list[Box | None] = [None] if policy.cls_token else []
    per_tile = Grid(side, side)
    by_tile = [[_cell(area, row, col, per_tile) for row in range(side) for col in range(side)] for area in areas]
    if layout.tile_grid is None or policy.merge == "flat":
        boxes = [box for patches in by_tile for box in (*head, *patches)]
        return [*boxes, *[None] * layout.num_newlines]
    rest: list[Box | None] = []
    area, crop, end = _grid_area(layout, policy), layout.crop, layout.end_grid
    # Pooled features stand for two rows and two columns each; a row or column that is left over is dropped.
    row_stop, col_stop = (2 * end.rows, 2 * end.cols) if layout.pools else (crop.row_stop, crop.col_stop)
    first = _cell(area, crop.row_start, crop.col_start, layout.feature_grid)
    last = _cell(area, row_stop - 1, col_stop - 1, layout.feature_grid)
    kept = Box(first.left, first.top, last.right, last.bottom)
    for row in range(end.rows):
        rest += [_cell(kept, row, col, end) for col in range(end.cols)]
        rest += [None] * (layout.num_newlines > 0)
    overview = by_tile[0] if layout.has_overview and layout.keeps_overview else []
    return [*overview, *rest]


def _cell(area: Box, row: int, col: int, grid: Grid) -> Box:
    width, height = (area.right - area.left) / grid.cols, (area.bottom - area.top) / grid.rows
    left, top = area.left + col * width, area.top + row * height
    return Box(left, top, left + width, top + height)
