"""images/layout.py against recorded tables, recorded sequence lengths, exact rational arithmetic and pixels really cropped."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from fractions import Fraction

import pytest
from golden_data import golden

from llava.errors import InputError
from llava.images.layout import (
    Crop,
    Grid,
    ImagePolicy,
    ImageSize,
    fit_inside,
    get_anyres_image_grid_shape,
    image_mode,
    merge_type,
    parse_pinpoints,
    plan,
    read_pinpoints,
    select_best_resolution,
    tile_boxes,
    unpad_box,
)

TABLES = json.loads(golden("images/size_tables.json").read_text())
COUNTS = json.loads(golden("images/feature_counts.json").read_text())
PINPOINTS_336 = parse_pinpoints([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], 336)
PINPOINTS_56 = parse_pinpoints([[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]], 56)
RELEASED = ImagePolicy("anyres", 336, 14, PINPOINTS_336, "spatial_unpad")


@pytest.mark.parametrize("row", TABLES["select_best_resolution"], ids=lambda row: "x".join(map(str, row["size"])))
def test_best_resolution_and_grid(row: dict) -> None:
    assert list(select_best_resolution(row["size"], row["pinpoints"])) == row["best"]
    assert list(get_anyres_image_grid_shape(row["size"], row["pinpoints"], row["patch"])) == row["grid"]
    assert list(get_anyres_image_grid_shape(row["size"], str(row["pinpoints"]), row["patch"])) == row["grid_from_str"]


def test_ranges_of_tiles() -> None:
    for row in json.loads(golden("images/tile_ranges.json").read_text()):
        assert list(get_anyres_image_grid_shape(row["size"], row["pinpoints"], row["patch"])) == row["grid"], row
    assert parse_pinpoints("(1x1), ... ,( 2x3 )", 10) == ((10, 10), (10, 20), (10, 30), (20, 10), (20, 20), (20, 30))
    assert parse_pinpoints("(2x1)", 10) == ((20, 10),)
    text = "(1x1),...,(6x6)"
    assert str(read_pinpoints(text)) == text
    assert ImagePolicy("anyres", 336, 14, text).pinpoints == parse_pinpoints(text, 336)


@pytest.mark.parametrize("row", TABLES["resize_and_pad"], ids=lambda row: f"{row['size']}-{row['target']}")
def test_fit_inside(row: dict) -> None:
    fitted, (left, top) = fit_inside(row["size"], row["target"])
    assert [left, top, left + fitted.width, top + fitted.height] == row["content_bbox_xyxy"]


@pytest.mark.parametrize("row", TABLES["unpad"], ids=lambda row: f"{row['size']}-{row['grid_hw']}")
def test_unpad(row: dict) -> None:
    rows, cols = row["grid_hw"]
    crop = unpad_box(rows, cols, row["size"])
    assert [crop.rows, crop.cols] == row["out_hw"]
    if crop.rows and crop.cols:
        assert crop.row_start * cols + crop.col_start == row["first"]
        assert (crop.row_stop - 1) * cols + crop.col_stop - 1 == row["last"]


@pytest.mark.parametrize("row", TABLES["divide_to_patches"], ids=lambda row: f"{row['size']}")
def test_tile_boxes(row: dict) -> None:
    boxes = tile_boxes(row["size"], row["patch"])
    assert [[right - left, bottom - top] for left, top, right, bottom in boxes] == row["boxes"]
    covered = {
        (x, y) for left, top, right, bottom in boxes for x in range(left, right, 7) for y in range(top, bottom, 7)
    }
    assert len(covered) == (row["size"][0] // 7) * (row["size"][1] // 7)
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))  # row by row


def tiles_of(row: dict) -> list[int | None]:
    """How the recording fed each image: cut as the policy cuts, or as a single tile, or in a plain batch (None)."""
    if isinstance(row["images"], list):
        return [None if name.startswith("anyres") else 1 for name in row["images"]]
    return [None] * len(row["image_sizes"])


@pytest.mark.parametrize("row", COUNTS["rows"], ids=lambda row: row["case"])
def test_recorded_sequence_lengths(row: dict) -> None:
    plain_batch = isinstance(row["images"], str) and row["images"].startswith("pad")  # such a batch is never merged
    policy = ImagePolicy(
        mode="square" if plain_batch else "anyres",
        tile_size=56,
        patch_size=14,
        pinpoints=PINPOINTS_56,
        merge="flat" if plain_batch else row["overrides"].get("mm_patch_merge_type", "spatial_unpad"),
        cls_token=row["overrides"].get("tower.select_feature") == "cls_patch",
    )
    images = list(zip(row["image_sizes"], tiles_of(row), strict=True))
    for text, marks, length in zip(row["text_tokens"], row["image_tokens"], row["lengths"], strict=True):
        # A row without an image mark takes one image off the queue and shows none of it.
        taken, images = images[: max(marks, 1)], images[max(marks, 1) :]
        shown = taken if marks else []
        assert text + sum(plan(size, policy, num_tiles=tiles).num_features for size, tiles in shown) == length
    assert not images


def test_float_formula_is_kept() -> None:
    layout = plan((88, 55), RELEASED)
    assert layout.num_features == 926
    assert layout.crop == Crop(17, 31, 0, 24)
    assert layout.feature_grid == Grid(48, 24)
    # What exact integers would give: the 15 rows that truncation turned into 14, and so 16 kept rather than 14.
    assert int(55 * Fraction(24, 88)) == 15


def test_plan_of_ordinary_images() -> None:
    square = ImagePolicy("square", 336, 14)
    assert plan((640, 480), square).num_features == 576
    assert plan((640, 480), square).tile_grid is None
    assert plan((1, 9999), ImagePolicy("pad", 336, 14, merge="spatial_unpad")).num_features == 577  # with a newline
    assert plan((640, 480), ImagePolicy("pad", 336, 14, cls_token=True)).num_features == 577
    assert plan((640, 480), ImagePolicy("square", 384, 14)).num_features == 27 * 27  # a tower that drops the rest
    layout = plan((640, 480), RELEASED)
    assert (layout.num_tiles, layout.tile_grid, layout.num_newlines) == (5, Grid(2, 2), 36)
    assert layout.num_features == 576 + 36 * 48 + 36
    for merge in ("flat", "spatial"):
        layout = plan((640, 480), ImagePolicy("anyres", 336, 14, PINPOINTS_336, merge))
        assert (layout.num_features, layout.num_newlines, layout.crop) == (5 * 576, 0, Crop(0, 48, 0, 48))


@pytest.mark.parametrize(
    ("size", "rows", "cols", "features"),
    [((1, 1), 24, 24, 1176), ((1, 10000), 48, 0, 624), ((10000, 1), 0, 24, 576), ((99999, 99999), 48, 48, 2928)],
)
def test_extreme_shapes(size: tuple[int, int], rows: int, cols: int, features: int) -> None:
    layout = plan(size, RELEASED)
    assert (layout.crop.rows, layout.crop.cols, layout.num_newlines) == (rows, cols, rows)
    assert layout.num_features == features


def test_unpad_box_is_what_cropping_does() -> None:
    """Slices with these bounds, on a real grid, give the counted features; and the crop lies inside the grid, centred."""
    generator = random.Random(0)
    for _ in range(3000):
        size = ImageSize(int(10 ** generator.uniform(0, 4)), int(10 ** generator.uniform(0, 4)))
        rows, cols = generator.randint(1, 60), generator.randint(1, 60)
        crop = unpad_box(rows, cols, size)
        assert 0 <= crop.row_start <= crop.row_stop <= rows
        assert 0 <= crop.col_start <= crop.col_stop <= cols
        grid = [[(row, col) for col in range(cols)] for row in range(rows)]
        kept = [line[crop.col_start : crop.col_stop] for line in grid[crop.row_start : crop.row_stop]]
        assert (len(kept), sum(map(len, kept))) == (crop.rows, crop.rows * crop.cols)
        assert crop.row_start + crop.row_stop == rows
        assert crop.col_start + crop.col_stop == cols
        exact = size.height * Fraction(cols, size.width) if crop.cols == cols else None
        if exact is not None and crop.rows != rows:  # the truncation may cost one row, the halving add one
            assert int(exact) - 1 <= crop.rows <= int(exact) + 1


def test_tiles_somebody_else_cut() -> None:
    assert plan((64, 48), RELEASED, num_tiles=1).num_features == 577
    flat = ImagePolicy("anyres", 336, 14, PINPOINTS_336, "flat")
    assert plan((64, 48), flat, num_tiles=1).num_features == 576
    assert plan((64, 48), flat, num_tiles=7).num_features == 7 * 576
    assert plan((640, 480), RELEASED, num_tiles=5) == plan((640, 480), RELEASED)
    assert plan((64, 48), ImagePolicy("pad", 336, 14), num_tiles=3).num_features == 3 * 576
    with pytest.raises(InputError, match="4 tiles, but its layout has 5"):
        plan((640, 480), RELEASED, num_tiles=4)
    with pytest.raises(InputError, match="'pad' makes a single one"):
        plan((640, 480), ImagePolicy("pad", 336, 14, merge="spatial"), num_tiles=4)
    with pytest.raises(InputError, match="at least one"):
        plan((640, 480), flat, num_tiles=0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "3",
        "[1, 2]",
        "[(0, 336)]",
        "[(336, 672, 1)]",
        "[(336.0, 672)]",
        "abc",
        "{}",
        "(0x1),...,(2x2)",
        "(2x2),...,(1x3)",
        "(1x1),...,(900x900)",
        "(1x1),...",
        "(1x1)...(2x2)",
        "1x1",
    ],
)
def test_pinpoints_that_are_none(text: str) -> None:
    if text == "{}":  # an empty collection names no canvas; the policy says so
        with pytest.raises(InputError, match="names none"):
            ImagePolicy("anyres", 336, 14, parse_pinpoints(text, 336))
        return
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        parse_pinpoints(text, 336)


def test_policies_that_cannot_work() -> None:
    with pytest.raises(InputError, match="names none"):
        ImagePolicy("anyres", 336, 14)
    with pytest.raises(InputError, match=r"\[300, 336\]"):
        ImagePolicy("anyres", 336, 14, parse_pinpoints([(300, 336)], 336))
    with pytest.raises(InputError, match="mm_patch_merge_type is 'bogus'"):
        ImagePolicy("pad", 336, 14, merge="bogus")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not fit"):
        ImagePolicy("pad", 13, 14)
    with pytest.raises(InputError, match="class feature"):
        plan((640, 480), ImagePolicy("anyres", 336, 14, PINPOINTS_336, "spatial", cls_token=True))
    for name in ("tiled", "anyres_max_", "anyres_max_0", "anyres_max_9x"):
        with pytest.raises(InputError, match=f"image_aspect_ratio is '{name}'"):
            image_mode(name)
    for name in ("spatial_", "unpad_nobase_maxpool2x2", "flat_nobase", "spatial_unpad_max"):
        with pytest.raises(InputError, match=f"unknown mm_patch_merge_type '{name}'"):
            merge_type(name)
    with pytest.raises(InputError, match="takes squares"):
        ImagePolicy("highres", 336, 14, ((336, 672),))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs image_crop_resolution"):
        ImagePolicy("crop_split", 336, 14)
    with pytest.raises(InputError, match="no pixels"):
        plan((0, 480), RELEASED)
    with pytest.raises(InputError, match="empty"):
        select_best_resolution((640, 480), [])


def test_no_torch_and_no_pillow() -> None:
    code = "import sys, llava.images.layout; print([m for m in ('torch', 'PIL', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
