"""Turn a conversation and its images and videos into model inputs.

In: a Conversation (or a finished prompt), PIL images and `Video`s. Out: ModelInputs: ids, labels, pixels, sizes and layouts,
with the number of tokens that the model will see. Layouts are planned in images/, pixels are made in mm_utils.py,
templates are in conversation.py, and training samples become ids in text/labels.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

import torch

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, Span, check_placeholders, image_placeholder
from llava.errors import InputError
from llava.images.decode import to_rgb
from llava.images.frames import Video
from llava.images.image_processor import ClipImageProcessor
from llava.images.layout import ImageLayout, ImagePolicy, plan_images
from llava.images.video_layout import VideoLayout, VideoPolicy, plan_video
from llava.mm_utils import process_images
from llava.text.labels import encode_spans
from llava.text.tokenization import Tokenizer, num_doubled, tokenizer_image_token

if TYPE_CHECKING:
    from PIL import Image

# With the end token around it, and the line break that follows.
PLACEHOLDER = re.compile(rf"({re.escape(DEFAULT_IMAGE_TOKEN)}(?:{re.escape(DEFAULT_IM_END_TOKEN)})?)(\n?)")


Layout: TypeAlias = ImageLayout | VideoLayout


@dataclass(frozen=True)
class ModelInputs:
    """One sequence, ready for a model."""

    input_ids: torch.Tensor  # (T,), -200 for each image
    labels: torch.Tensor | None  # (T,), -100 where nothing is learned; None unless asked for
    # Per image (3, side, side), or (tiles, 3, side, side) where images are cut into tiles; per video (frames, 3, side, side).
    pixels: list[torch.Tensor]
    image_sizes: list[tuple[int, int]]  # per image or frame (width, height)
    layouts: list[Layout]

    @property
    def images(self) -> torch.Tensor | list[torch.Tensor] | None:
        """The pixels as the model takes them: one batch of single tiles, or a list where images are cut."""
        if not self.pixels:
            return None
        if all(pixels.dim() == 3 for pixels in self.pixels):
            return torch.stack(self.pixels)
        return self.pixels

    @property
    def modalities(self) -> list[str]:
        """ "image" or "video" for each entry of `pixels`."""
        return [modality_of(layout) for layout in self.layouts]

    @property
    def num_image_tokens(self) -> int:
        return sum(layout.num_features for layout in self.layouts)

    @property
    def num_tokens(self) -> int:
        """The length of the sequence inside the model, where features replace each image's placeholder."""
        return len(self.input_ids) - len(self.layouts) + self.num_image_tokens


