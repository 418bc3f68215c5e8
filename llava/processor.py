"""Turn a conversation and its images into model inputs.

In: a Conversation (or a finished prompt) and PIL images. Out: ModelInputs: ids, labels, pixels, sizes and layouts, with
the number of tokens that the model will see. Layouts are planned in images/layout.py, pixels are made in mm_utils.py,
templates are in conversation.py, and training samples become ids in text/labels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, Span, check_placeholders, image_placeholder
from llava.errors import InputError
from llava.images.decode import to_rgb
from llava.images.image_processor import ClipImageProcessor
from llava.images.layout import ImageLayout, ImagePolicy, plan_images
from llava.mm_utils import process_images
from llava.text.labels import encode_spans
from llava.text.tokenization import Tokenizer, num_doubled, tokenizer_image_token

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ModelInputs:
    """One sequence, ready for a model."""

    input_ids: torch.Tensor  # (T,), -200 for each image
    labels: torch.Tensor | None  # (T,), -100 where nothing is learned; None unless asked for
    pixels: list[torch.Tensor]  # per image (3, side, side), or (tiles, 3, side, side) where images are cut into tiles
    image_sizes: list[tuple[int, int]]  # per image (width, height)
    layouts: list[ImageLayout]

    @property
    def images(self) -> torch.Tensor | list[torch.Tensor] | None:
        """The pixels as the model takes them: one batch of single tiles, or a list where images are cut."""
        if not self.pixels:
            return None
        if all(pixels.dim() == 3 for pixels in self.pixels):
            return torch.stack(self.pixels)
        return self.pixels

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
    use_im_start_end: bool = False  # an image's placeholder has <im_start> and <im_end> around it

    @property
    def image_placeholder(self) -> str:
        """The text that stands for one image in a prompt of this model."""
        return image_placeholder(self.use_im_start_end)

    def __call__(
        self,
        conversation: Conversation | str,
        images: Sequence[Image.Image] = (),
        *,
        with_labels: bool = False,
        details: Sequence[str] = (),
    ) -> ModelInputs:
        """Make the inputs of one prompt, with labels as training makes them if asked for.

        Args:
            conversation: its last turn is unanswered, or a finished prompt; one placeholder for each image.
            images: in the order of their placeholders.

        Raises:
            InputError: placeholders and images differ in number, or an image cannot be used.
        """
        ids, labels = self.encode(conversation, len(images))
        return self.inputs(ids, images, labels=labels if with_labels else None, details=details)

    def inputs(
        self,
        ids: Sequence[int],
        images: Sequence[Image.Image],
        *,
        labels: Sequence[int] | None = None,
        details: Sequence[str] = (),
    ) -> ModelInputs:
        """Model inputs of token ids with -200 for each image; `details` as in `plan`."""
        rgb = [to_rgb(image) for image in images]
        sizes = [image.size for image in rgb]
        layouts = self.plan(sizes, details)
        return ModelInputs(
            input_ids=torch.tensor(ids, dtype=torch.long),
            labels=None if labels is None else torch.tensor(labels, dtype=torch.long),
            pixels=self.pixels(rgb, layouts),
            image_sizes=sizes,
            layouts=layouts,
        )

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

    def plan(self, sizes: Sequence[tuple[int, int]], details: Sequence[str] = ()) -> list[ImageLayout]:
        """Lay out images of `sizes` (width, height), as `layout.plan_images` does."""
        return plan_images(sizes, self._policy(), details) if sizes else []

    def _policy(self) -> ImagePolicy:
        if self.policy is None:
            raise InputError("this processor does not know how its model lays images out; build it with policy=.")
        return self.policy
