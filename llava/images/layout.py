"""Image layouts: the tiles of an image, the part of them that shows it, and the number of features that it becomes.

In: sizes in pixels and an `ImagePolicy`. Out: an `ImageLayout`. `plan()` is the only place that counts image features;
training, serving budgets, the splice and the tracer call it. Neither torch nor Pillow is needed here: the pixels of a
layout are made in mm_utils.py, its features in model/llava_arch.py.

Sizes are `(width, height)` for images and `(rows, cols)` for grids; the type says which.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from llava.errors import InputError

Mode = Literal["square", "pad", "anyres"]
Merge = Literal["flat", "spatial", "spatial_unpad"]

# How `image_aspect_ratio` is spelled in config files, and what it means.
MODES: dict[str | None, Mode] = {None: "square", "square": "square", "pad": "pad", "anyres": "anyres"}
MERGES: tuple[Merge, ...] = ("flat", "spatial", "spatial_unpad")

# A range of canvases, in tiles across and down, as LLaVA-NeXT writes it: "(1x1),...,(6x6)".
TILES = r"\(\s*(\d+)\s*x\s*(\d+)\s*\)"
TILE_RANGE = re.compile(rf"\s*{TILES}(?:\s*,\s*(?:\.\.\.\s*,\s*)?{TILES})*\s*")
MAX_TILES = 1024  # of a canvas; published models have at most 36
MAX_CANVASES = 4096  # of a range


class ImageSize(NamedTuple):
    """A size in pixels. Equal to, and usable as, the plain tuple that Pillow gives."""

    width: int
    height: int


class Grid(NamedTuple):
    """Rows and columns of tiles or of features."""

    rows: int
    cols: int


class TileRange(NamedTuple):
    """All canvases from `first` to `last`, each (tiles across, tiles down). What they are in pixels, the tower decides."""

    first: tuple[int, int]
    last: tuple[int, int]

    def __str__(self) -> str:
        return "({}x{}),...,({}x{})".format(*self.first, *self.last)

    def canvases(self, tile_size: int) -> tuple[ImageSize, ...]:
        columns, rows = (range(start, stop + 1) for start, stop in zip(self.first, self.last, strict=True))
        return tuple(ImageSize(across * tile_size, down * tile_size) for across in columns for down in rows)


# What image_grid_pinpoints may be, in a config and as a flag.
Pinpoints: TypeAlias = str | Iterable[Sequence[int]] | TileRange | None


class Crop(NamedTuple):
    """The part of a feature grid that shows the image rather than padding; stops are exclusive."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def cols(self) -> int:
        return self.col_stop - self.col_start


def image_mode(aspect_ratio: str | None) -> Mode:
    """Translate a config's `image_aspect_ratio`; an unknown spelling is an error."""
    if aspect_ratio not in MODES:
        known = ", ".join(repr(name) for name in MODES if name)
        raise InputError(f"image_aspect_ratio is {aspect_ratio!r}, which is not supported; use one of {known}.")
    return MODES[aspect_ratio]