@dataclass(eq=False)
class Processor:
    """Makes ModelInputs for one model."""

    tokenizer: Tokenizer
    image_processor: ClipImageProcessor | None = None  # None: a language model without a vision tower
    policy: ImagePolicy | None = None  # the model's `image_policy()`, needed for inputs with images
    _: KW_ONLY
    video_policy: VideoPolicy | None = None  # the model's `video_policy()`; None: it takes no videos
    use_im_start_end: bool = False  # an image's placeholder has <im_start> and <im_end> around it
    tells_times: bool = False  # prompts say when the frames of a video are, where the video says nothing else

    @property
    def image_placeholder(self) -> str:
        """The text that stands for one image in a prompt of this model."""
        return image_placeholder(self.use_im_start_end)

    def __call__(
        self,
        conversation: Conversation | str,
        images: Sequence[Image.Image | Video] = (),
        *,
        with_labels: bool = False,
        details: Sequence[str] = (),
    ) -> ModelInputs:
        """Make the inputs of one prompt, with labels as training makes them if asked for.

        Args:
            conversation: its last turn is unanswered, or a finished prompt; one placeholder for each image or video.
            images: and videos, in the order of their placeholders.

        Raises:
            InputError: placeholders and images differ in number, or an image cannot be used.
        """
        ids, labels = self.encode(self.with_times(conversation, images), len(images))
        return self.inputs(ids, images, labels=labels if with_labels else None, details=details)

    def inputs(
        self,
        ids: Sequence[int],
        images: Sequence[Image.Image | Video],
        *,
        labels: Sequence[int] | None = None,
        details: Sequence[str] = (),
    ) -> ModelInputs:
        """Model inputs of token ids with -200 for each image or video; `details` as in `layouts`."""
        rgb = [entry_rgb(image) for image in images]
        layouts = self.layouts(rgb, details)
        return ModelInputs(
            input_ids=torch.tensor(ids, dtype=torch.long),
            labels=None if labels is None else torch.tensor(labels, dtype=torch.long),
            pixels=self._all_pixels(rgb, layouts),
            image_sizes=[image.size for image in rgb],
            layouts=layouts,
        )

    def with_times(self, conversation: Conversation | str, images: Sequence[Image.Image | Video]) -> Conversation | str:
        """A prompt that says, behind the placeholder of each video, when its frames are, where this is asked for."""
        return with_time_instructions(conversation, images, usual=self.tells_times)

    def encode(self, conversation: Conversation | str, num_images: int) -> tuple[list[int], list[int]]:
        """Encode to ids, with -200 for each image, and labels."""
        return encode_spans(self._spans(conversation, num_images), self.tokenizer)

    def encode_ids(self, conversation: Conversation | str, num_images: int) -> list[int]:
        """Encode to ids alone, which takes less time."""
        text = "".join([span.text for span in self._spans(conversation, num_images)])
        ids = tokenizer_image_token(text, self.tokenizer)
        return ids[num_doubled(ids, text, self.tokenizer) :]

    def _spans(self, conversation: Conversation | str, num_images: int) -> list[Span]:
        spans = [Span(conversation, False)] if isinstance(conversation, str) else conversation.spans()
        check_placeholders(sum(span.text.count(DEFAULT_IMAGE_TOKEN) for span in spans), num_images)
        return spans

    def pixels(self, rgb: Sequence[Image.Image], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        """Make the pixels of RGB images of one prompt, as `plan` laid them out.

        Per image (3, side, side), or (tiles, 3, side, side) where images are cut into tiles or end with a newline.
        """
        if not rgb:
            return []
        policy = self._policy()
        assert self.image_processor is not None  # of a model that has a policy
        crop, split = policy.crop_split or (None, None)
        config = SimpleNamespace(
            image_aspect_ratio="pad" if any(layout.is_padded for layout in layouts) else policy.mode,
            image_grid_pinpoints=policy.pinpoints,
            image_crop_resolution=crop,
            image_split_resolution=split,
        )
        made = process_images(rgb, self.image_processor, config)
        pixels = []
        for tiles, layout in zip(made, layouts, strict=True):
            if tiles.dim() == 3:
                pixels.append(tiles[None] if layout.num_newlines else tiles)
            else:  # the overview comes first, and is alone where little detail was asked for
                pixels.append(tiles[: layout.num_tiles])
        return pixels

    def video_pixels(self, video: Video) -> torch.Tensor:
        """Make the pixels of a video's RGB frames (frames, 3, side, side), each one tile, as in training."""
        assert self.image_processor is not None
        return self.image_processor.preprocess(list(video.frames), return_tensors="pt")["pixel_values"]

    def _all_pixels(self, rgb: Sequence[Image.Image | Video], layouts: Sequence[Layout]) -> list[torch.Tensor]:
        images = [image for image in rgb if not isinstance(image, Video)]
        made = iter(self.pixels(images, [layout for layout in layouts if isinstance(layout, ImageLayout)]))
        return [self.video_pixels(image) if isinstance(image, Video) else next(made) for image in rgb]

    def layouts(self, images: Sequence[Image.Image | Video], details: Sequence[str] = ()) -> list[Layout]:
        """Lay out images and videos of one prompt; `details` has a word for each, or is empty, and does not change videos."""
        check_details(details, len(images))
        kept = [number for number, image in enumerate(images) if not isinstance(image, Video)]
        planned = iter(self.plan([images[at].size for at in kept], [details[at] for at in kept] if details else ()))
        return [self._plan_video(image) if isinstance(image, Video) else next(planned) for image in images]

    def _plan_video(self, video: Video) -> VideoLayout:
        if self.video_policy is None:
            raise InputError(
                "this model takes images and no videos; give some of the video's frames, each as an image with an <image> in "
                "the prompt"
            )
        return plan_video(len(video.frames), self._policy(), self.video_policy)

    def plan(self, sizes: Sequence[tuple[int, int]], details: Sequence[str] = ()) -> list[ImageLayout]:
        """Lay out images of `sizes` (width, height), as `layout.plan_images` does."""
        return plan_images(sizes, self._policy(), details) if sizes else []

    def _policy(self) -> ImagePolicy:
        if self.policy is None:
            raise InputError("this processor does not know how its model lays images out; build it with policy=.")
        return self.policy


def modality_of(layout: Layout) -> str:
    """What the model calls an entry with this layout."""
    return "video" if isinstance(layout, VideoLayout) else "image"


def entry_rgb(entry: Image.Image | Video) -> Image.Image | Video:
    """An image as RGB, or a video whose frames are."""
    if isinstance(entry, Video):
        return replace(entry, frames=tuple(to_rgb(frame) for frame in entry.frames))
    return to_rgb(entry)


def check_details(details: Sequence[str], num_images: int) -> None:
    if details and len(details) != num_images:
        raise InputError(f"{len(details)} details were given for {num_images} images; give one for each, or none")


def with_time_instructions(
    prompt: Conversation | str, images: Sequence[Image.Image | Video], *, usual: bool
) -> Conversation | str:
    """Put behind the placeholder of each video, on a line of its own, the sentences that say when its frames are.

    `usual` holds for videos that do not say themselves whether it is done.
    """
    notes = [
        image.time_instruction()
        if isinstance(image, Video) and (usual if image.tells_times is None else image.tells_times)
        else ""
        for image in images
    ]
    if not any(notes):
        return prompt
    left = iter(notes)
    if isinstance(prompt, str):
        return _noted(prompt, left)
    noted = prompt.copy()
    for message in noted.messages:
        if isinstance(message[1], str):
            message[1] = _noted(message[1], left)
    return noted


def _noted(text: str, notes: Iterator[str]) -> str:
    def noted(match: re.Match[str]) -> str:
        note = next(notes, "")
        return f"{match[1]}\n{note}{match[2] or chr(10)}" if note else match[0]

    return PLACEHOLDER.sub(noted, text)
