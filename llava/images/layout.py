"""Image layouts: the tiles of an image, the part of them that shows it, and the number of features that it becomes.

In: sizes in pixels and an `ImagePolicy`. Out: an `ImageLayout`. `plan()` is the only place that counts image features;
training, serving budgets, the splice and the tracer call it. Neither torch nor Pillow is needed here: the pixels of a
layout are made in mm_utils.py, its features in model/llava_arch.py. The part of the image that each feature shows is
computed in feature_boxes.py, the features of videos are counted in video_layout.py.

Sizes are `(width, height)` for images and `(rows, cols)` for grids; the type says which.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from llava.errors import InputError

Mode = Literal["square", "pad", "anyres", "highres", "crop_split"]
Merge = Literal["flat", "spatial", "spatial_unpad"]

# How `image_aspect_ratio` is spelled in config files, and what it means. LLaVA-NeXT writes "anyres_max_9" for "anyres" with
# features reduced to those of nine tiles.
MODES: dict[str | None, Mode] = {
    None: "square",
    "square": "square",
    "pad": "pad",
    "anyres": "anyres",
    "highres": "highres",
    "crop_split": "crop_split",
}
ANYRES_MAX = re.compile(r"anyres_max_([1-9]\d{0,3})")
MERGES: tuple[Merge, ...] = ("flat", "spatial", "spatial_unpad")
# How `mm_patch_merge_type` is spelled: "unpad_anyres_max" is "spatial_unpad", and the reduction is image_aspect_ratio's.
MERGE_TYPE = re.compile(r"(spatial|spatial_unpad|unpad)(_maxpool2x2)?(?:_anyres_max)?(_nobase)?")

REDUCES_ABOVE = 1.1  # "anyres_max_N" reduces a grid whose side is this many times too long, or more

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


class MergeType(NamedTuple):
    """How the features of an image's tiles are joined, as `mm_patch_merge_type` says."""

    merge: Merge
    pools: bool = False  # "maxpool2x2": the largest of each four features of the grid
    keeps_overview: bool = True  # "nobase" leaves the overview out


class CropSplit(NamedTuple):
    """Sides in pixels of mode "crop_split": an image's middle is cut out and split into squares."""

    crop: int  # image_crop_resolution
    split: int  # image_split_resolution

    @property
    def tiles_per_side(self) -> int:
        return self.crop // self.split


def image_mode(aspect_ratio: str | None) -> Mode:
    """Translate a config's `image_aspect_ratio`; an unknown spelling is an error."""
    if aspect_ratio is not None and ANYRES_MAX.fullmatch(aspect_ratio):
        return "anyres"
    if aspect_ratio not in MODES:
        known = ", ".join(repr(name) for name in MODES if name)
        raise InputError(
            f"image_aspect_ratio is {aspect_ratio!r}, which is not supported; use one of {known}, 'anyres_max_<N>'."
        )
    return MODES[aspect_ratio]


def max_tiles_of(aspect_ratio: str | None) -> int | None:
    """The number of tiles to whose features `image_aspect_ratio` "anyres_max_N" reduces a grid; None for other values."""
    match = ANYRES_MAX.fullmatch(aspect_ratio or "")
    return int(match[1]) if match else None


def merge_type(name: str) -> MergeType:
    """Translate a config's `mm_patch_merge_type`; an unknown spelling is an error."""
    if name == "flat":
        return MergeType("flat")
    match = MERGE_TYPE.fullmatch(name.replace("-", "_"))
    if match is None:
        raise InputError(
            f"unknown mm_patch_merge_type {name!r}; known: {', '.join(MERGES)}, the last two also with '_maxpool2x2' and "
            "'_nobase' behind"
        )
    return MergeType("spatial_unpad" if "unpad" in match[1] else "spatial", bool(match[2]), not match[3])