@dataclass(frozen=True)
class ImagePolicy:
    """How a model's images are cut into tiles, and how the features of the tiles are joined."""

    mode: Mode  # "square": centre crop; "pad": padded to a square; "anyres": one overview tile, then tiles of a grid
    tile_size: int  # pixels per side of what the vision tower sees
    patch_size: int  # pixels per side of one feature
    pinpoints: tuple[ImageSize, ...] = ()  # canvas sizes that "anyres" chooses from, in pixels
    merge: Merge = "flat"  # order of tile features: one after another, by rows, or by rows without the padding
    cls_token: bool = False  # the tower also gives one feature for the whole tile, before the patches

    def __post_init__(self) -> None:
        object.__setattr__(self, "pinpoints", parse_pinpoints(self.pinpoints, self.tile_size))
        if self.mode not in MODES.values():
            raise InputError(f"image mode is {self.mode!r}; known: {', '.join(dict.fromkeys(MODES.values()))}.")
        if self.merge not in MERGES:
            raise InputError(f"mm_patch_merge_type is {self.merge!r}; known: {', '.join(MERGES)}.")
        if not 1 <= self.patch_size <= self.tile_size:
            raise InputError(f"a patch of {self.patch_size} pixels does not fit a tile of {self.tile_size} pixels.")
        if self.mode != "anyres":
            return
        if not self.pinpoints:
            raise InputError("image_aspect_ratio 'anyres' needs image_grid_pinpoints, and the config names none.")
        for canvas in self.pinpoints:
            if canvas.width % self.tile_size or canvas.height % self.tile_size:
                raise InputError(
                    f"image_grid_pinpoints has {list(canvas)}, which tiles of {self.tile_size} pixels do not fill; "
                    f"use multiples of {self.tile_size}."
                )
            if canvas.width // self.tile_size * (canvas.height // self.tile_size) > MAX_TILES:
                raise InputError(
                    f"image_grid_pinpoints has {list(canvas)}, which takes more than {MAX_TILES} tiles of {self.tile_size} "
                    "pixels for an image."
                )

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def features_per_tile(self) -> int:
        return self.patches_per_side**2 + self.cls_token


@dataclass(frozen=True)
class ImageLayout:
    """The tiles of one image, the grid of its features, and how many features enter the sequence."""

    size: ImageSize  # of the image as it was given
    num_tiles: int  # with the overview tile
    tile_grid: Grid | None  # of the tiles after the overview; None where there is a single tile
    feature_grid: Grid  # before the padding is cut away
    crop: Crop  # the part of feature_grid that is kept
    num_newlines: int  # learned "end of row" features
    num_features: int  # all of them: overview, grid and newlines


def plan(size: Sequence[int], policy: ImagePolicy, *, num_tiles: int | None = None) -> ImageLayout:
    """Lay out one image of `size` (width, height). `num_features` is exactly the number that the model makes.

    `num_tiles` is for pixels that a caller cut. One tile is a whole image under any policy, which "spatial_unpad" ends
    with one newline; any other number must be that of the policy, except that "flat" joins any number. None: the tiles
    that `mm_utils.process_images` cuts.
    """
    size = checked_size(size)
    if num_tiles is not None and num_tiles < 1:
        raise InputError(f"an image of {size.width}x{size.height} came as {num_tiles} tiles; it needs at least one.")
    if policy.mode == "anyres" and num_tiles != 1:
        return _plan_tiles(size, policy, num_tiles)
    if num_tiles in (None, 1):
        newlines = 1 if num_tiles == 1 and policy.merge == "spatial_unpad" else 0
        return _plan_flat(size, policy, 1, newlines)
    if num_tiles is not None and policy.merge == "flat":
        return _plan_flat(size, policy, num_tiles, 0)
    raise InputError(
        f"an image of {size.width}x{size.height} came as {num_tiles} tiles, but image_aspect_ratio "
        f"{policy.mode!r} makes a single one; set image_aspect_ratio to 'anyres' or pass one tile."
    )


def _plan_flat(size: ImageSize, policy: ImagePolicy, num_tiles: int, num_newlines: int) -> ImageLayout:
    side = policy.patches_per_side
    num_features = num_tiles * policy.features_per_tile + num_newlines
    return ImageLayout(size, num_tiles, None, Grid(side, side), Crop(0, side, 0, side), num_newlines, num_features)


