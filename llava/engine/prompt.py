"""A prompt as the engine computes it: token ids with a position for every image feature, and its images.

Images are kept as bytes, a quarter of the size of normalised pixels; normalising is a look-up on the device. Prompts are
built from requests in prompt_builder.py. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llava.errors import InputError
from llava.images.layout import ImageLayout

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from llava.engine.adapters.adapter import LoadedAdapter
    from llava.images.frames import Video
    from llava.images.video_layout import VideoLayout

KEPT_PIXELS = 4_000_000  # of an image kept whole: its features are known, or a device makes its tiles


def prompt_bytes(layout: ImageLayout | VideoLayout, tile_size: int) -> int:
    """What a prompt holds of an image: its tiles, or a small one itself, to which Pillow gives 4 bytes a pixel.

    Of a video, it holds the tiles of its frames.
    """
    if not isinstance(layout, ImageLayout):
        return 3 * layout.num_frames * tile_size**2
    pixels = layout.size.width * layout.size.height
    return max(3 * layout.num_tiles * tile_size**2, 4 * pixels if pixels <= KEPT_PIXELS else 0)


class PromptImage:
    """An image in a prompt, its features at positions `start` to `stop`.

    `key` names content and layout: the same key, the same features. A layout follows from size, model, number of tiles and
    whether a single one is padded, so these stand for it.
    """

    def __init__(
        self,
        rgb: Image.Image,
        layout: ImageLayout,
        start: int,
        to_pixels: Callable[[list[Image.Image], list[ImageLayout]], list[Tensor]] | None,
        *,
        seen_by: bytes = b"",
    ) -> None:
        """Without `to_pixels`, its tiles are made on the device, from its colours (H, W, 3).

        `seen_by` is the key of an adapter that sees images otherwise than the model does.
        """
        colours = np.array(rgb)
        content = hashlib.sha256(seen_by + repr((rgb.size, layout.num_tiles, layout.is_padded)).encode())
        content.update(colours.data)
        self.key = content.digest()
        self.size = rgb.size
        self.start = start
        self.layout = layout
        self.num_features = layout.num_features
        self.colours = colours if to_pixels is None else None
        self._rgb = None if to_pixels is None else rgb  # until its pixels are made
        self._to_pixels = to_pixels
        self._pixels: Tensor | None = None

    modality: ClassVar[str] = "image"

    @property
    def stop(self) -> int:
        return self.start + self.num_features

    @property
    def is_kept_whole(self) -> bool:
        """Whether it stays as it was given until its features are needed, which it is small enough for."""
        return self.size[0] * self.size[1] <= KEPT_PIXELS

    def pixels(self) -> Tensor:
        """Tiles (n, 3, side, side) of uint8, as they were before normalising, made on the host."""
        assert self._to_pixels is not None
        if self._pixels is None:
            assert self._rgb is not None
            pixels, self._rgb = self._to_pixels([self._rgb], [self.layout])[0], None
            self._pixels = pixels[None] if pixels.dim() == 3 else pixels
        return self._pixels

    def prepare(self) -> None:
        """Do what can be done on the host; what is wrong with an image shows here."""
        if self._to_pixels is not None:
            self.pixels()


class PromptVideo(PromptImage):
    """A video in a prompt, whose tiles are its frames.

    `key` names the content of the frames that were chosen; how they are pooled follows from the model.
    """

    modality: ClassVar[str] = "video"

    def __init__(
        self,
        video: Video,
        layout: VideoLayout,
        start: int,
        to_pixels: Callable[[Video], Tensor],
        *,
        seen_by: bytes = b"",
    ) -> None:
        content = hashlib.sha256(seen_by + repr(("video", video.size, len(video.frames))).encode())
        for frame in video.frames:
            content.update(repr(frame.size).encode())
            content.update(np.asarray(frame).data)
        self.key = content.digest()
        self.size = video.size
        self.start = start
        self.layout = layout  # type: ignore[assignment]
        self.num_features = layout.num_features
        self.colours = None
        self._video: Video | None = video
        self._frames_to_pixels = to_pixels
        self._pixels = None

    @property
    def is_kept_whole(self) -> bool:
        """Its frames are many; they are kept as tiles, which are smaller."""
        return False

    def pixels(self) -> Tensor:
        """Frames (n, 3, side, side) of uint8, made on the host."""
        if self._pixels is None:
            assert self._video is not None
            self._pixels, self._video = self._frames_to_pixels(self._video), None
        return self._pixels

    def prepare(self) -> None:
        self.pixels()


@dataclass(frozen=True)
class Prompt:
    """Token ids, with a negative id for each image feature, the images these belong to, and what they go through."""

    ids: list[int]
    images: tuple[PromptImage, ...]
    adapter: LoadedAdapter | None = None

    @property
    def num_image_tokens(self) -> int:
        return sum(image.num_features for image in self.images)

    @property
    def num_text_tokens(self) -> int:
        return len(self.ids) - self.num_image_tokens


def spans_of(prompt: Prompt, wanted: str | tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The positions (start, stop) of "all", of "text", of "images", or those given, which the prompt must have."""
    total = len(prompt.ids)
    if not isinstance(wanted, str):
        if wanted[1] > total:
            raise InputError(f"span is {wanted}, and the prompt with its image features has {total} positions")
        return (wanted,)
    if wanted == "all":
        return ((0, total),)
    images = [(image.start, image.stop) for image in prompt.images]
    if wanted == "text":
        ends = [0, *(stop for _, stop in images)]
        starts = [*(start for start, _ in images), total]
        images = [(first, end) for first, end in zip(ends, starts, strict=True) if first < end]
    if not images:
        raise InputError(f"span is {wanted!r}, and the prompt has no {wanted}")
    return tuple(images)
