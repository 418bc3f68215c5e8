"""Merge the features of one image's tiles into one sequence, as its layout says.

In: features per tile, an `ImageLayout` (images/layout.py). Out: the image's features in the order of the sequence.

    P patches per tile, D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.images.layout import Crop, ImageLayout, unpad_box


def merge_tiles(features: Tensor, layout: ImageLayout, newline: Tensor | None) -> Tensor:
    """Merge the features of one image's tiles, (tiles, P, D) -> (num_features, D).

    The overview comes first. The features of the other tiles are put together as the tiles lie in the image and read by
    rows, without the layout's padding, reduced where the layout says so; `newline` (D,) ends each row where the layout has
    newlines.
    """
    ends = []  # the newline as one row, if the layout has newlines
    if layout.num_newlines:
        assert newline is not None, "a layout with newlines needs image_newline"
        ends = [newline.to(features)[None]]
    if layout.tile_grid is None:
        merged = torch.cat([features.flatten(0, 1), *ends])
    else:
        tiles = features[1:] if layout.has_overview else features
        rows, cols = layout.tile_grid
        side, width = layout.feature_grid.rows // rows, features.shape[-1]
        # (rows, cols, side, side, D) -> (rows, side, cols, side, D): features as they lie in the image
        grid = tiles.reshape(rows, cols, side, side, width).transpose(1, 2).reshape(*layout.feature_grid, width)
        grid = _reduced(cropped(grid, layout.crop), layout)
        if ends:
            grid = torch.cat([grid, ends[0].expand(grid.shape[0], 1, width)], dim=1)
        overview = [features[0]] if layout.has_overview and layout.keeps_overview else []
        merged = torch.cat([*overview, grid.reshape(-1, width)])
    if len(merged) != layout.num_features:
        raise ValueError(
            f"an image of {layout.size} gave {len(merged)} features where its layout has {layout.num_features}"
        )
    return merged


def _reduced(grid: Tensor, layout: ImageLayout) -> Tensor:
    """Reduce a grid (rows, cols, D) to the layout's size, by interpolation or by the largest of each four."""
    if layout.reduced is None:
        return grid
    maps = grid.permute(2, 0, 1)[None]
    if layout.pools:
        maps = F.max_pool2d(maps, 2)
    else:
        maps = F.interpolate(maps, tuple(layout.reduced), mode="bilinear")
    return maps[0].permute(1, 2, 0)


def cropped(grid: Tensor, crop: Crop) -> Tensor:
    """Return a part of a grid (rows, cols, ...)."""
    return grid[crop.row_start : crop.row_stop, crop.col_start : crop.col_stop]


def unpad_image(tensor: Tensor, original_size: Sequence[int]) -> Tensor:
    """Cut the padding of an image of `original_size` (width, height) off a grid of its features (D, rows, cols)."""
    rows, cols = tensor.shape[1:]
    return cropped(tensor.movedim(0, -1), unpad_box(rows, cols, original_size)).movedim(-1, 0)


def with_newline_in_graph(features: list[Tensor], newline: Tensor | None) -> list[Tensor]:
    """Return the features of single tiles with the learned newline in their gradient graph, with gradients of zero.

    One rank of a distributed run may have such features alone, while the others use the newline and wait for the gradients
    of each weight.
    """
    if newline is None or not (torch.is_grad_enabled() and newline.requires_grad):
        return features
    return [features[0] + 0 * newline.to(features[0]), *features[1:]]