def _plan_tiles(size: ImageSize, policy: ImagePolicy, num_tiles: int | None) -> ImageLayout:
    tile_cols, tile_rows = get_anyres_image_grid_shape(size, policy.pinpoints, policy.tile_size)
    expected = 1 + tile_rows * tile_cols
    if num_tiles not in (None, expected):
        if policy.merge == "flat":
            return _plan_flat(size, policy, num_tiles, 0)
        raise InputError(
            f"an image of {size.width}x{size.height} came as {num_tiles} tiles, but its layout has {expected}: "
            f"one overview and {tile_rows}x{tile_cols}; were its pixels and its size taken from the same image?"
        )
    side = policy.patches_per_side
    grid = Grid(tile_rows * side, tile_cols * side)
    crop = Crop(0, grid.rows, 0, grid.cols)
    num_newlines = 0
    if policy.merge != "flat" and policy.cls_token:
        raise InputError(
            f"mm_patch_merge_type {policy.merge!r} joins patches by rows, without a class feature; "
            "use mm_vision_select_feature 'patch' or mm_patch_merge_type 'flat'."
        )
    if policy.merge == "flat":
        num_features = expected * policy.features_per_tile
    else:
        if policy.merge == "spatial_unpad":
            crop = unpad_box(grid.rows, grid.cols, size)
            num_newlines = crop.rows
        num_features = policy.features_per_tile + crop.rows * crop.cols + num_newlines
    return ImageLayout(size, expected, Grid(tile_rows, tile_cols), grid, crop, num_newlines, num_features)


def unpad_box(rows: int, cols: int, size: Sequence[int]) -> Crop:
    """The part of a `rows` x `cols` grid that an image of `size`, centred on it, covers.

    Released weights were trained with this float formula, whose truncation differs from exact integers for some sizes
    (88x55 on 48x24 keeps 14 rows, not 16). Very thin images can keep no row or no column at all; a grid without columns
    still has its rows, and so its newlines.
    """
    width, height = checked_size(size)
    if width / height > cols / rows:
        kept = int(height * (cols / width))
        start = (rows - kept) // 2
        return Crop(start, rows - start, 0, cols)
    kept = int(width * (rows / height))
    start = (cols - kept) // 2
    return Crop(0, rows, start, cols - start)


def select_best_resolution(
    original_size: Sequence[int], possible_resolutions: Iterable[Sequence[int]]
) -> tuple[int, int]:
    """Choose the canvas that keeps most of the image's own pixels, then the one with least padding, then the first."""
    width, height = checked_size(original_size)
    best: tuple[int, int] | None = None
    most_kept, least_wasted = 0, math.inf
    for canvas_width, canvas_height in possible_resolutions:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_width * canvas_height - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (canvas_width, canvas_height), kept, wasted
    if best is None:
        raise InputError("there is no resolution to choose from; image_grid_pinpoints is empty.")
    return best