def crop_split(crop: int | None, split: int | None) -> CropSplit | None:
    """Read `image_crop_resolution` and `image_split_resolution`; None where a config has neither."""
    if crop is None and split is None:
        return None
    if not crop or not split or crop < split or (crop // split) ** 2 > MAX_TILES:
        raise InputError(
            f"image_crop_resolution is {crop} and image_split_resolution {split}; both are sides in pixels, the first at least "
            f"the second, and an image has at most {MAX_TILES} parts."
        )
    return CropSplit(crop, split)


@dataclass(frozen=True)
class ImagePolicy:
    """How a model's images are cut into tiles, and how the features of the tiles are joined."""

    # "square": centre crop; "pad": padded to a square; "anyres": one overview tile, then tiles of a grid; "highres": one
    # overview tile, then tiles of the image padded to a square; "crop_split": tiles of the middle
    mode: Mode
    tile_size: int  # pixels per side of what the vision tower sees
    patch_size: int  # pixels per side of one feature
    pinpoints: tuple[ImageSize, ...] = ()  # canvas sizes that "anyres" chooses from, in pixels
    merge: Merge = "flat"  # order of tile features: one after another, by rows, or by rows without the padding
    cls_token: bool = False  # the tower also gives one feature for the whole tile, before the patches
    max_tiles: int | None = None  # a grid of more features than those of this many tiles is reduced by interpolation
    pools: bool = False  # the largest of each four features of the grid is taken
    keeps_overview: bool = True  # the overview's features come before those of the grid
    crop_split: CropSplit | None = None  # for that mode

    def __post_init__(self) -> None:
        object.__setattr__(self, "pinpoints", parse_pinpoints(self.pinpoints, self.tile_size))
        if self.mode not in MODES.values():
            raise InputError(f"image mode is {self.mode!r}; known: {', '.join(dict.fromkeys(MODES.values()))}.")
        if self.merge not in MERGES:
            raise InputError(f"mm_patch_merge_type is {self.merge!r}; known: {', '.join(MERGES)}.")
        if not 1 <= self.patch_size <= self.tile_size:
            raise InputError(f"a patch of {self.patch_size} pixels does not fit a tile of {self.tile_size} pixels.")
        if self.mode == "crop_split" and self.crop_split is None:
            raise InputError(
                "image_aspect_ratio 'crop_split' needs image_crop_resolution and image_split_resolution, and the config has "
                "neither."
            )
        if self.mode not in ("anyres", "highres"):
            return
        if not self.pinpoints:
            raise InputError(f"image_aspect_ratio {self.mode!r} needs image_grid_pinpoints, and the config names none.")
        for canvas in self.pinpoints:
            if self.mode == "highres" and canvas.width != canvas.height:
                raise InputError(
                    f"image_grid_pinpoints has {list(canvas)}, and image_aspect_ratio 'highres' takes squares; give their "
                    "sides, such as '336,672'."
                )
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
    def cuts_tiles(self) -> bool:
        """Whether an image becomes several tiles."""
        return self.mode in ("anyres", "highres", "crop_split")

    @property
    def max_image_tiles(self) -> int:
        """The largest number of tiles of an image."""
        if self.mode == "crop_split" and self.crop_split is not None:
            return self.crop_split.tiles_per_side**2
        canvases = self.pinpoints if self.cuts_tiles else ()
        return 1 + max((size.width * size.height // self.tile_size**2 for size in canvases), default=0)

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
    reduced: Grid | None = None  # what the kept part is interpolated or pooled to
    pools: bool = False  # `reduced` by the largest of each four features
    keeps_overview: bool = True
    is_padded: bool = False  # a single tile of an image padded to a square, of a policy that cuts tiles

    @property
    def has_overview(self) -> bool:
        """Whether the first of several tiles is the whole image."""
        return self.tile_grid is not None and self.num_tiles > self.tile_grid.rows * self.tile_grid.cols

    @property
    def end_grid(self) -> Grid:
        """Rows and columns of the grid's features as they enter the sequence, without newlines."""
        return self.reduced or Grid(self.crop.rows, self.crop.cols)


def one_tile_each(max_tiles: int | None, num_images: int) -> bool:
    """Whether each image of a prompt is padded to one tile: models with "anyres_max_N" learned several images so."""
    return max_tiles is not None and num_images > 1


def plan_images(sizes: Sequence[Sequence[int]], policy: ImagePolicy, details: Sequence[str] = ()) -> list[ImageLayout]:
    """Lay out the images of one prompt or one training sample, of `sizes` (width, height).

    `details` has a word for each image, or is empty; "low" takes the overview tile alone of an image that would be cut.
    """
    if details and len(details) != len(sizes):
        raise InputError(f"{len(details)} details were given for {len(sizes)} images; give one for each, or none")
    if one_tile_each(policy.max_tiles, len(sizes)):
        return [replace(plan(size, policy, num_tiles=1), is_padded=True) for size in sizes]
    has_overview = policy.mode in ("anyres", "highres")
    alone = [has_overview and detail == "low" for detail in details] or [False] * len(sizes)
    return [plan(size, policy, num_tiles=1 if low else None) for size, low in zip(sizes, alone, strict=True)]


def plan(size: Sequence[int], policy: ImagePolicy, *, num_tiles: int | None = None) -> ImageLayout:
    """Lay out one image of `size` (width, height). `num_features` is exactly the number that the model makes.

    `num_tiles` is for pixels that a caller cut. One tile is a whole image under any policy, which "spatial_unpad" ends
    with one newline; any other number must be that of the policy, except that "flat" joins any number. None: the tiles
    that `mm_utils.process_images` cuts. The images of a prompt are laid out together by `plan_images`.
    """
    size = checked_size(size)
    if num_tiles is not None and num_tiles < 1:
        raise InputError(f"an image of {size.width}x{size.height} came as {num_tiles} tiles; it needs at least one.")
    if policy.cuts_tiles and num_tiles != 1:
        return _plan_tiles(size, policy, num_tiles)
    if num_tiles in (None, 1):
        return _plan_flat(size, policy, 1, int(policy.merge == "spatial_unpad"))
    if num_tiles is not None and policy.merge == "flat":
        return _plan_flat(size, policy, num_tiles, 0)
    raise InputError(
        f"an image of {size.width}x{size.height} came as {num_tiles} tiles, but image_aspect_ratio "
        f"{policy.mode!r} makes a single one; set image_aspect_ratio to 'anyres' or pass one tile. The frames of a video are "
        "no tiles: say modalities=['video'] for them."
    )


def _plan_flat(size: ImageSize, policy: ImagePolicy, num_tiles: int, num_newlines: int) -> ImageLayout:
    side = policy.patches_per_side
    num_features = num_tiles * policy.features_per_tile + num_newlines
    return ImageLayout(size, num_tiles, None, Grid(side, side), Crop(0, side, 0, side), num_newlines, num_features)


def _plan_tiles(size: ImageSize, policy: ImagePolicy, num_tiles: int | None) -> ImageLayout:
    tiles = _tile_grid(size, policy)
    has_overview = policy.mode != "crop_split"
    expected = int(has_overview) + tiles.rows * tiles.cols
    if num_tiles not in (None, expected):
        if policy.merge == "flat":
            return _plan_flat(size, policy, num_tiles, 0)
        raise InputError(
            f"an image of {size.width}x{size.height} came as {num_tiles} tiles, but its layout has {expected}: "
            f"{'one overview and ' * has_overview}{tiles.rows}x{tiles.cols}; were its pixels and its size taken from the same "
            "image? The frames of a video are no tiles: say modalities=['video'] for them."
        )
    if expected == 1:
        return _plan_flat(size, policy, 1, int(policy.merge == "spatial_unpad"))
    side = policy.patches_per_side
    grid = Grid(tiles.rows * side, tiles.cols * side)
    whole = Crop(0, grid.rows, 0, grid.cols)
    if policy.merge == "flat":
        return ImageLayout(size, expected, tiles, grid, whole, 0, expected * policy.features_per_tile)
    if policy.cls_token:
        raise InputError(
            f"mm_patch_merge_type {policy.merge!r} joins patches by rows, without a class feature; "
            "use mm_vision_select_feature 'patch' or mm_patch_merge_type 'flat'."
        )
    overview = policy.features_per_tile if has_overview and policy.keeps_overview else 0
    if policy.pools:  # the padding stays, and rows have no ends
        reduced = Grid(grid.rows // 2, grid.cols // 2)
        num_features = overview + reduced.rows * reduced.cols
        return ImageLayout(size, expected, tiles, grid, whole, 0, num_features, reduced, True, policy.keeps_overview)
    unpads = policy.merge == "spatial_unpad"
    crop = unpad_box(grid.rows, grid.cols, size) if unpads and has_overview else whole
    fewer = _reduced(crop, policy) if unpads else None
    rows, cols = fewer or (crop.rows, crop.cols)
    newlines = rows if unpads else 0
    num_features = overview + rows * cols + newlines
    return ImageLayout(
        size, expected, tiles, grid, crop, newlines, num_features, fewer, keeps_overview=policy.keeps_overview
    )


def _tile_grid(size: ImageSize, policy: ImagePolicy) -> Grid:
    if policy.mode == "anyres":
        cols, rows = get_anyres_image_grid_shape(size, policy.pinpoints, policy.tile_size)
        return Grid(rows, cols)
    if policy.mode == "highres":
        per_side = max(canvas.width for canvas in policy.pinpoints) // policy.tile_size
    else:
        assert policy.crop_split is not None
        per_side = policy.crop_split.tiles_per_side
    return Grid(per_side, per_side)


def _reduced(crop: Crop, policy: ImagePolicy) -> Grid | None:
    """The grid that "anyres_max_N" interpolates the kept part to; None where that is not larger than N tiles.

    Rounded as in the training of the released weights: floats, and whole numbers below the quotient.
    """
    if policy.max_tiles is None:
        return None
    times = math.sqrt(crop.rows * crop.cols / (policy.max_tiles * policy.patches_per_side**2))
    if times <= REDUCES_ABOVE:
        return None
    return Grid(max(1, int(crop.rows // times)), max(1, int(crop.cols // times)))


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


def read_pinpoints(pinpoints: Pinpoints, mode: Mode = "anyres") -> tuple[ImageSize, ...] | TileRange:
    """Read canvas sizes from a list of pairs, or from a flag: "[(336, 672), (672, 336)]" in pixels, "(1x1),...,(6x6)" in tiles.

    The second form is a range in both directions, from its first pair to its last, whatever stands between them. In mode
    "highres" a number is the side of a square: "336,672".
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
    if mode == "highres":
        sides = [value] if isinstance(value, int) else value
        value = [(side, side) if isinstance(side, int) else side for side in sides]  # type: ignore[attr-defined]
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
