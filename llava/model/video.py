"""Reduce the features of a video's frames and join them into one sequence, as its layout says.

In: features per frame, a `VideoLayout` (images/video_layout.py). Out: the video's features in the order of the sequence.

    F frames, P patches per frame, D width
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.images.layout import Grid
from llava.images.video_layout import VideoLayout, VideoPolicy


def merge_frames(features: Tensor, layout: VideoLayout, newline: Tensor | None, faster_token: Tensor | None) -> Tensor:
    """Join the features of a video's frames, (F, P, D) -> (num_features, D); P is that of the reduced grid for some policies.

    `newline` and `faster_token` (D,) are the learned ends of rows, frames or the video, where the layout has them.
    """
    policy = layout.policy
    if policy.before_projector:  # they came reduced
        grids = features.reshape(len(features), *layout.grid, -1)
    else:
        grids = reduced(features, layout.grid, policy, policy.stride)
    slow = with_row_ends(grids, layout, newline)  # (F, n, D)
    if layout.fast_grid is not None:
        assert faster_token is not None, "a layout with slow frames needs faster_token"
        fast = with_row_ends(reduced(features, layout.fast_grid, policy, 2 * policy.stride), layout, newline)
        end = faster_token.to(features)[None]
        frames = (slow[frame] if layout.is_slow(frame) else fast[frame] for frame in range(layout.num_frames))
        merged = torch.cat([part for frame in frames for part in (frame, end)])
    else:
        merged = slow.flatten(0, 1)
    if policy.newline == "one_token":
        assert newline is not None, "a layout with a newline needs image_newline"
        merged = torch.cat([merged, newline.to(merged)[None]])
    if len(merged) != layout.num_features:
        raise ValueError(
            f"a video of {layout.num_frames} frames gave {len(merged)} features where its layout has {layout.num_features}"
        )
    return merged


def reduced(features: Tensor, grid: Grid, policy: VideoPolicy, stride: int) -> Tensor:
    """Reduce the square grid of each frame by `stride`, (F, P, D) -> (F, rows, cols, D)."""
    frames, patches, width = features.shape
    side = round(patches**0.5)
    maps = features.reshape(frames, side, side, width).permute(0, 3, 1, 2)
    if stride > 1:
        if policy.pool == "bilinear":
            maps = F.interpolate(maps, tuple(grid), mode="bilinear")
        else:
            maps = F.avg_pool2d(maps, stride) if policy.pool == "average" else F.max_pool2d(maps, stride)
    return maps.permute(0, 2, 3, 1)


def with_row_ends(grids: Tensor, layout: VideoLayout, newline: Tensor | None) -> Tensor:
    """End each row or each frame with the newline, (F, rows, cols, D) -> (F, n, D)."""
    frames, rows, _, width = grids.shape
    if layout.policy.newline == "grid":
        assert newline is not None, "a layout with newlines needs image_newline"
        grids = torch.cat([grids, newline.to(grids).expand(frames, rows, 1, width)], dim=2)
    flat = grids.flatten(1, 2)
    if layout.policy.newline == "frame":
        assert newline is not None, "a layout with newlines needs image_newline"
        flat = torch.cat([flat, newline.to(flat).expand(frames, 1, width)], dim=1)
    return flat
