"""Join the features of one image's tiles into one sequence, as its layout says.

In: features per tile, an `ImageLayout` (images/layout.py). Out: the image's features in the order the language model reads.

    P patches per tile, D width
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.images.layout import ImageLayout


def merge_tiles(features: Tensor, layout: ImageLayout, newline: Tensor | None) -> Tensor:
    """Join one image's tiles (tiles, P, D) as its layout says -> (num_features, D).

    The overview comes first. The other tiles are laid side by side as they lie in the image, read by rows; where the
    layout crops padding away, each row of features ends in the learned newline.
    """
    overview, tiles = features[0], features[1:]
    ends = []  # the newline as one row, where the layout has any
    if layout.num_newlines:
        assert newline is not None, "a layout with newlines needs image_newline"
        ends = [newline.to(features)[None]]
    if layout.tile_grid is None:
        merged = torch.cat([features.flatten(0, 1), *ends])
    else:
        rows, cols = layout.tile_grid
        side, width = layout.feature_grid.rows // rows, features.shape[-1]
        # (rows, cols, side, side, D) -> (rows, side, cols, side, D): features as they lie in the image
        grid = tiles.reshape(rows, cols, side, side, width).transpose(1, 2).reshape(*layout.feature_grid, width)
        crop = layout.crop
        grid = grid[crop.row_start : crop.row_stop, crop.col_start : crop.col_stop]
        if ends:
            grid = torch.cat([grid, ends[0].expand(grid.shape[0], 1, width)], dim=1)
        merged = torch.cat([overview, grid.reshape(-1, width)])
    if len(merged) != layout.num_features:
        raise ValueError(
            f"an image of {layout.size} gave {len(merged)} features where its layout has {layout.num_features}"
        )
    return merged


def with_newline_in_graph(features: list[Tensor], newline: Tensor | None) -> list[Tensor]:
    """The same features of plain tiles, from which gradients (of zero) flow to the learned newline, of which they have none.

    A batch of them may be all that one rank of a distributed run has, its samples being text alone, while the others'
    images end their rows in newlines and wait for each weight's gradients.
    """
    if newline is None or not (torch.is_grad_enabled() and newline.requires_grad):
        return features
    return [features[0] + 0 * newline.to(features[0]), *features[1:]]
