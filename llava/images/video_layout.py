"""Video layouts: how many features the frames of a video become, and where "end" features stand among them.

In: a number of frames, the `ImagePolicy` of the model's tower and the `VideoPolicy` of its config. Out: a `VideoLayout`.
`plan_video()` is the only place that counts the features of videos. The features themselves are made in model/video.py.
Neither torch nor Pillow is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from llava.errors import InputError
from llava.images.layout import Grid, ImagePolicy

Pool = Literal["average", "max", "bilinear"]
NewlinePosition = Literal["grid", "frame", "one_token", "no_token"]


@dataclass(frozen=True)
class VideoPolicy:
    """How a model reduces the features of a video's frames, and which of them it ends with the learned newline."""

    pool: Pool = "bilinear"  # mm_spatial_pool_mode: how each frame's grid is reduced
    stride: int = 2  # mm_spatial_pool_stride: by what factor, in both directions
    newline: NewlinePosition = "one_token"  # mm_newline_position: after each row, each frame, the video, or nowhere
    # faster_token_stride, with add_faster_video: every so many frames one keeps this detail, the others are reduced twice as
    # much, and each frame ends with the learned faster_token
    slow_every: int | None = None
    before_projector: bool = False  # mm_spatial_pool_before_projector: reduced as transformers' LLaVA-NeXT-Video does

    def __post_init__(self) -> None:
        for key, value, known in (
            ("mm_spatial_pool_mode", self.pool, get_args(Pool)),
            ("mm_newline_position", self.newline, get_args(NewlinePosition)),
        ):
            if value not in known:
                raise InputError(f"{key} is {value!r}; known: {', '.join(known)}")
        for key, number in (("mm_spatial_pool_stride", self.stride), ("faster_token_stride", self.slow_every)):
            if number is not None and (type(number) is not int or number < 1):
                raise InputError(f"{key} is {number!r}; it must be a whole number of at least 1")
        if self.before_projector and self.slow_every is not None:
            raise InputError(
                "add_faster_video reduces frames behind the projector, and mm_spatial_pool_before_projector is set"
            )


@dataclass(frozen=True)
class VideoLayout:
    """The features of one video."""

    num_frames: int
    grid: Grid  # of a frame, after the reduction
    fast_grid: Grid | None  # of the frames between the slow ones, where a model has these
    policy: VideoPolicy  # as it applies to this model: without what its way to merge leaves out

    def is_slow(self, frame: int) -> bool:
        """Whether a frame keeps its detail."""
        return self.policy.slow_every is None or frame % self.policy.slow_every == 0

    def _grid_of(self, frame: int) -> Grid:
        return self.grid if self.fast_grid is None or self.is_slow(frame) else self.fast_grid

    @property
    def frame_lengths(self) -> list[int]:
        """The number of features of each frame, with its newlines and its end; a video's own newline belongs to none."""
        grids = [self._grid_of(frame) for frame in range(self.num_frames)]
        per_row, once = int(self.policy.newline == "grid"), int(self.policy.newline == "frame")
        ends = once + int(self.policy.slow_every is not None)
        return [rows * (cols + per_row) + ends for rows, cols in grids]

    @property
    def num_newlines(self) -> int:
        """The number of learned newlines, of rows, of frames or of the video."""
        newline = self.policy.newline
        if newline == "grid":
            return sum(self._grid_of(frame).rows for frame in range(self.num_frames))
        return {"frame": self.num_frames, "one_token": 1, "no_token": 0}[newline]

    @property
    def num_features(self) -> int:
        """All features, newlines and frame ends included."""
        return sum(self.frame_lengths) + int(self.policy.newline == "one_token")


def plan_video(num_frames: int, image_policy: ImagePolicy, video_policy: VideoPolicy) -> VideoLayout:
    """Lay out one video; the `num_features` of the result is exactly the number that the model makes.

    Args:
        num_frames: Those that the model is given, each one tile.
        image_policy: The model's `image_policy()`: the side of a frame's grid, and whether there is a newline.
        video_policy: The model's `video_policy()`.

    Raises:
        InputError: The settings do not belong together, or there is no frame.
    """
    if num_frames < 1:
        raise InputError(f"a video of {num_frames} frames was given; it needs at least one")
    if image_policy.cls_token:
        raise InputError(
            "the frames of a video are reduced as grids, without a class feature; use mm_vision_select_feature 'patch'"
        )
    side = image_policy.patches_per_side
    grid = _reduced(side, video_policy, video_policy.stride)
    newline, slow_every, fast = video_policy.newline, video_policy.slow_every, None
    if image_policy.merge == "flat":  # joined without newlines, whatever the position
        newline, slow_every = "no_token", None
    elif image_policy.merge == "spatial" and newline == "one_token":
        newline = "no_token"
    elif image_policy.merge == "spatial" and newline != "no_token":
        raise InputError(
            f"mm_newline_position {newline!r} needs the model's image_newline, which mm_patch_merge_type 'spatial' has not; "
            "use 'no_token', or 'spatial_unpad' if the model was trained so"
        )
    if slow_every is not None:
        if newline != "grid":
            raise InputError(f"add_faster_video works with mm_newline_position 'grid', and it is {newline!r}")
        fast = _reduced(side, video_policy, 2 * video_policy.stride)
    return VideoLayout(num_frames, grid, fast, replace(video_policy, newline=newline, slow_every=slow_every))


def _reduced(side: int, policy: VideoPolicy, stride: int) -> Grid:
    """The grid of a frame of `side` x `side` features; windows of pooling lie within the frame, interpolation rounds up."""
    reduced = -(-side // stride) if policy.pool == "bilinear" else side // stride
    if reduced < 1:
        raise InputError(
            f"mm_spatial_pool_stride leaves nothing of a frame of {side} x {side} features, which is reduced by {stride}; "
            "use a smaller one"
        )
    return Grid(reduced, reduced)