def get_anyres_image_grid_shape(
    image_size: Sequence[int], grid_pinpoints: Pinpoints, patch_size: int
) -> tuple[int, int]:
    """Count the tiles of `patch_size` pixels (across, down) on the canvas that is chosen for an image."""
    width, height = select_best_resolution(image_size, parse_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def parse_pinpoints(pinpoints: Pinpoints, tile_size: int) -> tuple[ImageSize, ...]:
    """Read canvas sizes in pixels, for tiles of `tile_size` pixels, from any form that `read_pinpoints` reads."""
    canvases = read_pinpoints(pinpoints)
    return canvases.canvases(tile_size) if isinstance(canvases, TileRange) else canvases


def read_pinpoints(pinpoints: Pinpoints) -> tuple[ImageSize, ...] | TileRange:
    """Read canvas sizes from a list of pairs, or from a flag: "[(336, 672), (672, 336)]" in pixels, "(1x1),...,(6x6)" in tiles.

    The second form is a range in both directions, from its first pair to its last, whatever stands between them.
    """
    value: object = pinpoints
    if isinstance(value, TileRange):
        return value
    if isinstance(value, str):
        if TILE_RANGE.fullmatch(value):
            return _tile_range(value)
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise _bad_pinpoints(pinpoints) from None
    if value is None:
        return ()
    try:
        pairs = [tuple(pair) for pair in value]  # type: ignore[attr-defined]
    except TypeError:
        raise _bad_pinpoints(pinpoints) from None
    for pair in pairs:
        if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
            raise _bad_pinpoints(pinpoints)
    return tuple(ImageSize(*pair) for pair in pairs)


def _tile_range(text: str) -> TileRange:
    pairs = [(int(across), int(down)) for across, down in re.findall(TILES, text)]
    first, last = pairs[0], pairs[-1]
    counts = [stop - start + 1 for start, stop in zip(first, last, strict=True)]
    if min(first) < 1 or min(counts) < 1 or math.prod(counts) > MAX_CANVASES:
        raise InputError(
            f"image_grid_pinpoints {text!r} is no range of 1 to {MAX_CANVASES} canvases such as '(1x1),...,(6x6)'."
        )
    return TileRange(first, last)


def _bad_pinpoints(value: object) -> InputError:
    return InputError(
        f"image_grid_pinpoints {value!r} is neither a list of [width, height] pairs such as [[336, 672], [672, 336]] nor a "
        "range of tiles such as '(1x1),...,(6x6)'."
    )


def fit_inside(size: Sequence[int], canvas: Sequence[int]) -> tuple[ImageSize, tuple[int, int]]:
    """Scale a size, shape kept, to fill `canvas` one way; return it and the (left, top) that centres it."""
    width, height = checked_size(size)
    canvas_width, canvas_height = checked_size(canvas)
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        fitted = ImageSize(canvas_width, min(math.ceil(height * scale_x), canvas_height))
    else:
        fitted = ImageSize(min(math.ceil(width * scale_y), canvas_width), canvas_height)
    return fitted, ((canvas_width - fitted.width) // 2, (canvas_height - fitted.height) // 2)


def tile_boxes(size: Sequence[int], tile_size: int) -> list[tuple[int, int, int, int]]:
    """List (left, top, right, bottom) of each tile of a canvas, row by row."""
    width, height = checked_size(size)
    return [
        (left, top, left + tile_size, top + tile_size)
        for top in range(0, height, tile_size)
        for left in range(0, width, tile_size)
    ]


def checked_size(size: Sequence[int]) -> ImageSize:
    """Return `size` as an ImageSize, or raise InputError."""
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise InputError(f"an image of size {tuple(size)} has no pixels; a size is (width, height), both at least 1.")
    return ImageSize(int(size[0]), int(size[1]))


# Positions of features in the image


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
    if layout.tile_grid is not None:
        canvas = ImageSize(layout.tile_grid.cols * policy.tile_size, layout.tile_grid.rows * policy.tile_size)
        fitted, (left, top) = fit_inside(layout.size, canvas)
        across, down = width / fitted.width, height / fitted.height
        tiles = [
            Box((x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down)
            for x0, y0, x1, y1 in tile_boxes(canvas, policy.tile_size)
        ]
        return [Box(0, 0, width, height), *tiles]
    if policy.mode == "pad":
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        area = Box(-left, -top, side - left, side - top)
    elif policy.mode == "square" and crops:
        side = min(width, height)
        area = Box((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:
        area = Box(0, 0, width, height)
    return [area] * layout.num_tiles


def feature_boxes(layout: ImageLayout, policy: ImagePolicy, *, crops: bool = True) -> list[Box | None]:
    """The part of an image that each feature shows, in the order of the sequence; None for newlines and class features."""
    areas, side = tile_areas(layout, policy, crops=crops), policy.patches_per_side
    head: list[Box | None] = [None] if policy.cls_token else []
    by_tile = [[_cell(area, row, col, side) for row in range(side) for col in range(side)] for area in areas]
    if layout.tile_grid is None or policy.merge == "flat":
        boxes = [box for patches in by_tile for box in (*head, *patches)]
        return [*boxes, *[None] * layout.num_newlines]
    rest: list[Box | None] = []
    crop = layout.crop
    for row in range(crop.row_start, crop.row_stop):
        for col in range(crop.col_start, crop.col_stop):
            tile = 1 + row // side * layout.tile_grid.cols + col // side
            rest.append(by_tile[tile][row % side * side + col % side])
        rest += [None] * (layout.num_newlines > 0)
    return [*by_tile[0], *rest]


def _cell(area: Box, row: int, col: int, side: int) -> Box:
    width, height = (area.right - area.left) / side, (area.bottom - area.top) / side
    left, top = area.left + col * width, area.top + row * height
    return Box(left, top, left + width, top + height)
